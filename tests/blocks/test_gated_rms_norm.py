import numpy as np
import pytest

from keras_edifice.blocks.gated_rms_norm import GatedRMSNorm
from tests.support.close import assert_close, to_numpy
from tests.support.shaking import shake

rng = np.random.default_rng(0)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def rms(x, epsilon):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)


@pytest.mark.parametrize("norm_before_gate", [True, False])
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("group_size", [None, 3])
def test_equals_the_formula(norm_before_gate, activation, group_size):
    x, gate = rng.normal(size=(2, 2, 4, 6)).astype("float32")
    layer = GatedRMSNorm(1e-5, activation, norm_before_gate, group_size)
    layer.build(x.shape, gate.shape)
    (gamma,) = (to_numpy(w) for w in shake(layer).weights)
    g = gate.astype("float64")
    g = sigmoid(g) * (g if activation == "silu" else 1.0)
    y = x.astype("float64") * (1.0 if norm_before_gate else g)
    groups = y.reshape(2, 4, -1, group_size or 6)
    y = rms(groups, 1e-5).reshape(x.shape) * gamma
    assert_close(layer(x, gate), y * g if norm_before_gate else y)


def test_closed_gate_gives_zeros():
    x = rng.normal(size=(2, 6)).astype("float32")
    assert_close(GatedRMSNorm()(x, np.zeros_like(x)), np.zeros_like(x), 0)


def test_groups_must_divide_the_features():
    with pytest.raises(ValueError, match="multiple of group_size, received 6 and 4"):
        GatedRMSNorm(group_size=4).build((None, 6))
