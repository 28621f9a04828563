import numpy as np
import pytest

from keras_edifice.blocks.per_head_norm import PerHeadNorm
from tests.support.close import assert_close, to_numpy
from tests.support.shaking import shake

rng = np.random.default_rng(0)


def inputs():
    return rng.normal(1.0, 2.0, size=(2, 5, 6)).astype("float32")


def reference(x, gamma, beta, epsilon, subtract_mean=True):
    """Each of two heads by itself, in float64. (batch, time, 2, 3) -> the same."""
    x = x.astype("float64")
    if subtract_mean:
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * gamma + beta


@pytest.mark.parametrize("subtract_mean", [True, False])
def test_each_head_is_normalised_by_itself(subtract_mean):
    layer = PerHeadNorm(2, epsilon=64e-5, subtract_mean=subtract_mean)
    x = inputs()
    layer.build(x.shape)
    shake(layer)
    gamma, beta = (to_numpy(w) for w in layer.weights)
    expected = reference(x.reshape(2, 5, 2, 3), gamma, beta, 64e-5, subtract_mean)
    assert_close(layer(x), expected.reshape(x.shape))


def test_heads_with_an_axis_of_their_own_give_the_same():
    flat, split, x = PerHeadNorm(2), PerHeadNorm(), inputs()
    expected = to_numpy(flat(x)).reshape(2, 5, 2, 3)
    assert_close(split(x.reshape(2, 5, 2, 3)), expected, 0)


def test_a_later_step_changes_no_earlier_one():
    layer, x = PerHeadNorm(2), inputs()
    assert_close(layer(x)[:, :3], layer(x[:, :3]), 1e-6)


def test_heads_must_divide_the_features():
    with pytest.raises(ValueError, match="multiple of num_heads, received 6 and 4"):
        PerHeadNorm(4).build((None, 5, 6))


def test_weights_can_be_left_out():
    layer = PerHeadNorm(2, center=False, scale=False)
    layer.build((None, 6))
    assert layer.weights == []
