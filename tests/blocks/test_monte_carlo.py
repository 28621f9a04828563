import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_edifice.blocks.monte_carlo import MonteCarloModel
from tests.support.close import assert_close

X = np.arange(8.0, dtype="float32").reshape(4, 2)


class Numbered(layers.Layer):
    """Adds its number to each draw and notes how often it ran."""

    runs = 0

    def call(self, x):
        return x

    def sample(self, x, seed=None):
        self.runs += 1
        numbers = ops.arange(0, x.shape[0], dtype="float32")
        return x + ops.reshape(numbers, (-1, 1, 1))


def chain(*parts):
    x = inputs = keras.Input((2,))
    for part in parts:
        x = part(x)
    return MonteCarloModel(inputs, x)


def test_draws_are_those_of_each_layer_and_run_once():
    first, second = Numbered(), Numbered()
    draws = chain(first, layers.Rescaling(10.0), second).draw(X, 3)
    assert_close(draws, [(X + k) * 10.0 + k for k in range(3)])
    assert first.runs == second.runs == 1


def test_other_layers_run_as_at_inference():
    draws = chain(layers.Dropout(0.9), layers.BatchNormalization(epsilon=0.0)).draw(
        X, 2
    )
    assert_close(draws, [X, X])


def test_inputs_of_another_width_are_refused():
    with pytest.raises(ValueError, match="expected .* received .batch, 3."):
        chain(Numbered()).draw(np.ones((4, 3), "float32"), 2)


def test_a_draw_needs_a_number():
    with pytest.raises(ValueError, match="num_samples must be at least 1, received 0"):
        chain(Numbered()).draw(X, 0)
