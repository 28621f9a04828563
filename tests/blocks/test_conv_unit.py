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


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_depthwise_keeps_the_channels_apart(kernel_size, strides):
    model = unit(None, kernel_size, strides)
    x = rng.normal(size=(2, 9, 6, 2)).astype("float32")
    kernel, *norm = model.weights
    assert kernel.shape == (kernel_size, kernel_size, 2, 1)
    full = np.zeros((kernel_size, kernel_size, 2, 2))
    for channel in range(2):
        full[..., channel, channel] = to_numpy(kernel)[..., channel, 0]
    assert_close(model(x), reference(x, [full, *norm], strides, relu=True))


def test_padding_same_starts_where_tensorflow_starts():
    model = unit(4, 3, 2, padding="same")
    x = rng.normal(size=(2, 8, 8, 2)).astype("float32")
    symmetric = unit(4, 3, 2)
    symmetric.set_weights(model.get_weights())
    moved = np.roll(x, (-1, -1), axis=(1, 2))
    moved[:, -1], moved[:, :, -1] = 0, 0  # zeros after the end, none before
    assert_close(to_numpy(model(x))[:, 1:, 1:], to_numpy(symmetric(moved))[:, 1:, 1:])


def test_epsilon_and_momentum_are_those_of_the_normalisation():
    norm = unit(4, 3, epsilon=1e-3, momentum=0.7).get_layer("unit_norm")
    assert (norm.epsilon, norm.momentum) == (1e-3, 0.7)


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


def test_depthwise_kernels_fan_out_to_their_own_channel():
    kernel = to_numpy(he_fan_out()((3, 3, 2000, 1)))
    assert_close(kernel.std(), np.sqrt(2 / 9), 2e-2)  # 18000 draws
    start = unit(None, 3).get_layer("unit_conv").depthwise_initializer
    assert (start.mode, start.scale) == ("fan_out", 2.0)
