import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.convolutional.conv1d import PairPooling
from tests.support.close import assert_close, difference, to_numpy
from tests.support.compiled import compiled
from tests.support.counting import count_weights
from tests.support.shaking import shake
from tests.support.streaming import stream

rng = np.random.default_rng(0)
SMALL = dict(embed_size=3, hidden_sizes=[4, 5], return_sequences=True)


def model(**options):
    """With moving statistics that matter, too."""
    keras.utils.set_random_seed(0)
    built = shake(keras_edifice.build("conv1d", **{**SMALL, **options}))
    for weight in built.non_trainable_variables:
        if weight.name.startswith("moving_"):
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    return built


def inputs(length=11, examples=2):
    return rng.normal(size=(examples, length, 3)).astype("float32")


def convolve(x, kernel, before, after, strides, dilation):
    x = np.pad(x, [(0, 0), (before, after), (0, 0)])
    last = x.shape[1] - (len(kernel) - 1) * dilation
    taps = [x[:, j * dilation :][:, :last:strides] for j in range(len(kernel))]
    return sum(tap @ w for tap, w in zip(taps, kernel, strict=True))


def normalize(x, w, name, norm):
    if norm == "batch":
        mean, variance, epsilon = (
            w[f"{name}/moving_mean"],
            w[f"{name}/moving_variance"],
            1e-3,
        )
    else:
        mean, variance, epsilon = (
            x.mean(-1, keepdims=True),
            x.var(-1, keepdims=True),
            1e-5,
        )
    x = (x - mean) / np.sqrt(variance + epsilon)
    return x * w[f"{name}/gamma"] + w[f"{name}/beta"]


def reference(
    x, model, padding="same", strides=1, dilation=1, norm="batch", pooling=None
):
    """The equation of the module in float64."""
    w, x = {v.path: to_numpy(v) for v in model.weights}, np.asarray(x, "float64")
    for i in range(2):
        name = f"block_{i}"
        kernel = w[f"{name}_conv/kernel"]
        kept = (len(kernel) - 1) * dilation
        before = {"causal": kept, "same": kept // 2, "valid": 0}[padding]
        after = kept - before if padding == "same" else 0
        x = convolve(x, kernel, before, after, strides, dilation)
        if norm is None:
            x = x + w[f"{name}_conv/bias"]
        else:
            x = normalize(x, w, f"{name}_norm", norm)
        x = np.maximum(x, 0)
        if pooling is not None:
            pairs = x[:, : x.shape[1] // 2 * 2].reshape(len(x), -1, 2, x.shape[-1])
            x = pairs.max(2) if pooling == "max" else pairs.mean(2)
    return x


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(padding="causal", dilation=2),
        dict(padding="valid", strides=2),
        dict(strides=2, norm="layer"),
        dict(norm=None, pooling="max"),
        dict(padding="causal", pooling="avg"),
    ],
    ids=str,
)
def test_output_is_the_equation(options):
    built, x = model(**options, kernel_size=[3, 2]), inputs(15)
    assert_close(compiled(built)(x), reference(x, built, **options), 1e-4)


def test_published_sizes():
    assert count_weights("conv1d", embed_size=64) == (136_064, 896)


def test_bias_is_there_without_a_norm_alone():
    def names(**options):
        return {w.path for w in model(**options).weights if "block_0" in w.path}

    conv, norm = {"block_0_conv/kernel"}, {"block_0_norm/gamma", "block_0_norm/beta"}
    moving = {"block_0_norm/moving_mean", "block_0_norm/moving_variance"}
    assert names() == conv | norm | moving
    assert names(norm="layer") == conv | norm
    assert names(norm=None) == conv | {"block_0_conv/bias"}


@pytest.mark.parametrize("kernel_size", [[3], [3, 3, 3]])
def test_kernels_must_be_as_many_as_the_blocks(kernel_size):
    with pytest.raises(
        ValueError, match="kernel_size must be one number or 2, one for"
    ):
        model(kernel_size=kernel_size)


def test_strides_and_dilation_exclude_each_other():
    with pytest.raises(ValueError, match="received strides=2 and dilation=3"):
        model(strides=2, dilation=3)


def test_shifted_input_gives_the_shifted_output_away_from_the_borders():
    built, x = model(), inputs(20)
    y, shifted = to_numpy(built(x)), to_numpy(built(np.roll(x, 3, axis=1)))
    assert_close(shifted[:, 5:-2], y[:, 2:-5], 1e-6)
    assert difference(shifted[:, :5], np.roll(y, 3, axis=1)[:, :5]) > 1e-3


def test_future_steps_do_not_change_the_past_if_causal():
    x = inputs(20)
    changed = x.copy()
    changed[:, 9:] += 1.0
    for padding, blind in [("causal", True), ("same", False)]:
        built = model(padding=padding)
        before, after = to_numpy(built(x)), to_numpy(built(changed))
        assert np.array_equal(before[:, :9], after[:, :9]) == blind
        assert np.any(before[:, 9:] != after[:, 9:])


@pytest.mark.parametrize("norm", ["batch", "layer", None])
def test_token_by_token_is_the_whole_sequence(norm):
    options = dict(padding="causal", dilation=3, kernel_size=[3, 2], norm=norm)
    built, x = model(**options), inputs(20)
    state = keras_edifice.streaming(built).initial_state(2)
    assert {k: tuple(v.shape[1:]) for k, v in state.items()} == {
        "block_0_conv_0": (6, 3),
        "block_1_conv_0": (3, 4),
    }
    assert_close(stream(built, x), built(x))


def test_a_classifier_of_causal_blocks_streams_the_mean_so_far():
    built, x = model(padding="causal", num_classes=3, return_sequences=False), inputs(6)
    outputs = stream(built, x)
    for t in (1, 5):
        assert_close(outputs[:, t], built.predict(x[:, : t + 1], verbose=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(), "block_0_conv cannot run step by step with padding='same'"),
        (dict(padding="causal", strides=2), "strides=2; build it with 'causal' and 1"),
        (dict(padding="causal", pooling="max"), "block_0_pool .PairPooling. may look"),
    ],
)
def test_what_looks_ahead_or_leaves_steps_out_does_not_stream(options, message):
    with pytest.raises(ValueError, match=message):
        keras_edifice.streaming(model(**options))


def test_without_norm_and_activation_inputs_superpose():
    built = model(norm=None, activation="linear")
    x, y = inputs(), inputs()
    at_zero = to_numpy(built(np.zeros_like(x)))
    expected = to_numpy(built(x)) + 2 * to_numpy(built(y)) - 2 * at_zero
    assert_close(built(x + 2 * y), expected)


def test_kernel_of_one_is_a_dense_layer():
    built, x = model(kernel_size=1, norm=None, hidden_sizes=[4]), inputs()
    dense = keras.layers.Dense(4, activation="relu")
    dense.build(x.shape)
    kernel, bias = built.get_weights()
    dense.set_weights([kernel[0], bias])
    assert_close(built(x), dense(x))


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(padding="valid", pool="last"),
        dict(strides=2),
        dict(pooling="max"),
        dict(padding="causal", pooling="avg", norm="layer", pool="last"),
    ],
    ids=str,
)
def test_padding_at_the_end_changes_nothing(options):
    built, x = model(return_sequences=False, **options), inputs(16)
    mask = ops.convert_to_tensor(np.arange(16)[None] < np.array([[11], [12]]))
    y = compiled(lambda x: built(x, mask=mask))(ops.convert_to_tensor(x))
    for row, length in enumerate((11, 12)):
        short = built.predict(x[row : row + 1, :length], verbose=0)
        assert_close(y[row : row + 1], short)


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_pooling_takes_one_of_each_two_and_leaves_an_odd_last_one_out(pooling):
    layer, summary = PairPooling(pooling), dict(max=np.max, avg=np.mean)[pooling]
    for length in (2, 5):
        x = inputs(length)
        y = to_numpy(layer(x))
        pairs = [summary(x[:, i : i + 2], axis=1) for i in range(0, length - 1, 2)]
        assert_close(y, np.stack(pairs, axis=1), 1e-6)
        assert layer.compute_output_shape(x.shape) == y.shape
    assert PairPooling.from_config(layer.get_config()).pooling == pooling


def test_steps_become_one_vector_by_their_mean_or_the_last():
    x, whole = inputs(), model()
    y = to_numpy(whole(x))
    for pool, expected in [("mean", y.mean(1)), ("last", y[:, -1])]:
        built = model(return_sequences=False, pool=pool)
        built.set_weights(whole.get_weights())
        assert_close(built(x), expected, 1e-6)


def test_classes_have_scores_of_the_mean_or_at_every_step():
    scores = model(num_classes=6, return_sequences=False)(inputs())
    assert tuple(scores.shape) == (2, 6)
    assert_close(to_numpy(scores).sum(-1), np.ones(2))
    every = model(num_classes=6, classifier_activation=None)(inputs())
    assert tuple(every.shape) == (2, 11, 6)


@pytest.mark.parametrize(("activation", "variance"), [("relu", 2), ("tanh", 1)])
def test_kernels_start_as_the_activation_wants_it(activation, variance):
    built = keras_edifice.build(
        "conv1d", embed_size=64, hidden_sizes=[64], activation=activation
    )
    # He: 2 / inputs. Glorot: 2 / (inputs + outputs), which are as many here.
    kernel = to_numpy(built.get_layer("block_0_conv").kernel)
    assert_close(kernel.std(), np.sqrt(variance / (3 * 64)), 2e-2)


def test_dropout_follows_every_activation_in_training_alone():
    built, x = model(dropout=0.5), inputs()
    drops = [z.name for z in built.layers if isinstance(z, keras.layers.Dropout)]
    assert drops == ["block_0_dropout", "block_1_dropout"]
    layers = [z.name for z in built.layers]
    assert layers.index("block_0_dropout") == layers.index("block_0_activation") + 1
    y = to_numpy(built(x))
    assert_close(built(x), y, 0)
    assert np.any(to_numpy(built(x, training=True)) != y)


def test_config_keeps_the_arguments():
    options = dict(kernel_size=[3, 5], padding="causal", dilation=2, norm=None)
    built = model(**options)
    again = type(built).from_config(built.get_config())
    assert {name: again.options[name] for name in options} == options
    assert [w.path for w in again.weights] == [w.path for w in built.weights]
