import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.blocks.causal_conv import CausalConv
from tests.support.close import assert_close
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake

rng = np.random.default_rng(0)


def built(kernel_size=4, channels=3, **options):
    keras.utils.set_random_seed(0)
    layer = CausalConv(kernel_size, **options)
    layer.build((None, None, channels))
    return shake(layer)


def reference(x, kernel, bias):
    """The equation of the module with SiLU, a loop in float64."""
    x, kernel = np.asarray(x, "float64"), np.asarray(kernel, "float64")
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        for j in range(len(kernel)):
            if t - len(kernel) + 1 + j >= 0:
                y[:, t] += kernel[j] * x[:, t - len(kernel) + 1 + j]
    y = y + np.asarray(bias, "float64")
    return y / (1 + np.exp(-y))


def inputs(length, channels=3):
    return rng.normal(size=(2, length, channels)).astype("float32")


@pytest.mark.parametrize("kernel_size", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_output_is_the_equation(kernel_size, length):
    layer, x = built(kernel_size, activation="silu"), inputs(length)
    assert_close(layer(x), reference(x, *layer.get_weights()))


def test_gradient_is_that_of_the_equation():
    layer, x = built(activation="silu"), inputs(5)
    _, by_input = gradients(layer, x, lambda y: ops.sum(ops.square(y)))
    weights = layer.get_weights()
    expected = numerical_gradient(lambda x: np.square(reference(x, *weights)).sum(), x)
    assert_close(by_input, expected, 1e-4)


def test_future_steps_do_not_change_the_past():
    layer, x = built(), inputs(9)
    changed = x.copy()
    changed[:, 5:] += 1.0
    assert_close(layer(changed)[:, :5], layer(x)[:, :5], 0)


@pytest.mark.parametrize("kernel_size", [1, 4])
def test_step_by_step_is_the_call(kernel_size):
    layer, x = built(kernel_size), inputs(9)
    state, outputs = layer.initial_state(2), []
    for t in range(9):
        y, state = layer.step(x[:, t], state)
        outputs.append(y)
    y, last = layer(x, return_state=True)
    assert_close(ops.stack(outputs, axis=1), y, 1e-6)
    assert_close(state, last, 0)


@pytest.mark.parametrize("kernel_size", [1, 4])
@pytest.mark.parametrize("cut", [1, 2, 6])
def test_segments_with_the_carried_state_are_one_pass(kernel_size, cut):
    layer, x = built(kernel_size), inputs(9)
    first, state = layer(x[:, :cut], return_state=True)
    second = layer(x[:, cut:], initial_state=state)
    assert_close(ops.concatenate([first, second], axis=1), layer(x), 1e-6)


@pytest.mark.parametrize("valid", [1, 2, 6])
def test_padding_on_the_right_leaves_outputs_and_state(valid):
    layer, x = built(), inputs(9)
    before = rng.normal(size=(2, 3, 3)).astype("float32")
    mask = np.arange(9)[None].repeat(2, 0) < valid
    y, state = layer(x, mask=mask, initial_state=before, return_state=True)
    short, expected = layer(x[:, :valid], initial_state=before, return_state=True)
    assert_close(y[:, :valid], short, 1e-6)
    assert_close(state, expected, 0)


def test_padding_on_the_left_counts_as_the_beginning():
    layer, x = built(), inputs(9)
    mask = np.arange(9)[None].repeat(2, 0) >= 4
    y, state = layer(x, mask=mask, return_state=True)
    short, expected = layer(x[:, 4:], return_state=True)
    assert_close(y[:, 4:], short, 1e-6)
    assert_close(state, expected, 0)


def test_half_precision_streams():
    layer = built(dtype="mixed_bfloat16")
    y, state = layer.step(inputs(1)[:, 0], layer.initial_state(2))
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    assert keras.backend.standardize_dtype(state.dtype) == "bfloat16"


def test_config_keeps_the_arguments():
    layer = CausalConv(3, use_bias=False, activation="silu")
    again = CausalConv.from_config(layer.get_config())
    assert (again.kernel_size, again.use_bias, again.activation) == (3, False, "silu")
    again.build((None, None, 2))
    assert len(again.weights) == 1


@pytest.mark.parametrize("length", [1, 5, 9])
def test_dilated_taps_lie_apart(length):
    layer, x = built(3, dilation=2), inputs(length)
    kernel, bias = (z.astype("float64") for z in layer.get_weights())
    seen = np.pad(x.astype("float64"), [(0, 0), (4, 0), (0, 0)])
    taps = [seen[:, 2 * j : 2 * j + length] for j in range(3)]
    y, last = layer(x, return_state=True)
    assert_close(y, sum(k * tap for k, tap in zip(kernel, taps, strict=True)) + bias)
    assert_close(last, seen[:, -4:], 0)
    state, outputs = layer.initial_state(2), []
    for t in range(length):
        y_t, state = layer.step(x[:, t], state)
        outputs.append(y_t)
    assert_close(ops.stack(outputs, axis=1), y, 1e-6)
