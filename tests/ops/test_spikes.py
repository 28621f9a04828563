import keras
import numpy as np
import pytest

from keras_edifice.ops.spikes import SLOPES, primitive, spike
from tests.support.close import assert_close, to_numpy
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient

x = np.array([-3.0, -0.4, -1e-3, 0.0, 1e-3, 0.2, 5.0], "float32")

every_surrogate = pytest.mark.parametrize("surrogate", list(SLOPES))


class Spikes(keras.layers.Layer):
    def __init__(self, surrogate, slope):
        super().__init__()
        self.surrogate, self.slope, self.built = surrogate, slope, True

    def call(self, x):
        return spike(x, self.surrogate, self.slope)


def slope_of(surrogate, x, k):
    x, sigmoid = np.asarray(x, "float64"), 1 / (1 + np.exp(-k * np.asarray(x)))
    return {
        "atan": k / 2 / (1 + (np.pi * k * x / 2) ** 2),
        "fast_sigmoid": 1 / (1 + k * np.abs(x)) ** 2,
        "sigmoid": k * sigmoid * (1 - sigmoid),
    }[surrogate]


@every_surrogate
def test_forward_is_zero_or_one_and_strict(surrogate):
    assert np.array_equal(to_numpy(spike(x, surrogate)), [0, 0, 0, 0, 1, 1, 1])


@every_surrogate
@pytest.mark.parametrize("slope", [None, 3.0])
def test_gradient_is_the_surrogate(surrogate, slope):
    weights = np.linspace(1.0, 2.0, len(x)).astype("float32")
    _, by_input = gradients(
        Spikes(surrogate, slope),
        x,
        lambda s: keras.ops.sum(keras.ops.multiply(s, weights)),
    )
    expected = slope_of(surrogate, x, SLOPES[surrogate] if slope is None else slope)
    assert_close(by_input, weights * expected)


@every_surrogate
def test_surrogate_is_the_slope_of_its_primitive(surrogate):
    def total(x):
        k, sigmoid = 3.0, 1 / (1 + np.exp(-3.0 * x))
        return {
            "atan": np.arctan(np.pi * k * x / 2) / np.pi,
            "fast_sigmoid": x / (1 + k * np.abs(x)),
            "sigmoid": sigmoid,
        }[surrogate].sum()

    assert_close(numerical_gradient(total, x), slope_of(surrogate, x, 3.0))
    assert_close(keras.ops.sum(primitive(x, surrogate, 3.0)), total(x.astype("f8")))


def test_atan_of_slope_two_is_the_usual_form():
    assert_close(slope_of("atan", x, 2.0), 1 / (1 + (np.pi * x.astype("f8")) ** 2))
