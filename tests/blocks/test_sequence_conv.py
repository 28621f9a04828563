import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.blocks.sequence_conv import SequenceConv
from tests.support.close import assert_close, to_numpy
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake

rng = np.random.default_rng(0)
PADDINGS = ["causal", "same", "valid"]


def built(kernel_size=3, padding="causal", channels=3, **options):
    keras.utils.set_random_seed(0)
    layer = SequenceConv(5, kernel_size, padding=padding, **options)
    layer.build((None, None, channels))
    return shake(layer)


def reference(x, kernel, bias, padding="causal", strides=1, dilation=1):
    """The equation of the module, a loop in float64."""
    x, taps = np.asarray(x, "float64"), len(kernel)
    kept = (taps - 1) * dilation
    before = {"causal": kept, "same": kept // 2, "valid": 0}[padding]
    places = range(0, x.shape[1] - (kept if padding == "valid" else 0), strides)
    y = np.zeros((len(x), len(places), kernel.shape[-1])) + bias
    for t, place in enumerate(places):
        for j in range(taps):
            at = place + j * dilation - before
            if 0 <= at < x.shape[1]:
                y[:, t] += x[:, at] @ kernel[j]
    return y


def inputs(length=11, channels=3):
    return rng.normal(size=(2, length, channels)).astype("float32")


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    ("kernel_size", "strides", "dilation"),
    [(1, 1, 1), (2, 1, 3), (3, 2, 1), (4, 1, 1), (4, 3, 1), (3, 1, 2)],
)
def test_output_is_the_equation(padding, kernel_size, strides, dilation):
    layer = built(kernel_size, padding, strides=strides, dilation_rate=dilation)
    for length in (10, 11):
        x = inputs(length)
        weights = map(to_numpy, layer.weights)
        expected = reference(x, *weights, padding, strides, dilation)
        assert_close(layer(x), expected)
        assert layer.compute_output_shape(x.shape) == expected.shape


def test_gradient_is_that_of_the_equation():
    layer, x = built(dilation_rate=2), inputs(6)
    by_weight, by_input = gradients(layer, x, lambda y: ops.sum(ops.square(y)))
    kernel, bias = map(to_numpy, layer.weights)

    def value(x=x, kernel=kernel, bias=bias):
        return np.square(reference(x, kernel, bias, dilation=2)).sum()

    assert_close(by_input, numerical_gradient(value, x), 1e-4)
    expected = numerical_gradient(lambda z: value(kernel=z), kernel)
    assert_close(by_weight[0], expected, 1e-4)
    expected = numerical_gradient(lambda z: value(bias=z), bias)
    assert_close(by_weight[1], expected, 1e-4)


def test_odd_kernels_with_strides_pad_alike_on_both_sides():
    x = inputs(12)
    mirrored = built(3, "same", strides=2, use_bias=False)
    kernel = to_numpy(mirrored.weights[0])
    y = to_numpy(mirrored(x[:, :11]))
    mirrored.set_weights([kernel[::-1]])
    assert_close(to_numpy(mirrored(x[:, 10::-1]))[:, ::-1], y, 1e-6)


def test_future_steps_do_not_change_the_past():
    layer, x = built(dilation_rate=2), inputs()
    changed = x.copy()
    changed[:, 6:] += 1.0
    before, after = to_numpy(layer(x)), to_numpy(layer(changed))
    assert_close(after[:, :6], before[:, :6], 0)
    assert np.all(np.any(after[:, 6:] != before[:, 6:], axis=-1))


@pytest.mark.parametrize(("kernel_size", "dilation"), [(1, 1), (3, 1), (3, 4), (2, 5)])
def test_step_by_step_is_the_call(kernel_size, dilation):
    layer, x = built(kernel_size, dilation_rate=dilation), inputs()
    state, outputs = layer.initial_state(2), []
    assert tuple(state.shape) == (2, (kernel_size - 1) * dilation, 3)
    for t in range(x.shape[1]):
        y, state = layer.step(x[:, t], state)
        outputs.append(y)
    y, last = layer(x, return_state=True)
    assert_close(ops.stack(outputs, axis=1), y, 1e-6)
    assert_close(state, last, 0)


@pytest.mark.parametrize("cut", [1, 4, 8])
def test_segments_with_the_carried_state_are_one_pass(cut):
    layer, x = built(dilation_rate=3), inputs()
    first, state = layer(x[:, :cut], return_state=True)
    second, _ = layer(x[:, cut:], initial_state=state, return_state=True)
    assert_close(ops.concatenate([first, second], axis=1), layer(x), 1e-6)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("length", [5, 8])
def test_padding_at_the_end_changes_nothing(padding, strides, length):
    layer, x = built(3, padding, strides=strides), inputs()
    mask = np.repeat(np.arange(11)[None] < length, 2, axis=0)
    mask = ops.convert_to_tensor(mask)
    short = to_numpy(layer(x[:, :length]))
    kept = to_numpy(layer.compute_mask(x, mask)).astype("bool")
    y = to_numpy(layer(x, mask=mask))
    assert kept.shape == y.shape[:2]
    assert kept.sum(1).tolist() == 2 * [short.shape[1]]
    assert_close(y[kept], short.reshape(-1, 5), 1e-6)


@pytest.mark.parametrize("padding", ["causal", "same"])
def test_padding_at_the_beginning_changes_nothing(padding):
    layer, x = built(3, padding), inputs()
    mask = ops.convert_to_tensor(np.repeat(np.arange(11)[None] >= 4, 2, axis=0))
    assert_close(layer(x, mask=mask)[:, 4:], layer(x[:, 4:]), 1e-6)


def test_without_a_mask_there_is_none_after_it():
    assert built().compute_mask(inputs(), None) is None


def test_state_of_a_padded_sequence_is_refused():
    mask = ops.convert_to_tensor(np.ones((2, 11), "bool"))
    with pytest.raises(ValueError, match="received a mask and return_state=True"):
        built()(inputs(), mask=mask, return_state=True)


@pytest.mark.parametrize(
    "options", [dict(padding="same"), dict(padding="valid"), dict(strides=2)]
)
def test_what_cannot_run_step_by_step_says_so(options):
    layer = built(name="conv", **options)
    with pytest.raises(ValueError, match="conv cannot run step by step with padding="):
        layer.initial_state(2)


def test_half_precision_streams():
    layer = built(dtype="mixed_bfloat16")
    y, state = layer.step(inputs(1)[:, 0], layer.initial_state(2))
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    assert keras.backend.standardize_dtype(state.dtype) == "bfloat16"


def test_activation_comes_last_and_config_keeps_the_arguments():
    layer = SequenceConv(2, 3, 2, "same", activation="relu", use_bias=False)
    config = SequenceConv.from_config(layer.get_config()).get_config()
    kept = ("filters", "kernel_size", "strides", "padding", "activation", "use_bias")
    assert [config[name] for name in kept] == [2, (3,), (2,), "same", "relu", False]
    assert to_numpy(layer(inputs())).min() == 0


def test_channels_are_last_whatever_images_have():
    keras.config.set_image_data_format("channels_first")
    try:
        assert tuple(built()(inputs()).shape) == (2, 11, 5)
    finally:
        keras.config.set_image_data_format("channels_last")
