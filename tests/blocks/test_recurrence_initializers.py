import keras
import numpy as np

from keras_edifice.blocks.recurrence_initializers import (
    fan_in_uniform,
    log_of_uniform,
    step_size_bias,
)
from tests.support.close import assert_close, to_numpy


def test_kernels_are_uniform_by_their_inputs():
    keras.utils.set_random_seed(0)
    for divisor in (1, 9):
        kernel = to_numpy(fan_in_uniform(divisor)((64, 50)))
        bound = 1 / 8 / np.sqrt(divisor)
        assert 0.99 * bound < np.abs(kernel).max() <= bound
        assert_close(kernel.std(), bound / np.sqrt(3), 0.03)


def test_step_sizes_are_uniform_in_the_logarithm():
    keras.utils.set_random_seed(0)
    dt = np.log1p(np.exp(to_numpy(step_size_bias(0.001, 0.1)((2000,)))))
    assert 0.001 * (1 - 1e-5) <= dt.min() < 0.0011
    assert 0.09 < dt.max() <= 0.1 * (1 + 1e-5)
    quartiles = np.quantile(np.log10(dt), [0.25, 0.5, 0.75])
    assert np.abs(quartiles - [-2.5, -2.0, -1.5]).max() < 0.1


def test_step_sizes_stay_above_the_floor():
    dt = np.log1p(np.exp(to_numpy(step_size_bias(1e-6, 0.1, 0.01)((2000,)))))
    assert_close(dt.min(), 0.01)
    assert dt.max() > 0.05


def test_rates_are_uniform_before_the_logarithm():
    keras.utils.set_random_seed(0)
    rates = np.exp(to_numpy(log_of_uniform(1, 16)((2000,))))
    assert 1.0 - 1e-5 <= rates.min() < 1.1
    assert 15.9 < rates.max() <= 16.0 + 1e-4
    assert abs(np.median(rates) - 8.5) < 0.5
