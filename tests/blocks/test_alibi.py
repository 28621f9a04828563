import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.blocks.alibi import ALiBi, alibi_slopes
from tests.support.close import assert_close, to_numpy

rng = np.random.default_rng(0)


def slopes_of_the_paper(heads):
    """The construction of the paper: a power of two, or the nearest below and more."""
    if heads & (heads - 1) == 0:
        return [2 ** (-8 * (h + 1) / heads) for h in range(heads)]
    power = 1
    while 2 * power <= heads:
        power *= 2
    finer = slopes_of_the_paper(2 * power)[::2]
    return slopes_of_the_paper(power) + finer[: heads - power]


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12, 16, 20])
def test_slopes_are_those_of_the_paper(heads):
    assert_close(alibi_slopes(heads), slopes_of_the_paper(heads), 1e-7)


def test_eight_heads_halve_the_slope_each():
    assert_close(alibi_slopes(8), 0.5 ** np.arange(1, 9), 0)


def test_bias_falls_with_the_distance():
    x = np.zeros((2, 5, 7), "float32")
    bias = to_numpy(ALiBi(6)(x))
    distance = np.abs(np.arange(5)[:, None] - np.arange(5))
    assert_close(bias, -alibi_slopes(6)[None, :, None, None] * distance, 1e-7)


def test_bias_goes_on_after_a_cache_and_for_any_length():
    queries, keys = np.zeros((2, 2, 1), "float32"), np.zeros((2, 9, 1), "float32")
    layer = ALiBi(3)
    whole = to_numpy(layer(keys))
    assert_close(layer(queries, keys, offset=7), whole[:, :, 7:], 0)
    offsets = ops.convert_to_tensor(np.array([7, 2], "int32"))
    rows = to_numpy(layer(queries, keys, offset=offsets))
    assert_close(rows[0], whole[0, :, 7:], 0)
    assert_close(rows[1], whole[0, :, 2:4], 0)


def test_bias_has_no_weights_and_is_float32_in_half_precision():
    layer = ALiBi(4, dtype="mixed_bfloat16")
    bias = layer(np.zeros((1, 600, 1), "float32"))
    assert not layer.weights
    assert keras.backend.standardize_dtype(bias.dtype) == "float32"
    assert to_numpy(bias)[0, 0, 0, 599] == -0.25 * 599


def test_config_and_shape():
    layer = ALiBi.from_config(ALiBi(4).get_config())
    assert layer.num_heads == 4
    assert layer.compute_output_shape((2, 5, 3)) == (None, 4, 5, 5)
    assert layer.compute_output_shape((2, 5, 3), (2, 9, 3)) == (None, 4, 5, 9)
