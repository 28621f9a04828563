import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_edifice
from keras_edifice.probabilistic.mc_dropout import (
    MCDropout,
    MCDropoutModel,
    entropy,
)
from tests.support.close import assert_close, to_numpy
from tests.support.shaking import shake

rng = np.random.default_rng(0)


def small_model(**options):
    keras.utils.set_random_seed(0)
    options = dict(input_size=3, hidden_sizes=[16], output_size=2, seed=7) | options
    return shake(keras_edifice.build("mc_dropout", **options))


def inputs(batch=4):
    return rng.normal(size=(batch, 3)).astype("float32")


def test_dropout_stands_before_every_weight_layer():
    model = small_model(
        hidden_sizes=[8, 6], num_classes=5, input_dropout=0.1, dropout_rate=0.4
    )
    kinds = [MCDropout, layers.Dense] * 4
    assert len(model.layers[1:]) == len(kinds)
    assert all(map(isinstance, model.layers[1:], kinds))
    assert [layer.rate for layer in model.layers[1::2]] == [0.1, 0.4, 0.4, 0.4]


def test_without_dropout_the_variance_is_zero():
    model, x = small_model(dropout_rate=0.0), inputs()
    found = model.predict_uncertainty(x, 10)
    assert_close(found["variance"], np.zeros((4, 2)), 1e-12)
    assert_close(found["mean"], model.predict(x, verbose=0), 1e-6)


def test_moments_of_a_linear_network_are_exact():
    model, x = small_model(activation="linear", dropout_rate=0.3), inputs(2)
    found = model.predict_uncertainty(x, 40_000, seed=1)
    kernel, bias, out_kernel, out_bias = (to_numpy(w) for w in model.get_weights())
    hidden = x @ kernel + bias
    # A mask over 1 - p has the variance p / (1 - p): the mean is that of the
    # weight-scaled network, and the terms of the sum are independent.
    mean = hidden @ out_kernel + out_bias
    variance = 0.3 / 0.7 * hidden**2 @ out_kernel**2
    assert_close(model.predict(x, verbose=0), mean)
    assert_close(found["mean"], mean, 0.03)
    assert_close(found["variance"], variance, 0.03)


def test_every_example_and_draw_has_its_own_mask():
    layer = MCDropout(0.5, seed=1)
    x = ops.ones((3, 2, 64))
    masks = to_numpy(layer.sample(x)).reshape(6, 64)
    assert set(np.unique(masks)) == {0.0, 2.0}
    different = [(a != b).any() for i, a in enumerate(masks) for b in masks[:i]]
    assert all(different)
    assert 0.35 < masks.mean() / 2 < 0.65


def test_inference_is_fixed_and_training_draws():
    model, x = small_model(), inputs()
    assert_close(model(x), model(x), 0)
    first, second = (to_numpy(model(x, training=True)) for _ in range(2))
    assert np.abs(first - second).max() > 1e-3


def test_always_on_draws_in_predict():
    model, x = small_model(always_on=True), inputs()
    first, second = (model.predict(x, verbose=0) for _ in range(2))
    assert np.abs(first - second).max() > 1e-3


def test_draws_repeat_under_a_seed():
    model, x = small_model(), inputs()
    first, second = (model.predict_uncertainty(x, 5, seed=3) for _ in range(2))
    assert_close(first["variance"], second["variance"], 0)
    other = model.predict_uncertainty(x, 5, seed=4)
    assert np.abs(other["variance"] - first["variance"]).max() > 1e-4


def test_models_of_one_seed_draw_alike():
    x = inputs()
    first, second = (small_model(seed=9).draw(x, 5) for _ in range(2))
    assert_close(first, second, 0)


def test_classes_have_entropies():
    model, x = small_model(num_classes=4), inputs()
    found = model.predict_uncertainty(x, 30, seed=2)
    p = model.draw(x, 30, seed=2).astype("float64")
    total = -(p.mean(0) * np.log(p.mean(0))).sum(-1)
    expected = -(p * np.log(p)).sum(-1).mean(0)
    assert_close(found["mean"], p.mean(0))
    assert_close(found["variance"], p.var(0))
    assert_close(found["entropy"], total)
    assert_close(found["expected_entropy"], expected)
    assert_close(found["mutual_information"], total - expected)
    assert (found["mutual_information"] > 0).all()
    assert (found["mutual_information"] <= found["entropy"]).all()


def test_logits_become_probabilities():
    options = dict(num_classes=4, classifier_activation=None)
    found = small_model(**options).predict_uncertainty(inputs(), 10)
    assert_close(found["mean"].sum(-1), np.ones(4))


def test_entropy_of_certainty_is_zero_and_of_a_coin_is_a_bit():
    assert_close(entropy([[1.0, 0.0], [0.5, 0.5]]), np.array([0.0, np.log(2)]))


def test_number_of_draws_is_an_option():
    model, x = small_model(num_samples=3), inputs()
    assert_close(
        model.predict_uncertainty(x, seed=1)["mean"],
        model.draw(x, 3, seed=1).mean(0),
    )


def test_predictive_variance_adds_the_noise_of_the_data():
    known = dict(dropout_rate=0.2, length_scale=0.5, weight_decay=1e-3, num_train=100)
    found = small_model(**known).predict_uncertainty(inputs(), 10)
    noise = 2 * 100 * 1e-3 / (0.8 * 0.5**2)
    assert_close(found["predictive_variance"], found["variance"] + noise)


@pytest.mark.parametrize("missing", ["length_scale", "weight_decay", "num_train"])
def test_variance_without_the_noise_is_not_called_predictive(missing):
    known = dict(length_scale=0.5, weight_decay=1e-3, num_train=100)
    del known[missing]
    found = small_model(**known).predict_uncertainty(inputs(), 10)
    assert set(found) == {"mean", "variance"}


def test_weight_decay_is_a_loss():
    model = small_model(weight_decay=0.01)
    expected = 0.01 * sum(np.square(to_numpy(w)).sum() for w in model.get_weights())
    assert_close(sum(model.losses), expected)


def test_batch_normalisation_stays_at_inference():
    x = data = keras.Input((3,))
    for layer in (
        layers.Dense(8, "relu"),
        layers.BatchNormalization(),
        MCDropout(0.5, seed=1),
        layers.Dropout(0.9),
    ):
        x = layer(x)
    model = MCDropoutModel(data, x)
    moving = np.linspace(0.5, 2.0, 8, dtype="float32")
    model.layers[2].set_weights([moving, moving, moving, moving])
    before, x = model.get_weights(), inputs()
    draws = model.draw(x, 20_000, seed=1)
    for old, new in zip(before, model.get_weights(), strict=True):
        assert_close(new, old, 0)
    # Kept elements are twice the deterministic output, in which other dropout is off.
    kept = np.where(draws.any(0), draws.max(0) + draws.min(0), 0.0)
    assert_close(kept, 2 * model.predict(x, verbose=0))


def test_saving_keeps_the_draws_of_always_on(tmp_path):
    model, x = small_model(always_on=True), inputs()
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is MCDropoutModel
    first, second = (loaded.predict(x, verbose=0) for _ in range(2))
    assert np.abs(first - second).max() > 1e-3
    assert_close(loaded.draw(x, 5, seed=1), model.draw(x, 5, seed=1), 1e-6)


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="TensorFlow writes a SavedModel by itself",
)
def test_exporting_keeps_the_draws_of_always_on(tmp_path):
    import tensorflow as tf

    model, x = small_model(always_on=True), inputs()
    keras.Model.export(model, str(tmp_path / "model"), verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "model"))
    first, second = (loaded.serve(x).numpy() for _ in range(2))
    assert np.abs(first - second).max() > 1e-3


def test_sizes_are_those_of_a_perceptron():
    model = keras_edifice.build("mc_dropout", input_size=784, hidden_sizes=[512, 512])
    mlp = keras_edifice.build("mlp", input_size=784, hidden_sizes=[512, 512, 10])
    assert model.count_params() == mlp.count_params()
