import numpy as np
import pytest

from keras_edifice.blocks.squeeze_excite import SqueezeExcite
from tests.support.close import assert_close, to_numpy
from tests.support.shaking import shake

rng = np.random.default_rng(0)
ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "hard_sigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
}


def layer(**options):
    made = SqueezeExcite(3, **options)
    made.build((None, None, None, 4))
    return shake(made)


@pytest.mark.parametrize(
    ("activation", "gate"), [("relu", "hard_sigmoid"), ("silu", "sigmoid")]
)
def test_output_is_the_equations(activation, gate):
    excite = layer(activation=activation, gate=gate)
    x = rng.normal(size=(2, 5, 6, 4)).astype("float32")
    w1, b1, w2, b2 = (to_numpy(w) for w in excite.weights)
    z = x.astype("float64").mean((1, 2)) @ w1 + b1
    s = ACTIVATIONS[gate](ACTIVATIONS[activation](z) @ w2 + b2)
    assert_close(excite(x), s[:, None, None] * x)
    assert_close(excite.scales(x), s[:, None, None])


def test_scales_lie_between_zero_and_one_and_are_shared_by_all_pixels():
    x = 10 * rng.normal(size=(8, 5, 6, 4)).astype("float32")
    scales = to_numpy(layer().scales(x))
    assert scales.shape == (8, 1, 1, 4)
    assert scales.min() > 0
    assert scales.max() < 1


def test_every_pixel_moves_every_channel():
    excite, x = layer(activation="silu"), rng.normal(size=(1, 3, 3, 4))
    x = x.astype("float32")
    changed = x.copy()
    changed[0, 0, 0, 0] += 5
    assert np.all(to_numpy(excite(changed)) != to_numpy(excite(x)))


def test_config_keeps_the_arguments():
    made = SqueezeExcite.from_config(layer(gate="hard_sigmoid").get_config())
    assert (made.squeezed_size, made.activation, made.gate) == (
        3,
        "relu",
        "hard_sigmoid",
    )
