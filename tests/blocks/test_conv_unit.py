import keras
import numpy as np
import pytest

from keras_edifice.blocks.conv_unit import conv_unit, he_fan_out
from tests.support.close import assert_close, to_numpy
from tests.support.shaking import shake

rng = np.random.default_rng(0)


def unit(*args, **options):
    inputs = keras.Input((None, None, 2))
    model = keras.Model(inputs, conv_unit(inputs, *args, name="unit", **options))
    return shake(model)


def reference(x, weights, strides, relu):
    kernel, gamma, beta, mean, variance = (to_numpy(w) for w in weights)
    k = kernel.shape[0]
    border = (k // 2, k // 2)
    x = np.pad(x.astype("float64"), [(0, 0), border, border, (0, 0)])
    rows, columns = ((n - k) // strides + 1 for n in x.shape[1:3])
    y = np.zeros((x.shape[0], rows, columns, kernel.shape[3]))
    for i in range(rows):
        for j in range(columns):
            window = x[:, i * strides :, j * strides :][:, :k, :k]
            y[:, i, j] = np.einsum("bhwc,hwcd->bd", window, kernel)
    y = (y - mean) / np.sqrt(variance + 1e-5) * gamma + beta
    return np.maximum(y, 0) if relu else y


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
@pytest.mark.parametrize("size", [(8, 8), (9, 6)])
def test_it_is_a_padded_convolution_normalised_and_activated(
    kernel_size, strides, size
):
    model = unit(4, kernel_size, strides)
    x = rng.normal(size=(2, *size, 2)).astype("float32")
    assert_close(model(x), reference(x, model.weights, strides, relu=True))


def test_without_activation_it_is_negative_too():
    model = unit(4, 3, activation=None)
    x = rng.normal(size=(2, 5, 5, 2)).astype("float32")
    expected = reference(x, model.weights, 1, relu=False)
    assert_close(model(x), expected)
    assert expected.min() < 0


def test_convolution_has_no_bias():
    names = [w.name for w in unit(4, 3).weights]
    assert names == ["kernel", "gamma", "beta", "moving_mean", "moving_variance"]


def test_gamma_can_start_at_zero():
    inputs = keras.Input((4, 4, 2))
    model = keras.Model(inputs, conv_unit(inputs, 3, 3, gamma="zeros", name="unit"))
    assert_close(model.get_layer("unit_norm").gamma, np.zeros(3), 0)


def test_kernels_start_with_the_variance_of_he():
    kernel = to_numpy(he_fan_out()((3, 3, 40, 50)))
    assert_close(kernel.std(), np.sqrt(2 / (9 * 50)), 2e-2)  # 18000 draws
    assert np.any(to_numpy(he_fan_out()((3, 3, 40, 50))) != kernel)
    start = unit(4, 3).get_layer("unit_conv").kernel_initializer
    assert (start.mode, start.scale) == ("fan_out", 2.0)
