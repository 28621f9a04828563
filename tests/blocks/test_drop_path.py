import keras
import numpy as np
import pytest

from keras_edifice.blocks.drop_path import DropPath, drop_path_rates
from tests.support.close import assert_close, to_numpy


def draws(rate, examples, seed=1):
    x = np.ones((examples, 3, 2), "float32")
    return to_numpy(DropPath(rate, seed=seed)(x, training=True))


def test_an_example_is_dropped_as_a_whole():
    y = draws(0.5, 64).reshape(64, -1)
    assert_close(y, np.repeat(y[:, :1], 6, axis=1), 0)
    assert set(y[:, 0]) == {0.0, 2.0}


@pytest.mark.parametrize("rate", [0.1, 0.6, 0.9])
def test_expectation_is_kept(rate):
    y = draws(rate, 4000)[:, 0, 0]
    kept = np.mean(y > 0)
    # four standard deviations of the mean of 4000 draws
    assert abs(kept - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / 4000)
    assert_close(y[y > 0], np.full(sum(y > 0), 1 / (1 - rate)), 1e-6)


def test_identity_at_inference_and_at_rate_zero():
    x = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")
    assert_close(DropPath(0.9)(x), x, 0)
    assert_close(DropPath(0.9)(x, training=False), x, 0)
    assert_close(DropPath(0.0)(x, training=True), x, 0)


def test_seed_decides_the_draws_and_each_call_draws_anew():
    assert_close(draws(0.5, 64, seed=3), draws(0.5, 64, seed=3), 0)
    assert np.any(draws(0.5, 64, seed=3) != draws(0.5, 64, seed=4))
    layer, x = DropPath(0.5, seed=3), np.ones((64, 2), "float32")
    first = to_numpy(layer(x, training=True))
    assert np.any(first != to_numpy(layer(x, training=True)))


def test_branch_trains_in_fit_and_keeps_its_dtype():
    inputs = keras.Input((3,))
    x = keras.layers.Dense(3, dtype="mixed_bfloat16")(inputs)
    x = DropPath(0.5, dtype="mixed_bfloat16")(x)
    model = keras.Model(inputs, x)
    assert x.dtype == "bfloat16"
    model.compile("sgd", "mse")
    x = np.ones((8, 3), "float32")
    history = model.fit(x, x, epochs=2, verbose=0).history
    assert np.isfinite(history["loss"]).all()


def test_rates_grow_linearly():
    assert_close(drop_path_rates(0.3, 4), [0, 0.1, 0.2, 0.3], 1e-12)
    assert drop_path_rates(0.3, 1) == [0.0]


@pytest.mark.parametrize("rate", [1.0, -0.1])
def test_impossible_rates_are_refused(rate):
    with pytest.raises(ValueError, match="rate must be >= 0 and < 1"):
        DropPath(rate)


def test_config_keeps_the_arguments():
    layer = DropPath.from_config(DropPath(0.2, seed=5).get_config())
    assert (layer.rate, layer.seed) == (0.2, 5)
