import keras
import numpy as np
import pytest
from keras import layers

import keras_edifice
from keras_edifice.model import EdificeModel
from keras_edifice.neuromorphic import ann2snn
from keras_edifice.neuromorphic.ann2snn import (
    IntegrateAndFire,
    convert,
    evaluate_conversion,
    fold_batch_norm,
)
from tests.support.close import assert_close, difference, to_numpy
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient

rng = np.random.default_rng(0)


def with_random_weights(model, scale=0.5):
    """The same on every backend; a spike that is a rounding away stays where it is."""
    random = np.random.default_rng(1)
    for weight in model.trainable_variables:
        weight.assign(scale * random.normal(size=weight.shape))
    return model


def one_layer():
    """Rectifies its input, and the activations on which λ is 2."""
    model = keras.Sequential(
        [keras.Input((50,)), layers.Dense(50, activation="relu", use_bias=False)]
    )
    model.set_weights([np.eye(50, dtype="float32")])
    return model, np.full((1, 50), 2.0, "float32")


def small_mlp(**options):
    sizes = dict(input_size=4, output_size=3, hidden_sizes=[16, 8], percentile=100.0)
    return with_random_weights(keras_edifice.build("ann2snn", **{**sizes, **options}))


def image_network():
    """Every kind of layer that is converted, batch norms trained."""
    x = inputs = keras.Input((8, 8, 2))
    x = layers.Conv2D(4, 3, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization()(x)
    x = layers.ReLU()(x)
    x = layers.MaxPooling2D(2)(x)
    y = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2)(x)
    y = layers.BatchNormalization(scale=False)(y)
    y = layers.Activation("relu")(y)
    y = layers.Conv2D(4, 1)(y)
    x = layers.Add()([x, y])
    x = layers.Activation("relu")(x)
    x = layers.BatchNormalization(center=False)(x)  # behind no weights: stays
    x = layers.AveragePooling2D(2)(x)
    x = layers.Dropout(0.5)(layers.Flatten()(x))
    trunk = keras.Sequential([keras.Input((16,)), layers.Dense(6, activation="relu")])
    x = layers.Dense(3, activation="softmax")(trunk(x))
    model = with_random_weights(keras.Model(inputs, x))
    random = np.random.default_rng(1)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.moving_mean.assign(random.normal(size=layer.moving_mean.shape))
            layer.moving_variance.assign(
                random.uniform(0.5, 2.0, layer.moving_variance.shape)
            )
    return model, random.normal(size=(6, 8, 8, 2)).astype("float32")


def rate_network(x, weights, scales, steps, v_init, reset):
    """Spiking dense layers in float64: the mean output over time."""
    pairs = list(zip(weights[::2], weights[1::2], strict=True))
    membranes = [v_init * s for s in scales]
    total = 0.0
    for _ in range(steps):
        signal = np.asarray(x, "float64")
        for layer, (kernel, bias) in enumerate(pairs):
            signal = signal @ kernel.astype("float64") + bias
            if layer == len(scales):
                break
            v = membranes[layer] + signal
            s = (v >= scales[layer]).astype("float64")
            signal = s * scales[layer]
            membranes[layer] = v - signal if reset == "subtract" else v * (1 - s)
        total = total + signal
    return total / steps


@pytest.mark.parametrize("steps", [1, 10, 64])
@pytest.mark.parametrize("v_init, bound", [(0.0, 1.0), (0.5, 0.5)])
def test_rate_is_within_a_step_of_the_activation(v_init, bound, steps):
    model, calibration = one_layer()
    x = np.linspace(0.0, 2.0, 50, dtype="float32")[None]
    snn = convert(model, calibration, num_timesteps=steps, v_init=v_init)
    error = np.abs(snn.predict(x, verbose=0) - x).max()
    assert error <= bound * 2.0 / steps + 1e-5
    if v_init == 0.0:  # the bound is met: truncation, not rounding
        assert error > 0.75 * 2.0 / steps


def test_zero_reset_does_not_converge():
    model, calibration = one_layer()
    x = np.linspace(0.0, 2.0, 50, dtype="float32")[None]

    def errors(reset):
        return [
            np.abs(
                convert(model, calibration, num_timesteps=t, reset=reset).predict(
                    x, verbose=0
                )
                - x
            ).max()
            for t in (64, 1024)
        ]

    subtract, zero = errors("subtract"), errors("zero")
    assert subtract[1] < 0.1 * subtract[0]
    assert zero[1] > 0.9 * zero[0] > 0.2


@pytest.mark.parametrize("reset", ["subtract", "zero"])
@pytest.mark.parametrize("v_init", [0.0, 0.5])
def test_network_is_its_equation(v_init, reset):
    model = small_mlp(v_init=v_init, reset=reset, num_timesteps=20)
    calibration = rng.normal(size=(40, 4)).astype("float32")
    x = rng.normal(size=(3, 4)).astype("float32")
    weights, h, scales = model.get_weights(), calibration.astype("float64"), []
    for kernel, bias in zip(weights[:4:2], weights[1:4:2], strict=True):
        h = np.maximum(h @ kernel + bias, 0)
        scales.append(h.max())
    snn = model.convert(calibration)
    expected = rate_network(x, weights, scales, 20, v_init, reset)
    assert_close(snn.predict(x, verbose=0), expected, 1e-4)


def test_gap_to_the_network_closes_with_time():
    model = small_mlp()
    x = rng.normal(size=(30, 4)).astype("float32")
    expected = model.predict(x, verbose=0)
    errors = [
        difference(model.convert(x, num_timesteps=t).predict(x, verbose=0), expected)
        for t in (8, 64, 1024)
    ]
    assert errors[1] < 0.4 * errors[0]
    assert errors[2] < 0.4 * errors[1]
    assert errors[2] < 0.01


def test_a_low_percentile_clips_and_the_largest_does_not():
    model, _ = one_layer()
    x = np.linspace(0.02, 1.0, 50, dtype="float32")[None]

    def output(percentile):
        snn = convert(model, x, num_timesteps=500, percentile=percentile)
        return snn.predict(x, verbose=0)

    assert_close(output(100.0), x, 2e-3)
    assert_close(output(50.0), np.minimum(x, np.percentile(x, 50)), 2e-3)


def test_percentile_is_of_the_activations_above_zero():
    model, _ = one_layer()
    x = np.linspace(-1.0, 1.0, 50, dtype="float32")[None]
    snn = convert(model, x, percentile=50.0)
    (neurons,) = neurons_of(snn)
    assert_close(neurons.threshold, np.percentile(x[x > 0], 50))


def neurons_of(snn):
    layers_ = snn.get_layer("spiking_network").step_model.layers
    return [layer for layer in layers_ if isinstance(layer, IntegrateAndFire)]


@pytest.mark.parametrize("per_channel", [False, True])
def test_weight_mode_is_threshold_mode(per_channel):
    model, x = image_network()
    outputs = [
        convert(model, x, num_timesteps=12, mode=mode, per_channel=per_channel).predict(
            x, verbose=0
        )
        for mode in ("threshold", "weight")
    ]
    assert difference(outputs[0], model.predict(x, verbose=0)) > 1e-3
    assert_close(outputs[1], outputs[0], 1e-4)


def test_weight_mode_fires_at_one_and_threshold_mode_at_lambda():
    model, x = image_network()
    assert {n.threshold for n in neurons_of(convert(model, x, mode="weight"))} == {1.0}
    thresholds = {n.threshold for n in neurons_of(convert(model, x))}
    assert len(thresholds) > 1


def test_addition_joins_the_scales_of_its_branches():
    model, x = image_network()
    first, middle, joined, last = (n.threshold for n in neurons_of(convert(model, x)))
    assert first == joined
    assert len({first, middle, last}) == 3


@pytest.mark.parametrize("batch_norm", ["fold", "keep"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_image_network_converges(per_channel, batch_norm):
    model, x = image_network()
    options = dict(per_channel=per_channel, batch_norm=batch_norm, percentile=100.0)
    snn = convert(model, x, num_timesteps=300, **options)
    assert_close(snn.predict(x, verbose=0), model.predict(x, verbose=0), 0.03)


def test_batch_norm_is_folded_exactly():
    model, x = image_network()
    folded = fold_batch_norm(model)
    logits = folded.predict(x, verbose=0)
    assert_close(to_numpy(keras.ops.softmax(logits)), model.predict(x, verbose=0))
    kinds = [type(layer) for layer in folded.layers]
    assert layers.BatchNormalization not in kinds
    assert kinds.count(ann2snn.ChannelScale) == 1


def test_size_is_that_of_the_folded_network():
    model, x = image_network()
    assert convert(model, x).count_params() == fold_batch_norm(model).count_params()
    mlp = small_mlp()
    snn = mlp.convert(x[:, 0, :2, 0:2].reshape(6, 4))
    assert snn.count_params() == mlp.count_params() == 4 * 16 + 16 + 16 * 8 + 8 + 27


def test_weights_are_those_that_were_trained():
    model = small_mlp()
    snn = model.convert(rng.normal(size=(9, 4)).astype("float32"))
    for a, b in zip(model.get_weights(), snn.get_weights(), strict=True):
        assert np.array_equal(a, b)


def test_max_pooling_sends_what_its_busiest_input_sends():
    inputs = keras.Input((4, 4, 1))
    x = layers.ReLU()(layers.Conv2D(1, 1, use_bias=False)(inputs))
    model = keras.Model(inputs, layers.MaxPooling2D(2)(x))
    model.set_weights([np.ones((1, 1, 1, 1), "float32")])
    x = rng.uniform(0, 1, size=(2, 4, 4, 1)).astype("float32")
    snn = convert(model, x, num_timesteps=40, mode="weight", percentile=100.0)
    rates = np.floor(x / x.max() * 40 + 0.5) / 40 * x.max()
    expected = rates.reshape(2, 2, 2, 2, 2).max((2, 4))[..., None]
    assert_close(snn.predict(x, verbose=0), expected, 1e-5)


def test_input_may_meet_a_neuron_without_weights():
    inputs = keras.Input((4,))
    x = layers.Add()([inputs, layers.Dense(4)(inputs)])
    model = with_random_weights(keras.Model(inputs, layers.Dense(2)(layers.ReLU()(x))))
    x = 3 * rng.normal(size=(20, 4)).astype("float32")
    for mode in ("threshold", "weight"):
        snn = convert(model, x, num_timesteps=400, percentile=100.0, mode=mode)
        assert difference(snn.predict(x, verbose=0), model.predict(x, verbose=0)) < 0.02


def test_all_steps_are_the_means_so_far():
    model = small_mlp(num_classes=3)
    x = rng.normal(size=(5, 4)).astype("float32")
    steps = model.convert(x, num_timesteps=9, return_all_steps=True)
    steps = steps.predict(x, verbose=0)
    assert steps.shape == (5, 9, 3)
    for t in (1, 4, 9):
        alone = model.convert(x, num_timesteps=t).predict(x, verbose=0)
        assert_close(steps[:, t - 1], alone, 1e-5)


def test_poisson_input_has_the_right_mean():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(3, use_bias=False)])
    model.set_weights([np.eye(3, dtype="float32")])
    x = np.array([[0.2, -0.7, 1.0]], "float32")
    snn = convert(model, x, num_timesteps=2000, input_coding="poisson", seed=0)
    # Three standard deviations of 2000 draws.
    assert_close(snn.predict(x, verbose=0), x, 0.035)
    once = convert(model, x, num_timesteps=1, input_coding="poisson", seed=0)
    assert set(np.unique(once.predict(x, verbose=0))) <= {-1.0, 0.0, 1.0}


def test_options_of_the_model_are_those_of_its_conversion():
    model = small_mlp(num_timesteps=11, mode="weight", v_init=0.0)
    x = rng.normal(size=(5, 4)).astype("float32")
    network = model.convert(x).get_layer("spiking_network")
    assert network.num_timesteps == 11
    assert {(n.threshold, n.v_init) for n in neurons_of(model.convert(x))} == {(1, 0)}
    network = model.convert(x, num_timesteps=5).get_layer("spiking_network")
    assert network.num_timesteps == 5


def test_steps_are_the_scan():
    model = small_mlp(num_timesteps=6)
    x = rng.normal(size=(5, 4)).astype("float32")
    snn = model.convert(x)
    network = snn.get_layer("spiking_network")
    state, total = network.initial_state(5), 0.0
    for _ in range(6):
        y, state = network.step(keras.ops.convert_to_tensor(x), state)
        total = total + to_numpy(y)
    assert_close(snn.predict(x, verbose=0), total / 6, 1e-5)


@pytest.mark.parametrize("mode", ["threshold", "weight"])
def test_spiking_model_survives_saving_and_int8(mode, tmp_path):
    model, x = image_network()
    snn = convert(model, x, num_timesteps=8, mode=mode, per_channel=True)
    assert type(snn) is EdificeModel
    expected = snn.predict(x, verbose=0)
    snn.save(tmp_path / "snn.keras")
    loaded = keras.saving.load_model(tmp_path / "snn.keras")
    assert_close(loaded.predict(x, verbose=0), expected, 1e-6)
    loaded.quantize("int8")
    expected = loaded.predict(x, verbose=0)
    loaded.save(tmp_path / "int8.keras")
    again = keras.saving.load_model(tmp_path / "int8.keras")
    assert_close(again.predict(x, verbose=0), expected, 1e-6)


@pytest.mark.parametrize("format", ["onnx", "saved_model"])
def test_spiking_model_exports(format, tmp_path):
    model = small_mlp(num_timesteps=8, num_classes=3)
    snn = model.convert(rng.normal(size=(40, 4)).astype("float32"))
    assert snn.export(tmp_path / "snn", format) < 1e-4


def test_evaluation_measures_accuracy_rates_and_operations():
    model = small_mlp(num_classes=3)
    x = rng.normal(size=(60, 4)).astype("float32")
    labels = model.predict(x, verbose=0).argmax(-1)
    labels[:6] = (labels[:6] + 1) % 3
    snn = model.convert(x)
    report = evaluate_conversion(model, snn, (x, labels), [4, 256])
    assert report["ann_accuracy"] == pytest.approx(0.9)
    assert report["ann_operations"] == 4 * 16 + 16 * 8 + 8 * 3 + 3 * 3
    assert report["timesteps"] == [4, 256]
    assert report["agreement"][0] < report["agreement"][1]
    assert report["agreement"][1] > 0.9
    assert abs(report["snn_accuracy"][1] - 0.9) < 0.05
    assert report["synaptic_operations"][1] > 50 * report["synaptic_operations"][0]
    assert evaluate_conversion(model, snn, (x, np.eye(3)[labels]))["timesteps"] == [64]


def test_operations_are_spikes_times_connections():
    model, x = one_layer()[0], np.linspace(0, 2, 50, dtype="float32")[None]
    model = keras.Sequential([keras.Input((50,)), *model.layers, layers.Dense(7)])
    snn = convert(model, x, num_timesteps=10, percentile=100.0)
    report = evaluate_conversion(model, snn, (x, [0]))
    spikes = np.floor(np.linspace(0, 2, 50) / 2 * 10 + 0.5).clip(0, 10).sum()
    # A current that fills a neuron exactly may miss its threshold by one rounding.
    assert abs(report["synaptic_operations"][0] / 7 - spikes) <= 3
    (rate,) = report["firing_rates"][0].values()
    assert rate == pytest.approx(report["synaptic_operations"][0] / 7 / 500)


@pytest.mark.parametrize(
    "layer",
    [
        layers.Conv2D(3, (3, 2), strides=(2, 1), padding="same", use_bias=False),
        layers.Conv2D(3, 2, dilation_rate=2, use_bias=False),
        layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False),
        layers.Dense(4, use_bias=False),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_connections_are_those_of_the_layer(layer):
    model = keras.Sequential([keras.Input((7, 6, 2)), layer])
    model.set_weights([np.ones(w.shape, "float32") for w in model.get_weights()])
    nodes = ann2snn._nodes(model)
    units = np.eye(7 * 6 * 2, dtype="float32").reshape(-1, 7, 6, 2)
    reached = model.predict(units, verbose=0).reshape(84, -1).sum(-1)
    assert_close(ann2snn._connections(nodes)[nodes[0]].reshape(-1), reached, 1e-6)


def test_connections_pass_through_pooling():
    inputs = keras.Input((4, 4, 2))
    x = layers.AveragePooling2D(3, strides=1)(inputs)
    model = keras.Model(inputs, layers.Dense(5)(layers.Flatten()(x)))
    nodes = ann2snn._nodes(model)
    windows = np.outer([1, 2, 2, 1], [1, 2, 2, 1])[..., None] * np.ones(2)
    assert_close(ann2snn._connections(nodes)[nodes[0]], 5 * windows, 0)


@pytest.mark.parametrize(
    "layer, message",
    [
        (layers.Dense(3, activation="tanh"), "activation 'tanh'"),
        (layers.LSTM(3), r"\(LSTM\) cannot be converted"),
        (layers.ReLU(6.0), "max_value"),
        (layers.Softmax(), "softmax inside"),
        (layers.Conv1D(4, 1, groups=2), r"\(Conv1D\) cannot be converted"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_what_cannot_spike_is_refused_by_name(layer, message):
    inputs = keras.Input((5, 4))
    y = layer(inputs)
    model = keras.Model(inputs, layers.Dense(2)(y))
    with pytest.raises(ValueError, match=message) as error:
        convert(model, np.zeros((1, 5, 4), "float32"))
    assert layer.name in str(error.value)
    assert "\n" not in str(error.value)


def test_other_models_and_options_are_refused():
    model, x = one_layer()
    with pytest.raises(ValueError, match="mode must be one of"):
        convert(model, x, mode="both")
    with pytest.raises(ValueError, match="percentile must be > 0 and <= 100"):
        convert(model, x, percentile=0.0)
    with pytest.raises(TypeError, match="num_timesteps must be int"):
        convert(model, x, num_timesteps=1.5)
    inputs = keras.Input((3,)), keras.Input((3,))
    with pytest.raises(ValueError, match="2 inputs and 1 outputs"):
        convert(keras.Model(inputs, layers.Add()(inputs)), x)
    with pytest.raises(ValueError, match="built sequential"):
        convert(keras.Sequential([layers.Dense(3)]), x)
    quantized = keras.Sequential([keras.Input((3,)), layers.Dense(3)])
    quantized.quantize("int8")
    with pytest.raises(ValueError, match="before quantising"):
        convert(quantized, x[:, :3])


def test_network_before_conversion_is_a_chain_of_rectifiers():
    model, x = small_mlp(), rng.normal(size=(3, 4)).astype("float32")

    def chain(x):
        h, weights = x.astype("float64"), model.get_weights()
        for kernel, bias in zip(weights[:4:2], weights[1:4:2], strict=True):
            h = np.maximum(h @ kernel + bias, 0)
        return h @ weights[4] + weights[5]

    assert_close(model(x), chain(x), 1e-5)
    _, by_input = gradients(model, x, lambda y: keras.ops.sum(keras.ops.square(y)))
    expected = numerical_gradient(lambda x: np.square(chain(x)).sum(), x)
    assert_close(by_input, expected, 1e-4)


def test_published_sizes():
    model = keras_edifice.build("ann2snn", input_size=784, output_size=10)
    assert model.count_params() == 235_146
