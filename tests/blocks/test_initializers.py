import numpy as np
import pytest

from keras_edifice.blocks.initializers import matrix_initializer, mlp_bias_initializer
from tests.support.close import assert_close, to_numpy


def test_xavier_of_fused_matrices_is_that_of_each():
    limit = np.sqrt(6 / (60 + 60))
    for parts in (1, 3):
        kernel = to_numpy(matrix_initializer("xavier", parts)((60, 60 * parts)))
        assert_close(np.abs(kernel).max(), limit, 1e-2)  # 3600 draws come near
        assert np.abs(kernel).max() <= limit


def test_truncated_normal_is_cut_at_two_deviations():
    kernel = to_numpy(matrix_initializer("truncated")((100, 100)))
    assert_close(np.abs(kernel).max(), 2 * 0.02, 1e-3)
    assert np.abs(kernel).max() <= 2 * 0.02
    # a unit normal cut at two has the deviation 0.880
    assert_close(kernel.std(), 0.88 * 0.02, 1e-3)


def test_lecun_keeps_the_variance_of_the_inputs():
    for parts in (1, 3):
        kernel = to_numpy(matrix_initializer("lecun", parts)((100, 100 * parts)))
        assert_close(kernel.var() * 100, 1.0, 0.05)


def test_biases_start_near_zero_or_at_it():
    biases = to_numpy(mlp_bias_initializer("xavier")((1000,)))
    assert 5e-7 < biases.std() < 2e-6
    assert mlp_bias_initializer("truncated") == "zeros"


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'truncated', 'lecun', received 'he'"):
        matrix_initializer("he")
