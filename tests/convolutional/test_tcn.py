import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.convolutional.tcn import WeightNormConv
from tests.support.close import assert_close, difference, to_numpy
from tests.support.compiled import compiled
from tests.support.counting import count_weights
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake
from tests.support.streaming import stream

rng = np.random.default_rng(0)
SMALL = dict(embed_size=3, hidden_size=4, num_layers=3, return_sequences=True)


def model(**options):
    """With moving statistics that matter, too."""
    keras.utils.set_random_seed(0)
    built = shake(keras_edifice.build("tcn", **{**SMALL, **options}), 0.1)
    for weight in built.non_trainable_variables:
        if weight.name.startswith("moving_"):
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    return built


def layer(filters=5, **options):
    keras.utils.set_random_seed(0)
    built = WeightNormConv(filters, 3, padding="causal", dilation_rate=2, **options)
    built.build((None, None, 3))
    return shake(built)


def inputs(length=11, examples=2):
    return rng.normal(size=(examples, length, 3)).astype("float32")


def normed(v, gain):
    """Eq. 2 of Salimans & Kingma."""
    return np.stack(
        [g * w / np.sqrt((w**2).sum()) for w, g in zip(v.T, gain, strict=True)]
    ).T


def convolve(x, kernel, dilation):
    """Each output by the steps that it sees, in float64."""
    y = np.zeros((*x.shape[:2], kernel.shape[-1]))
    for t in range(x.shape[1]):
        for j, w in enumerate(kernel):
            at = t - (len(kernel) - 1 - j) * dilation
            if at >= 0:
                y[:, t] += x[:, at] @ w
    return y


def reference(x, model, dilations, norm="weight", changed=None):
    """The equations of the module, with the weights by name, some of them `changed`."""
    w = {v.path: to_numpy(v) for v in model.weights} | (changed or {})
    x = np.asarray(x, "float64")
    for i, dilation in enumerate(dilations):
        y = x
        for name in (f"block_{i}_1", f"block_{i}_2"):
            kernel = w[f"{name}_conv/kernel"]
            if norm == "weight":
                kernel = normed(kernel, w[f"{name}_conv/gain"])
            y = convolve(y, kernel, dilation)
            if norm == "batch":
                y = y - w[f"{name}_norm/moving_mean"]
                y = y / np.sqrt(w[f"{name}_norm/moving_variance"] + 1e-5)
                y = y * w[f"{name}_norm/gamma"] + w[f"{name}_norm/beta"]
            else:
                y = y + w[f"{name}_conv/bias"]
            y = np.maximum(y, 0)
        if f"block_{i}_shortcut/kernel" in w:
            x = x @ w[f"block_{i}_shortcut/kernel"] + w[f"block_{i}_shortcut/bias"]
        x = np.maximum(x + y, 0)
    return x


@pytest.mark.parametrize("norm", ["weight", "batch", None])
@pytest.mark.parametrize(
    ("options", "dilations"),
    [
        (dict(), [1, 2, 4]),
        (dict(hidden_sizes=[3, 5], dilations=[3, 1], kernel_size=2), [3, 1]),
    ],
    ids=["default", "own sizes"],
)
def test_output_is_the_equation(norm, options, dilations):
    built, x = model(norm=norm, **options), inputs(17)
    assert_close(compiled(built)(x), reference(x, built, dilations, norm), 1e-4)


def test_gradient_is_that_of_the_equation():
    built, x = model(num_layers=1), inputs(5)
    by_weight, by_input = gradients(built, x, lambda y: ops.sum(ops.square(y)))

    def value(x, changed=None):
        return np.square(reference(x, built, [1], changed=changed)).sum()

    assert difference(by_input, numerical_gradient(value, x)) < 1e-4
    for variable, gradient in zip(built.trainable_variables, by_weight, strict=True):
        expected = numerical_gradient(
            lambda z, path=variable.path: value(x, {path: z}), to_numpy(variable)
        )
        assert difference(gradient, expected) < 1e-4, variable.path


@pytest.mark.parametrize(
    ("options", "trainable"),
    [
        (dict(variant="pixel_mnist"), 66_910),
        (dict(variant="adding"), 96_001),
        (dict(variant="copy_memory"), 12_530),
        (dict(variant="copy_memory", embed_size=10), 13_230),
        (dict(embed_size=64, hidden_size=128, num_layers=4, kernel_size=3), 379_008),
    ],
)
def test_published_sizes(options, trainable):
    assert count_weights("tcn", **options) == (trainable, 0)


def test_call_of_the_learning_path():
    built = keras_edifice.build("tcn", embed_size=3, hidden_size=8, num_layers=2)
    assert tuple(built(inputs()).shape) == (2, 8)


def test_future_steps_do_not_change_the_past_by_a_bit():
    built, x = model(), inputs(30)
    changed = x.copy()
    changed[:, 13:] += 1.0
    before, after = to_numpy(built(x)), to_numpy(built(changed))
    assert_close(after[:, :13], before[:, :13], 0)
    assert difference(after[:, 13:], before[:, 13:]) > 1e-3


@pytest.mark.parametrize(("kernel_size", "blocks"), [(2, 3), (3, 3), (4, 2)])
def test_an_output_sees_as_many_steps_as_the_formula_says(kernel_size, blocks):
    options = dict(kernel_size=kernel_size, num_layers=blocks, activation="linear")
    built, field = model(**options), 1 + 2 * (kernel_size - 1) * (2**blocks - 1)
    x = inputs(field + 4, examples=1)

    def last(y):
        return ops.sum(y[:, -1])

    _, by_input = gradients(built, x, last)
    seen = np.any(by_input[0] != 0, axis=-1)
    assert seen.tolist() == [False] * 4 + [True] * field


@pytest.mark.parametrize("norm", ["weight", "batch", None])
def test_token_by_token_is_the_whole_sequence(norm):
    built, x = model(norm=norm), inputs(30)
    state = keras_edifice.streaming(built).initial_state(2)
    widths = {"block_0_1": 3}
    assert {k: tuple(v.shape) for k, v in state.items()} == {
        f"block_{i}_{part}_conv_0": (2, 2 * 2**i, widths.get(f"block_{i}_{part}", 4))
        for i in range(3)
        for part in (1, 2)
    }
    assert_close(stream(built, x), built(x))


def test_a_classifier_streams_and_scores_every_step_if_asked():
    every = model(num_classes=5)
    last = model(num_classes=5, return_sequences=False)
    x = inputs(6)
    scores = to_numpy(every(x))
    assert scores.shape == (2, 6, 5)
    assert_close(stream(every, x), scores)
    assert_close(stream(last, x), scores)
    assert_close(last(x), scores[:, -1])


def test_scaled_directions_leave_the_output_as_it_is():
    built, x = layer(), inputs()
    y = to_numpy(built(x))
    v, *others = built.get_weights()
    built.set_weights([v * np.array([3, 0.1, 7, 1, 2], "float32"), *others])
    assert_close(built(x), y)


def test_gains_are_the_lengths_of_the_filters():
    built = layer()
    _, bias, gain = built.get_weights()
    lengths = np.sqrt(np.square(to_numpy(built.kernel)).sum((0, 1)))
    assert_close(lengths, np.abs(gain))
    x = inputs()
    built.set_weights([built.get_weights()[0], 0 * bias, 2 * gain])
    twice = to_numpy(built(x))
    built.set_weights([built.get_weights()[0], 0 * bias, gain])
    assert_close(twice, 2 * to_numpy(built(x)))


def test_a_new_layer_has_the_kernel_of_a_plain_one():
    keras.utils.set_random_seed(0)
    built = WeightNormConv(4, 3)
    built.build((None, None, 2))
    assert_close(built.kernel, built.get_weights()[0], 1e-6)


def test_weights_and_config_survive_saving(tmp_path):
    built, x = model(), inputs()
    built.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for own, other in zip(built.get_weights(), loaded.get_weights(), strict=True):
        assert_close(other, own, 0)
    assert_close(loaded(x), built(x), 0)
    config = WeightNormConv.from_config(layer().get_config()).get_config()
    assert (config["dilation_rate"], config["padding"]) == ((2,), "causal")


def test_weights_start_as_in_the_code_of_the_paper():
    keras.utils.set_random_seed(0)
    built = keras_edifice.build("tcn", embed_size=50, hidden_size=40, num_layers=1)
    w = {v.path: to_numpy(v) for v in built.weights}
    for name, bound in [("block_0_1", 150**-0.5), ("block_0_2", 120**-0.5)]:
        kernel, bias = w[f"{name}_conv/kernel"], w[f"{name}_conv/bias"]
        assert 0.95 * bound < np.abs(kernel).max() <= bound
        assert 0.8 * bound < np.abs(bias).max() <= bound
    shortcut = w["block_0_shortcut/kernel"]
    assert_close(shortcut.std(), 0.01, 1e-3)


def test_shortcuts_are_linear_where_the_width_changes_alone():
    built = model(hidden_sizes=[3, 4, 4, 2])
    named = {z.name for z in built.layers if z.name.endswith("shortcut")}
    assert named == {"block_1_shortcut", "block_3_shortcut"}
    assert built.get_layer("block_1_shortcut").activation is keras.activations.linear


def test_nothing_is_negative_after_the_sum():
    built = model(hidden_sizes=[5, 4])  # a shortcut that may be negative for each
    for i in range(2):
        names = [f"block_{i}_add", f"block_{i}_activation"]
        outputs = [built.get_layer(name).output for name in names]
        parts = compiled(keras.Model(built.input, outputs))
        total, y = map(to_numpy, parts(inputs()))
        assert total.min() < 0
        assert_close(y, np.maximum(total, 0), 0)


def test_weights_are_normalised_activations_or_neither():
    def names(norm):
        weights = model(norm=norm).weights
        return {v.path.split("/")[-1] for v in weights if "block_1_2" in v.path}

    assert names("weight") == {"kernel", "bias", "gain"}
    moving = {"moving_mean", "moving_variance"}
    assert names("batch") == {"kernel", "gamma", "beta"} | moving
    assert names(None) == {"kernel", "bias"}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("norm", ["weight", "batch"])
@pytest.mark.parametrize("pool", ["last", "mean"])
def test_padding_changes_nothing(side, norm, pool):
    built, x = model(norm=norm, pool=pool, return_sequences=False), inputs()
    valid = slice(6) if side == "right" else slice(5, None)
    mask = np.zeros((2, 11), "bool")
    mask[:, valid] = True
    assert_close(built(x, mask=ops.convert_to_tensor(mask)), built(x[:, valid]))


def test_tokens_have_logits_of_the_next_token():
    built = model(embed_size=None, vocab_size=7)
    tokens = rng.integers(0, 7, (2, 9))
    logits = to_numpy(built(tokens))
    assert logits.shape == (2, 9, 7)
    assert_close(stream(built, tokens), logits)
    tied = {w.path for w in built.weights if "embed" in w.path}
    loose = model(embed_size=None, vocab_size=7, tie_embeddings=False)
    assert len(tied) == 1
    assert len({w.path for w in loose.weights if "embed" in w.path}) == 2


def test_tokens_and_classes_exclude_each_other():
    with pytest.raises(ValueError, match="pass vocab_size or num_classes, received"):
        model(embed_size=None, vocab_size=7, num_classes=2)


def test_dilations_must_be_as_many_as_the_blocks():
    with pytest.raises(ValueError, match="dilations must be 3 numbers, one for each"):
        model(dilations=[1, 2])


def test_dropout_follows_every_convolution_in_training_alone():
    built, x = model(dropout=0.5), inputs()
    drops = [z.name for z in built.layers if isinstance(z, keras.layers.Dropout)]
    assert drops == [f"block_{i}_{part}_dropout" for i in range(3) for part in (1, 2)]
    y = to_numpy(built(x))
    assert_close(built(x), y, 0)
    assert np.any(to_numpy(built(x, training=True)) != y)


def test_half_precision_keeps_the_lengths_in_float32():
    half, exact = layer(dtype="mixed_bfloat16"), layer()
    x = inputs()
    assert keras.backend.standardize_dtype(half.kernel.dtype) == "float32"
    y = half(x)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    # bfloat16 keeps 8 bits of the inputs and of the kernel.
    assert difference(ops.cast(y, "float32"), exact(x)) < 0.02
    y_t, state = half.step(x[:, 0], half.initial_state(2))
    assert keras.backend.standardize_dtype(y_t.dtype) == "bfloat16"
    assert keras.backend.standardize_dtype(state.dtype) == "bfloat16"


def test_config_keeps_the_arguments():
    options = dict(hidden_sizes=[3, 5], dilations=[3, 1], norm=None, kernel_size=2)
    built = model(**options)
    again = type(built).from_config(built.get_config())
    assert {name: again.options[name] for name in options} == options
    assert [w.path for w in again.weights] == [w.path for w in built.weights]
