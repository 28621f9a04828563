import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.probabilistic.bayesian import (
    BayesianDense,
    BayesianModel,
    gaussian_kl,
    mixture_log_prob,
)
from tests.support.close import assert_close, to_numpy
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake

rng = np.random.default_rng(0)
ESTIMATORS = ("reparameterization", "local", "flipout")
MIXTURE = dict(prior="scale_mixture", prior_sigma1=1.0, prior_sigma2=0.1)


def dense(units=4, features=3, **options):
    keras.utils.set_random_seed(0)
    layer = BayesianDense(units, **options)
    layer.build((None, features))
    return shake(layer)


def given_noise(layer, *arrays):
    """Replaces the draws of a layer by these arrays, in turn."""
    arrays = iter(arrays)
    layer._normal = lambda shape, seed=None: ops.convert_to_tensor(next(arrays))


def softplus(rho):
    return np.log1p(np.exp(rho))


def parameters(layer):
    """μ and σ of the kernel, μ and σ of the bias, float64."""
    mu, rho, bias_mu, bias_rho = (to_numpy(w) for w in layer.trainable_variables)
    return mu, softplus(rho), bias_mu, softplus(bias_rho)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_vanishing_deviation_leaves_a_dense_layer(estimator):
    layer, x = dense(estimator=estimator), rng.normal(size=(5, 3)).astype("float32")
    for rho in (layer.kernel_rho, layer.bias_rho):
        rho.assign(np.full(rho.shape, -40.0, "float32"))
    mu, _, bias, _ = parameters(layer)
    assert_close(layer(x, training=True), x @ mu + bias)


def test_inference_uses_the_mean_and_repeats():
    layer, x = dense(activation="tanh"), rng.normal(size=(5, 3)).astype("float32")
    mu, _, bias, _ = parameters(layer)
    assert_close(layer(x), np.tanh(x @ mu + bias))


def test_drawn_weights_are_those_of_the_equation():
    layer, x = dense(), rng.normal(size=(5, 3)).astype("float32")
    e, bias_e = rng.normal(size=(3, 4)), rng.normal(size=4)
    given_noise(layer, e.astype("float32"), bias_e.astype("float32"))
    mu, sigma, bias, bias_sigma = parameters(layer)
    expected = x @ (mu + sigma * e) + bias + bias_sigma * bias_e
    assert_close(layer(x, training=True), expected)


def closed_form(layer, x):
    """Mean and variance of the outputs over the posterior."""
    mu, sigma, bias, bias_sigma = parameters(layer)
    return x @ mu + bias, x**2 @ sigma**2 + bias_sigma**2


def moments_of_calls(layer, x, calls, copies):
    """Mean and variance of training calls on copies of one example."""
    many = np.repeat(x, copies, axis=0)
    draws = [to_numpy(layer(many, training=True)) for _ in range(calls)]
    return np.concatenate(draws).mean(0), np.concatenate(draws).var(0)


@pytest.mark.parametrize(
    ("estimator", "calls", "copies"),
    [("reparameterization", 600, 1), ("flipout", 300, 100), ("local", 2, 20_000)],
)
def test_every_estimator_has_the_moments_of_the_posterior(estimator, calls, copies):
    layer, x = dense(units=16, estimator=estimator, seed=3), np.ones((1, 3), "float32")
    mean, variance = moments_of_calls(layer, x, calls, copies)
    expected_mean, expected_variance = closed_form(layer, x)
    # Of 600 draws the deviation is within a tenth, the mean over units within 2 %.
    assert_close(variance.mean() / expected_variance.mean(), 1.0, 0.08)
    errors = (mean - expected_mean[0]) / np.sqrt(expected_variance[0] / calls)
    assert np.abs(errors).max() < 4


def test_draws_of_whole_networks_have_the_moments_of_the_posterior():
    layer, x = dense(seed=3), rng.normal(size=(2, 3)).astype("float32")
    draws = to_numpy(layer.sample(ops.convert_to_tensor(np.tile(x, (20_000, 1, 1)))))
    mean, variance = closed_form(layer, x)
    assert_close(draws.mean(0), mean, 0.05)
    assert_close(draws.var(0), variance, 0.05)


def test_one_draw_of_a_network_is_one_function_of_all_examples():
    layer = dense(seed=3)
    x = np.zeros((2, 2, 3), "float32")
    first, second = to_numpy(layer.sample(ops.convert_to_tensor(x)))
    assert_close(first[0], first[1], 0)
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize(
    ("estimator", "correlated"),
    [("reparameterization", True), ("flipout", False), ("local", False)],
)
def test_flipout_decorrelates_the_examples_of_a_batch(estimator, correlated):
    layer = dense(units=64, estimator=estimator, seed=3)
    twins = np.ones((2, 3), "float32")
    draws = np.stack([to_numpy(layer(twins, training=True)) for _ in range(40)])
    a, b = (draws - closed_form(layer, twins)[0]).transpose(1, 0, 2).reshape(2, -1)
    correlation = np.corrcoef(a, b)[0, 1]
    # 2560 pairs: the deviation of a correlation of zero is 0.02.
    assert correlation > 0.999 if correlated else abs(correlation) < 0.1


def test_divergence_is_zero_at_the_prior_and_positive_elsewhere():
    layer = dense(prior_sigma=0.7)
    for mu, rho in (
        (layer.kernel_mu, layer.kernel_rho),
        (layer.bias_mu, layer.bias_rho),
    ):
        mu.assign(np.zeros(mu.shape, "float32"))
        rho.assign(np.full(rho.shape, np.log(np.expm1(0.7)), "float32"))
    assert_close(layer.kl(), 0.0, 1e-5)
    assert to_numpy(shake(layer).kl()) > 0


def test_gaussian_divergence_is_the_closed_form():
    layer = dense(prior_sigma=0.7)
    mu, sigma, bias, bias_sigma = parameters(layer)
    expected = sum(
        (np.log(0.7 / s) + (s**2 + m**2) / (2 * 0.7**2) - 0.5).sum()
        for m, s in ((mu, sigma), (bias, bias_sigma))
    )
    assert_close(layer.kl(), expected)


def mixture_density(w, pi, sigma1, sigma2):
    def normal(sigma):
        return np.exp(-(w**2) / (2 * sigma**2)) / np.sqrt(2 * np.pi) / sigma

    return pi * normal(sigma1) + (1 - pi) * normal(sigma2)


def test_mixture_prior_is_a_density():
    w = np.linspace(-8, 8, 200_001)
    p = np.exp(to_numpy(mixture_log_prob(w.astype("float32"), 0.3, 1.0, 0.0025)))
    assert_close(p, mixture_density(w.astype("float32"), 0.3, 1.0, 0.0025), 1e-4)
    assert_close(p.sum() * (w[1] - w[0]), 1.0, 1e-4)


def test_mixture_divergence_is_the_mean_over_draws():
    layer = dense(units=1, features=1, seed=1, **MIXTURE)
    mu, sigma, bias, bias_sigma = (float(p.reshape(())) for p in parameters(layer))
    w = np.linspace(-8, 8, 100_001)
    exact = 0.0
    for m, s in ((mu, sigma), (bias, bias_sigma)):
        q = np.exp(-((w - m) ** 2) / (2 * s**2)) / np.sqrt(2 * np.pi) / s
        ratio = -((w - m) ** 2) / (2 * s**2) - np.log(np.sqrt(2 * np.pi) * s)
        ratio -= np.log(mixture_density(w, 0.5, 1.0, 0.1))
        exact += (q * ratio).sum() * (w[1] - w[0])
    e = rng.normal(size=(2, 50_000)).astype("float32")
    many = sum(
        to_numpy(layer._log_ratio((m, s), ops.convert_to_tensor(noise)))
        for (m, s), noise in zip(
            ((mu, sigma), (bias, bias_sigma)),
            e,
            strict=True,
        )
    )
    assert_close(many / 50_000, exact, 0.02)


def test_mixture_of_equal_parts_is_the_gaussian_prior():
    equal = dict(prior="scale_mixture", prior_sigma1=0.7, prior_sigma2=0.7)
    # The rule w = μ ± σ is exact for the logarithm of a Gaussian but for ε² = 1.
    assert_close(dense(**equal).kl(), dense(prior_sigma=0.7).kl())


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("prior", [dict(prior_sigma=0.7), MIXTURE])
def test_gradient_of_the_bound_is_that_of_the_equation(estimator, prior):
    if estimator != "reparameterization":
        prior = dict(prior_sigma=0.7)  # the mixture enters them in the same way
    layer = dense(estimator=estimator, **prior)
    x = rng.normal(size=(2, 3)).astype("float32")
    e, bias_e = rng.normal(size=(3, 4)), rng.normal(size=4)
    out = rng.normal(size=(2, 4))
    signs = [
        rng.choice([-1.0, 1.0], size=s).astype("float32") for s in ((2, 3), (2, 4))
    ]
    noise = [a.astype("float32") for a in (e, bias_e, out)]
    given_noise(layer, *noise * 3)
    turns = iter(signs * 3)
    layer._signs = lambda shape: ops.convert_to_tensor(next(turns))
    if estimator != "local":
        given_noise(layer, *noise[:2] * 3)

    def bound(mu, rho, bias, bias_rho, x):
        sigma, bias_sigma = softplus(rho), softplus(bias_rho)
        if estimator == "reparameterization":
            y = x @ (mu + sigma * e) + bias + bias_sigma * bias_e
        elif estimator == "local":
            y = x @ mu + bias + np.sqrt(x**2 @ sigma**2 + bias_sigma**2) * out
        else:
            moved = (x * signs[0]) @ (sigma * e) + bias_sigma * bias_e
            y = x @ mu + bias + moved * signs[1]
        kl = 0.0
        for m, s, n in ((mu, sigma, e), (bias, bias_sigma, bias_e)):
            if prior is MIXTURE:
                log_q = -np.log(s) - 0.5 * np.log(2 * np.pi) - n**2 / 2
                kl += (log_q - np.log(mixture_density(m + s * n, 0.5, 1.0, 0.1))).sum()
            else:
                kl += (np.log(0.7 / s) + (s**2 + m**2) / (2 * 0.49) - 0.5).sum()
        return np.square(y).sum() + kl

    weights = [to_numpy(w) for w in layer.trainable_variables]
    found, by_input = gradients(
        Losses(layer), x, lambda y: ops.sum(ops.square(y[0])) + y[1], training=True
    )
    for i, gradient in enumerate(found):
        expected = numerical_gradient(
            lambda w, i=i: bound(*weights[:i], w, *weights[i + 1 :], x), weights[i]
        )
        assert_close(gradient, expected, 1e-4)
    expected = numerical_gradient(lambda x: bound(*weights, x), x)
    assert_close(by_input, expected, 1e-4)


class Losses(keras.layers.Layer):
    """The outputs of a layer and the loss that it adds."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.built = True

    def call(self, x, training=None):
        added = []
        self.layer.add_loss = added.append
        return self.layer(x, training=training), added[0]


def test_two_calls_differ_and_a_seed_repeats():
    x = rng.normal(size=(5, 3)).astype("float32")
    layer = dense(seed=5)
    first, second = (to_numpy(layer(x, training=True)) for _ in range(2))
    assert np.abs(first - second).max() > 1e-3
    assert_close(dense(seed=5)(x, training=True), first, 0)


def test_divergence_is_a_loss_in_training_and_at_inference():
    layer, x = dense(kl_weight=0.25), rng.normal(size=(5, 3)).astype("float32")
    for training in (True, False):
        layer(x, training=training)
        assert_close(sum(layer.losses), 0.25 * to_numpy(layer.kl()))


@pytest.mark.parametrize("prior", [{}, MIXTURE])
def test_divergence_is_float32_under_half_precision(prior):
    x = rng.normal(size=(5, 3)).astype("float32")
    half, full = dense(dtype="mixed_bfloat16", **prior), dense(**prior)
    half.set_weights(full.get_weights())
    for layer in (half, full):
        layer(x)
    assert_close(sum(half.losses), sum(full.losses), 1e-6)
    assert keras.backend.standardize_dtype(half(x).dtype) == "bfloat16"


def test_exponential_weighting_is_that_of_equation_nine():
    layer = dense(kl_weighting="exponential")
    layer.set_num_examples(22)  # minibatches of 8, 8 and 6
    kl = to_numpy(layer.kl())
    for _ in range(2):  # two epochs
        shares = []
        for size in (8, 8, 6):
            layer(np.ones((size, 3), "float32"), training=True)
            shares.append(to_numpy(sum(layer.losses)) / kl * 22 / 3)
        assert_close(np.array(shares), np.array([4, 2, 1]) / 7)
    layer(np.ones((8, 3), "float32"))
    assert_close(sum(layer.losses), kl / 22)


def test_fit_divides_the_divergence_by_the_number_of_examples():
    model = small_model(kl_weighting="exponential")
    model.compile(keras.optimizers.SGD(1e-3), loss="mse")
    x = rng.normal(size=(25, 3)).astype("float32")
    model.fit(x, x[:, :2], validation_split=0.2, batch_size=8, verbose=0)
    layer = model.layers[1]
    assert [to_numpy(w) for w in (layer.num_examples, layer.batch_size)] == [20, 8]
    assert to_numpy(layer.examples_seen) == 0
    divergence = sum(to_numpy(layer.kl()) for layer in model.layers[1:])
    error = np.square(to_numpy(model(x)) - x[:, :2]).mean()
    # The KL is a sum of about a hundred terms: float32 keeps five digits of it.
    assert_close(model.evaluate(x, x[:, :2], verbose=0), error + divergence / 20, 1e-4)


def small_model(**options):
    keras.utils.set_random_seed(0)
    return keras_edifice.build(
        "bayesian", input_size=3, hidden_sizes=[4], output_size=2, seed=7, **options
    )


def test_uncertainty_grows_away_from_the_data():
    keras.utils.set_random_seed(0)
    model = keras_edifice.build(
        "bayesian", input_size=1, hidden_sizes=[16], output_size=1, seed=0
    )
    x = np.linspace(-1, 1, 64, dtype="float32")[:, None]
    model.compile(keras.optimizers.Adam(1e-2), loss="mse")
    model.fit(x, x**2, batch_size=64, epochs=60, verbose=0)
    near, far = (
        model.predict_uncertainty(s * x, 100, seed=1)["epistemic"].mean()
        for s in (1, 4)
    )
    assert far > 3 * near > 0


def test_uncertainty_of_regression_is_that_of_the_draws():
    model, x = small_model(), rng.normal(size=(4, 3)).astype("float32")
    draws = model.draw(x, 50, seed=1)
    found = model.predict_uncertainty(x, 50, seed=1)
    assert draws.shape == (50, 4, 2)
    assert set(found) == {"mean", "epistemic"}
    assert_close(found["mean"], draws.mean(0))
    assert_close(found["epistemic"], draws.var(0))
    other = model.predict_uncertainty(x, 50)
    assert np.abs(other["mean"] - found["mean"]).max() > 1e-4


@pytest.mark.parametrize("activation", ["softmax", None])
def test_uncertainty_of_classes_adds_up(activation):
    model = small_model(num_classes=3, classifier_activation=activation)
    found = model.predict_uncertainty(rng.normal(size=(4, 3)).astype("float32"), 50)
    mean = found["mean"]
    assert_close(mean.sum(-1), np.ones(4))
    assert_close(found["epistemic"] + found["aleatoric"], mean * (1 - mean))
    assert (found["epistemic"] > 0).all()


def test_uncertainty_survives_saving(tmp_path):
    model, x = small_model(num_classes=3), rng.normal(size=(4, 3)).astype("float32")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is BayesianModel
    first, second = (m.predict_uncertainty(x, 5, seed=2) for m in (model, loaded))
    for name in ("mean", "epistemic", "aleatoric"):
        assert_close(first[name], second[name], 1e-6)


def test_inference_draws_only_if_asked():
    x = rng.normal(size=(4, 3)).astype("float32")
    fixed, drawing = small_model(), small_model(sample_at_inference=True)
    assert_close(fixed.predict(x, verbose=0), fixed.predict(x, verbose=0), 0)
    first, second = (drawing.predict(x, verbose=0) for _ in range(2))
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize("estimator", ESTIMATORS[1:])  # the first: conformance
def test_every_estimator_trains(estimator):
    model = small_model(estimator=estimator, kl_weight=1e-3, **MIXTURE)
    x = rng.normal(size=(32, 3)).astype("float32")
    model.compile(keras.optimizers.Adam(1e-2), loss="mse")
    before = model.evaluate(x, x[:, :2], verbose=0)
    rho = to_numpy(model.layers[1].kernel_rho)
    model.fit(x, x[:, :2], epochs=10, verbose=0)
    assert model.evaluate(x, x[:, :2], verbose=0) < before
    assert np.abs(to_numpy(model.layers[1].kernel_rho) - rho).min() > 0


@pytest.mark.parametrize(("width", "size"), [(400, 956_820), (1200, 4_790_420)])
def test_published_sizes(width, size):
    model = keras_edifice.build("bayesian", input_size=784, hidden_sizes=[width, width])
    assert sum(np.prod(w.shape) for w in model.trainable_variables) == size


def test_layer_names_its_choices():
    with pytest.raises(
        ValueError, match="estimator must be one of .*'flipout'.*'best'"
    ):
        BayesianDense(2, estimator="best")


def test_a_draw_needs_a_number():
    with pytest.raises(ValueError, match="num_samples must be at least 1, received 0"):
        small_model().predict_uncertainty(np.ones((1, 3), "float32"), 0)


def test_gaussian_divergence_of_one_weight():
    assert_close(gaussian_kl(0.5, 1.0, 1.0), 0.125)
