import keras
import numpy as np
import pytest

import keras_edifice
from keras_edifice.neuromorphic.snn import (
    LeakyIntegrator,
    LIFSpike,
    SpikeDecoding,
    SpikeEncoding,
)
from tests.support.close import assert_close, difference, to_numpy
from tests.support.gradients import gradients
from tests.support.shaking import shake

rng = np.random.default_rng(0)

RESETS = ["subtract", "zero", "none"]


def currents(units=4, steps=9, batch=3):
    return rng.normal(0.3, 0.6, size=(batch, steps, units)).astype("float32")


def lif(inputs, beta=0.9, theta=1.0, reset="subtract", delay=True, feedback=None):
    """The equation of the module in float64: (spikes, membranes)."""
    inputs = np.asarray(inputs, "float64")
    u = s = np.zeros_like(inputs[:, 0])
    spikes, membranes = [], []

    def after(s, u):
        return {"subtract": u - s * theta, "zero": u * (1 - s), "none": u}[reset]

    for t in range(inputs.shape[1]):
        i = inputs[:, t] + (0 if feedback is None else s @ feedback)
        if delay:
            kept = beta * u - s * theta if reset == "subtract" else beta * after(s, u)
            u = kept + i
            s = (u > theta).astype("float64")
        else:
            u = beta * u + i
            s = (u > theta).astype("float64")
            u = after(s, u)
        spikes.append(s)
        membranes.append(u)
    return np.stack(spikes, 1), np.stack(membranes, 1)


def lif_gradient(inputs, weights, beta, theta, reset, delay, detach):
    """d sum(weights * spikes) / d inputs by hand, atan surrogate of slope 2."""
    spikes, membranes = lif(inputs, beta, theta, reset, delay)
    x = np.asarray(inputs, "float64")
    if delay:
        before = membranes
    else:  # the membrane at the moment of firing
        kept = np.concatenate([np.zeros_like(x[:, :1]), membranes[:, :-1]], 1)
        before = beta * kept + x
    slope = 1 / (1 + (np.pi * (before - theta)) ** 2)
    by_input, by_u = np.zeros_like(x), np.zeros_like(x[:, 0])
    by_s = np.zeros_like(by_u)  # through the reset of the next step
    through = 0.0 if detach else 1.0
    for t in reversed(range(x.shape[1])):
        if delay:
            at_u = by_u + (weights[:, t] + by_s) * slope[:, t]
            s = spikes[:, t - 1] if t else np.zeros_like(by_u)
            u = membranes[:, t - 1] if t else np.zeros_like(by_u)
            keep = beta * (1 - s) if reset == "zero" else beta
            loss_s = {"subtract": -theta, "zero": -beta * u, "none": 0.0}[reset]
            by_u, by_s = keep * at_u, through * loss_s * at_u
        else:
            s, v = spikes[:, t], before[:, t]
            keep = 1 - s if reset == "zero" else 1.0
            loss_s = {"subtract": -theta, "zero": -v, "none": 0.0}[reset]
            at_s = weights[:, t] + through * loss_s * by_u
            at_u = keep * by_u + at_s * slope[:, t]
            by_u = beta * at_u
        by_input[:, t] = at_u
    return by_input


@pytest.mark.parametrize("delay", [True, False])
@pytest.mark.parametrize("reset", RESETS)
def test_layer_is_the_equation(reset, delay):
    x = currents()
    layer = LIFSpike(reset=reset, reset_delay=delay, return_membranes=True)
    spikes, membranes = layer(x)
    expected = lif(x, reset=reset, delay=delay)
    assert expected[0].any()
    assert_close(spikes, expected[0], 0)
    assert_close(membranes, expected[1])


def test_recurrent_spikes_come_back_one_step_later():
    keras.utils.set_random_seed(0)
    x = currents()
    layer = LIFSpike(recurrent=True, return_membranes=True)
    layer.build(x.shape)
    shake(layer, 1.0)
    spikes, membranes = layer(x)
    expected = lif(x, feedback=layer.feedback.kernel.numpy().astype("float64"))
    assert difference(lif(x)[1], expected[1]) > 0.1
    assert_close(spikes, expected[0], 0)
    assert_close(membranes, expected[1])


def test_spikes_are_zero_or_one():
    model = keras_edifice.build(
        "snn",
        input_size=3,
        output_size=2,
        hidden_sizes=[16, 8],
        decoding="rate",
        return_spikes=True,
    )
    outputs = model.predict(rng.normal(size=(5, 3)).astype("float32"), verbose=0)
    for i, size in enumerate([16, 8, 2]):
        spikes = outputs[f"spikes_{i}"]
        assert spikes.shape == outputs[f"membranes_{i}"].shape == (5, 25, size)
        assert set(np.unique(spikes)) == {0.0, 1.0}


def test_constant_current_fires_as_published():
    x = np.full((1, 8, 1), 0.4, "float32")
    spikes, membranes = LIFSpike(beta=0.9, return_membranes=True)(x)
    assert np.array_equal(to_numpy(spikes)[0, :, 0], [0, 0, 1, 0, 0, 1, 0, 0])
    assert_close(membranes[0, :4, 0], [0.4, 0.76, 1.084, 0.3756])


def test_after_a_spike_zero_reset_leaves_the_current_alone():
    x = currents(steps=20)
    spikes, membranes = LIFSpike(reset="zero", return_membranes=True)(x)
    fired = to_numpy(spikes)[:, :-1] == 1
    assert fired.any()
    assert_close(to_numpy(membranes)[:, 1:][fired], x[:, 1:][fired], 1e-6)


def test_without_beta_there_is_no_memory():
    x = currents()
    layer = LIFSpike(beta=0.0, reset="zero", return_membranes=True)
    spikes, membranes = layer(x)
    assert_close(membranes, x, 0)
    assert_close(spikes, x > 1.0, 0)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("delay", [True, False])
@pytest.mark.parametrize("reset", RESETS)
def test_gradient_is_that_of_the_surrogate(reset, delay, detach):
    x = currents()
    weights = rng.normal(size=x.shape).astype("float32")
    layer = LIFSpike(beta=0.8, reset=reset, reset_delay=delay, detach_reset=detach)
    layer.build(x.shape)
    _, by_input = gradients(
        layer, x, lambda s: keras.ops.sum(keras.ops.multiply(s, weights))
    )
    expected = lif_gradient(x, weights, 0.8, 1.0, reset, delay, detach)
    assert_close(by_input, expected, 1e-4)


def test_the_future_does_not_change_the_past_and_the_past_does():
    layer, x = LIFSpike(return_membranes=True), currents()
    changed = x.copy()
    changed[:, 5] += 2.0
    before, after = layer(x)[1], layer(changed)[1]
    assert_close(after[:, :5], before[:, :5], 0)
    assert difference(after[:, 6:], before[:, 6:]) > 0.1


@pytest.mark.parametrize("recurrent", [True, False])
@pytest.mark.parametrize("layer_class", [LIFSpike, LeakyIntegrator])
def test_steps_are_the_scan(layer_class, recurrent):
    options = dict(recurrent=recurrent) if layer_class is LIFSpike else {}
    layer, x = layer_class(beta=0.8, learn_beta=True, **options), currents()
    scanned, state = layer(x), layer.initial_state(3)
    for t in range(x.shape[1]):
        y, state = layer.step(keras.ops.convert_to_tensor(x[:, t]), state)
        assert_close(y, scanned[:, t], 1e-6)


def test_a_scan_goes_on_from_a_state():
    layer, x = LIFSpike(), currents()
    scanned, state = layer(x), layer.initial_state(3)
    for t in range(4):
        _, state = layer.step(keras.ops.convert_to_tensor(x[:, t]), state)
    assert_close(layer(x[:, 4:], initial_state=state), scanned[:, 4:], 0)


def test_reversed_time_gives_another_output():
    layer, x = LIFSpike(), currents(steps=20)
    backwards = to_numpy(layer(x[:, ::-1]))[:, ::-1]
    assert difference(layer(x), backwards) == 1.0


def test_read_out_leaks_and_never_spikes():
    x = currents()
    assert_close(LeakyIntegrator(0.7)(x), lif(x, 0.7, reset="none")[1])


def whole(model, x, sizes, beta):
    """The network with a summed membrane, in float64."""
    weights = iter(np.asarray(w, "float64") for w in model.get_weights())
    s = np.repeat(np.asarray(x, "float64")[:, None], 25, axis=1)
    for _ in sizes[:-1]:
        s, _ = lif(s @ next(weights) + next(weights), beta)
    return lif(s @ next(weights) + next(weights), beta, reset="none")[1].mean(1)


def test_network_is_its_layers_in_sequence():
    keras.utils.set_random_seed(0)
    model = shake(
        keras_edifice.build("snn", input_size=3, output_size=4, hidden_sizes=[8, 6])
    )
    x = rng.normal(size=(3, 3)).astype("float32")
    assert_close(model(x), whole(model, x, [8, 6, 4], np.exp(-0.5)), 1e-4)


def test_spike_trains_are_taken_as_they_are():
    options = dict(input_size=3, output_size=4, hidden_sizes=[8], num_timesteps=7)
    constant = shake(keras_edifice.build("snn", **options))
    trains = keras_edifice.build("snn", encoding=None, **options)
    trains.set_weights(constant.get_weights())
    x = rng.normal(size=(2, 3)).astype("float32")
    assert trains.input.shape == (None, 7, 3)
    assert_close(trains(np.repeat(x[:, None], 7, axis=1)), constant(x), 1e-5)


def test_learned_beta_and_threshold_move():
    model = keras_edifice.build(
        "snn",
        input_size=3,
        output_size=2,
        hidden_sizes=[8],
        tau=3.0,
        learn_beta=True,
        learn_threshold=True,
    )
    layer = model.get_layer("spikes_0")
    assert_close(layer.decay, np.exp(-1 / 3), 1e-6)
    x = rng.normal(size=(16, 3)).astype("float32")
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(x, rng.normal(size=(16, 2)), epochs=2, verbose=0)
    assert abs(to_numpy(layer.decay) - np.exp(-1 / 3)) > 1e-6
    assert abs(to_numpy(layer.level) - 1.0) > 1e-6


def test_beta_stays_between_zero_and_one():
    layer, x = LIFSpike(learn_beta=True, return_membranes=True), currents()
    layer.build(x.shape)
    layer.decay.assign(1.7)
    assert_close(layer(x)[1], lif(x, 1.0)[1])
    layer.decay.assign(-0.3)
    assert_close(layer(x)[1], lif(x, 0.0)[1])


def test_rate_encoding_draws_with_the_inputs_as_rates():
    x = np.tile(np.array([[-1.0, 0.0, 0.2, 0.7, 1.0, 3.0]], "float32"), (4, 1))
    layer = SpikeEncoding("rate", 1000, seed=0)
    spikes = to_numpy(layer(x))
    assert set(np.unique(spikes)) == {0.0, 1.0}
    rates = spikes.mean((0, 1))
    # Four standard deviations of 4000 draws.
    assert_close(rates, [0, 0, 0.2, 0.7, 1, 1], 0.03)
    assert difference(layer(x), spikes) == 1.0
    again = SpikeEncoding("rate", 1000, seed=0)(x)
    assert_close(again, spikes, 0)


def test_rate_encoding_gives_the_gradient_of_the_mean():
    layer, x = SpikeEncoding("rate", 6, seed=0), np.array([[0.2, 0.7]], "float32")
    layer.build(x.shape)
    assert_close(gradients(layer, x, keras.ops.sum)[1], [[6.0, 6.0]])


@pytest.mark.parametrize("encoding", ["latency", "linear_latency"])
def test_latency_spikes_once_and_sooner_for_more(encoding):
    x = np.array([[0.0, 0.0101, 0.02, 0.5, 1.0]], "float32")
    spikes = to_numpy(SpikeEncoding(encoding, 25)(x))
    assert_close(spikes.sum(1), np.ones((1, 5)), 0)
    times = spikes[0].argmax(0)
    assert times[0] == 24
    assert times[4] == 0
    assert (np.diff(times) <= 0).all()
    if encoding == "linear_latency":
        assert_close(times, [24, 24, 24, 12, 0], 0)
    else:
        t = np.log(0.02 / 0.01) / np.log(0.0100001 / 1e-7) * 24
        assert times[2] == round(t)


@pytest.mark.parametrize(
    "decoding, expected",
    [
        ("rate", [2 / 5, 0.0, 1 / 5]),
        ("membrane", [2 / 5, 0.0, 1 / 5]),
        ("last_membrane", [1.0, 0.0, 0.0]),
        ("max_membrane", [1.0, 0.0, 1.0]),
        ("first_spike", [2.0, 5.0, 0.0]),
    ],
)
def test_decoding(decoding, expected):
    x = np.array([[0, 0, 1], [0, 0, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0]], "float32")
    assert_close(SpikeDecoding(decoding)(x[None]), [expected])


def test_first_spike_has_the_gradient_of_its_product():
    x = np.array([[0.0, 0.0, 1.0, 0.0, 1.0]], "float32")[..., None]
    layer = SpikeDecoding("first_spike")
    layer.build(x.shape)
    # Sum over t of the product of 1 - S up to t, differentiated by each S in turn.
    expected = [-2.0, -1.0, -2.0, 0.0, 0.0]
    assert_close(gradients(layer, x, keras.ops.sum)[1][0, :, 0], expected)


@pytest.mark.parametrize(
    "options",
    [
        dict(decoding="first_spike"),
        dict(decoding="rate", reset="zero", surrogate="sigmoid"),
        dict(decoding="max_membrane", surrogate="fast_sigmoid", recurrent=True),
        dict(encoding="latency", decoding="last_membrane", reset_delay=False),
        dict(encoding="rate", seed=1, learn_threshold=True, detach_reset=False),
    ],
)
def test_options_train_and_survive_saving(options, tmp_path):
    model = keras_edifice.build(
        "snn", input_size=3, output_size=2, hidden_sizes=[8], num_timesteps=5, **options
    )
    x = rng.uniform(size=(16, 3)).astype("float32")
    model.compile(keras.optimizers.Adam(1e-2), "mse", run_eagerly=False)
    history = model.fit(x, rng.normal(size=(16, 2)), epochs=2, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for layer, other in zip(model.layers, loaded.layers, strict=True):
        assert layer.get_config() == other.get_config()
    if options.get("encoding") != "rate":
        assert_close(loaded(x), model(x), 1e-6)


def test_recurrent_network_exports_and_survives_int8(tmp_path):
    keras.utils.set_random_seed(0)
    model = keras_edifice.build(
        "snn",
        input_size=3,
        output_size=2,
        hidden_sizes=[8],
        num_timesteps=5,
        encoding="linear_latency",
        decoding="first_spike",
        recurrent=True,
    )
    assert model.export(tmp_path / "model.onnx", "onnx") < 1e-4
    x = rng.uniform(size=(6, 3)).astype("float32")
    model.quantize("int8")
    assert model.get_layer("spikes_0").feedback.quantization_mode == "int8"
    expected = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_close(loaded.predict(x, verbose=0), expected, 1e-6)


def test_hidden_neurons_fire_from_the_start():
    keras.utils.set_random_seed(0)
    for tau in (1.0, 2.0, 5.0):
        model = keras_edifice.build(
            "snn",
            input_size=10,
            output_size=3,
            hidden_sizes=[64, 64],
            tau=tau,
            return_spikes=True,
        )
        outputs = model.predict(rng.normal(size=(32, 10)).astype("float32"), verbose=0)
        for i in (0, 1):
            rate = outputs[f"spikes_{i}"].mean()
            assert 0.02 < rate < 0.6, f"tau {tau}, layer {i}: {rate}"


def test_a_loss_on_the_spikes_quietens_a_layer():
    model = keras_edifice.build(
        "snn", input_size=3, output_size=2, hidden_sizes=[16], return_spikes=True
    )
    x = rng.normal(size=(32, 3)).astype("float32")
    rate = model.predict(x, verbose=0)["spikes_0"].mean()
    model.compile(
        keras.optimizers.Adam(0.02),
        {k: "mse" if k == "spikes_0" else None for k in model.output},
    )
    model.fit(x, {"spikes_0": np.zeros((32, 25, 16))}, epochs=20, verbose=0)
    assert model.predict(x, verbose=0)["spikes_0"].mean() < 0.5 * rate


def test_five_classes_of_points_are_learned():
    keras.utils.set_random_seed(0)
    points, labels = five_classes()
    model = keras_edifice.classifier(
        "snn", 5, input_size=2, output_size=16, hidden_sizes=[64, 32], num_timesteps=10
    )
    model.compile(
        keras.optimizers.Adam(1e-2),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    model.fit(points[:800], labels[:800], batch_size=32, epochs=4, verbose=0)
    assert model.evaluate(points[800:], labels[800:], verbose=0)[1] > 0.9


def five_classes(size=200):
    """Two rings and three clusters, shuffled."""
    random = np.random.default_rng(0)
    angles = random.uniform(0, 2 * np.pi, (2, size))
    circles = np.stack([np.cos(angles), np.sin(angles)], -1)
    centres = np.array([[-3, 2.5], [3, 2.5], [0, -3.5]])
    parts = [
        circles[0],
        2.5 * circles[1],
        *np.repeat(centres[:, None], size, axis=1),
    ]
    noise = [0.2, 0.2, 0.4, 0.4, 0.5]
    points = [
        p + random.normal(0, s, p.shape) for p, s in zip(parts, noise, strict=True)
    ]
    order = random.permutation(5 * size)
    labels = np.repeat(np.arange(5), size)
    return np.concatenate(points)[order].astype("float32"), labels[order]


def test_size_is_that_of_the_dense_stack():
    model = keras_edifice.build("snn", input_size=784, output_size=10)
    assert model.count_params() == 784 * 256 + 256 + 256 * 128 + 128 + 128 * 10 + 10
    assert model.count_params() == 235_146


def test_onnx_refuses_what_is_drawn(tmp_path):
    model = keras_edifice.build(
        "snn", input_size=3, output_size=2, hidden_sizes=[4], encoding="rate"
    )
    with pytest.raises(ValueError):
        model.export(tmp_path / "model.onnx", "onnx")
    assert not list(tmp_path.iterdir())
