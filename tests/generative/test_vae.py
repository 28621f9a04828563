import keras
import numpy as np
import pytest

import keras_edifice
from keras_edifice.generative.vae import GaussianSample
from tests.support.close import assert_close, difference, to_numpy
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake

rng = np.random.default_rng(0)


def small(**options):
    sizes = dict(input_size=6, latent_size=3, encoder_sizes=[5], decoder_sizes=[4])
    given = {**sizes, "activation": "tanh", **options}
    keras.utils.set_random_seed(0)
    return shake(keras_edifice.build("vae", **given))


HEADS = ["encoder_dense_0", "encoder_mu", "encoder_log_var"]
DECODER = ["decoder_dense_0", "decoder_output"]


def variables(model):
    """Kernel and bias of each layer in the order of the equations."""
    layers = [model.encoder.get_layer(name) for name in HEADS]
    layers += [model.decoder.get_layer(name) for name in DECODER]
    return [v for layer in layers for v in (layer.kernel, layer.bias)]


def data(n=4, size=6):
    return rng.uniform(size=(n, size)).astype("float32")


def reference_outputs(x, weights):
    """The equations in float64 on the path z = μ."""
    w = [to_numpy(v) for v in weights]
    h = np.tanh(x @ w[0] + w[1])
    mean, log_var = h @ w[2] + w[3], h @ w[4] + w[5]
    h = np.tanh(mean @ w[6] + w[7])
    return h @ w[8] + w[9], mean, log_var


def reference_loss(x, reconstruction, mean, log_var, likelihood, std, beta):
    """-ELBO in float64, summed over features and latents, mean over the batch."""
    if likelihood == "gaussian":
        fit = ((x - reconstruction) ** 2 / (2 * std**2)).sum(-1)
        fit = fit + x.shape[1] / 2 * np.log(2 * np.pi * std**2)
    else:
        p = 1 / (1 + np.exp(-reconstruction))
        fit = -(x * np.log(p) + (1 - x) * np.log(1 - p)).sum(-1)
    kl = 0.5 * (mean**2 + np.exp(log_var) - 1 - log_var).sum(-1)
    return (fit + beta * kl).mean()


LIKELIHOODS = [
    dict(likelihood="gaussian", decoder_std=0.7, beta=1.0),
    dict(likelihood="bernoulli", decoder_std=1.0, beta=4.0),
]


def test_outputs_are_the_equations_on_the_mean_path():
    model, x = small(), data()
    y = model(x)
    reconstruction, mean, log_var = reference_outputs(x, variables(model))
    assert_close(y["reconstruction"], reconstruction)
    assert_close(y["mu"], mean)
    assert_close(y["log_var"], log_var)


@pytest.mark.parametrize("options", LIKELIHOODS, ids=["gaussian", "bernoulli"])
def test_evaluate_gives_the_negative_bound(options):
    model, x = small(**options), data()
    model.compile("adam")
    logs = model.evaluate(x, verbose=0, return_dict=True)
    y = reference_outputs(x, variables(model))
    assert_close(logs["loss"], reference_loss(x, *y, *options.values()))
    parts = logs["reconstruction"] + options["beta"] * logs["kl"]
    assert_close(logs["loss"], parts)


def loss_of(model, x):
    """The loss as a function of the outputs, without the log's state."""

    def loss(y):
        fit = model.log_likelihood(x, y["reconstruction"])
        kl = model.kl_divergence(y["mu"], y["log_var"])
        return keras.ops.mean(model.options["beta"] * kl - fit)

    return loss


@pytest.mark.parametrize("options", LIKELIHOODS, ids=["gaussian", "bernoulli"])
def test_gradient_of_the_loss_is_that_of_the_equations(options):
    model, x = small(**options), data(2)
    by_weight, _ = gradients(model, x, loss_of(model, x))
    weights = [to_numpy(v) for v in variables(model)]
    paths = [v.path for v in variables(model)]
    for variable, gradient in zip(model.trainable_variables, by_weight, strict=True):
        i = paths.index(variable.path)

        def loss(w, i=i):
            y = reference_outputs(x, [*weights[:i], w, *weights[i + 1 :]])
            return reference_loss(x, *y, *options.values())

        assert_close(gradient, numerical_gradient(loss, weights[i]), 1e-4)


def test_one_step_of_fit_follows_the_loss():
    # Almost no variance: the draw is the mean, and the step is the gradient's.
    model, x = small(encoder_sizes=[]), data()
    kernel, bias = model.encoder.get_layer("encoder_log_var").weights
    kernel.assign(np.zeros(kernel.shape))
    bias.assign(np.full(bias.shape, -25.0))
    before = [to_numpy(w) for w in model.trainable_variables]
    by_weight, _ = gradients(model, x, loss_of(model, x))
    model.compile(keras.optimizers.SGD(1.0))
    model.fit(x, batch_size=4, verbose=0)
    after = model.trainable_variables
    for old, new, gradient in zip(before, after, by_weight, strict=True):
        assert_close(old - to_numpy(new), gradient, 1e-4)


def test_kl_is_that_of_two_normal_distributions():
    # By quadrature of q log(q/p) in float64, one latent at a time.
    mean, log_var = rng.normal(size=(2, 5, 3))
    z = np.linspace(-30, 30, 200_001)
    expected = np.zeros(5)
    for i, k in np.ndindex(5, 3):
        s = np.exp(0.5 * log_var[i, k])
        log_q = -0.5 * ((z - mean[i, k]) / s) ** 2 - np.log(s)
        q = np.exp(log_q) / np.sqrt(2 * np.pi)
        expected[i] += (q * (log_q + 0.5 * z**2)).sum() * (z[1] - z[0])
    assert_close(small().kl_divergence(mean, log_var), expected)


def test_kl_is_zero_for_the_prior_alone():
    model, zeros = small(), np.zeros((1, 3), "float32")
    assert_close(model.kl_divergence(zeros, zeros), [0.0], 0)
    for k in range(3):
        moved = zeros.copy()
        moved[0, k] = 0.3
        assert to_numpy(model.kl_divergence(moved, zeros))[0] > 1e-2
        assert to_numpy(model.kl_divergence(zeros, moved))[0] > 1e-2
        assert to_numpy(model.kl_divergence(zeros, -moved))[0] > 1e-2


def linear_gaussian(std=0.6):
    """x = W z + b + std ε with orthogonal columns, and its exact posterior."""
    model = small(encoder_sizes=[], decoder_sizes=[], decoder_std=std)
    w = np.linalg.qr(rng.normal(size=(6, 3)))[0] * [1.5, 1.0, 0.5]
    b = rng.normal(size=6)
    variance = 1 / (1 + (w**2).sum(0) / std**2)
    gain = (w / std**2) * variance  # μ(x) = (x - b) gain
    log_var = np.log(variance)
    model.encoder.get_layer("encoder_mu").set_weights([gain, -b @ gain])
    model.encoder.get_layer("encoder_log_var").set_weights([np.zeros((6, 3)), log_var])
    model.decoder.get_layer("decoder_output").set_weights([w.T, b])
    cov = w @ w.T + std**2 * np.eye(6)

    def log_density(x):
        d = x - b
        quadratic = (d @ np.linalg.inv(cov) * d).sum(-1)
        return -0.5 * (quadratic + np.linalg.slogdet(2 * np.pi * cov)[1])

    return model, log_density


def test_bound_with_the_exact_posterior_is_the_density():
    model, log_density = linear_gaussian()
    x = data(3)
    # p(x, z) / q(z|x) = p(x) for every z: one draw is exact.
    for k in (1, 4):
        assert_close(model.importance_bound(x, k, seed=k), log_density(x), 1e-4)
    # The ELBO averages log p(x|z) over draws: 4000 of them leave about 0.03.
    wide = np.repeat(x, 400, 0)
    bound = model.elbo(wide, num_samples=10, seed=0).reshape(3, 400).mean(-1)
    assert_close(bound, log_density(x), 0.1)


def test_importance_bound_rises_from_the_elbo_with_draws():
    model, x = small(decoder_std=0.3), np.repeat(data(1), 3000, 0)
    bounds = [model.importance_bound(x, k, seed=k).mean() for k in (1, 2, 8, 32)]
    elbo = model.elbo(x, 4, seed=0).mean()
    noise = model.importance_bound(x, 1, seed=9).std() / np.sqrt(3000)
    assert abs(bounds[0] - elbo) < 5 * noise  # one draw is the ELBO in expectation
    assert bounds[1] > bounds[0] + 3 * noise
    assert bounds[2] > bounds[1]
    assert bounds[3] > bounds[2]


def test_expected_gradient_by_draws_is_that_of_the_expected_loss():
    model, _ = linear_gaussian(1.0)
    head = model.encoder.get_layer("encoder_mu")
    shake(model, 0.1)
    row = data(1)
    x = np.repeat(row, 40_000, 0)
    by_weight, _ = gradients(model, x, loss_of(model, x), training=True)
    found = {
        v.path: g for v, g in zip(model.trainable_variables, by_weight, strict=True)
    }
    weights = {v.path: to_numpy(v) for v in model.trainable_variables}
    spread = model.encoder.get_layer("encoder_log_var")
    output = model.decoder.get_layer("decoder_output")

    def expected_loss(bias):
        mean = row[0] @ weights[head.kernel.path] + bias
        log_var = row[0] @ weights[spread.kernel.path] + weights[spread.bias.path]
        w, b = weights[output.kernel.path], weights[output.bias.path]
        # E ‖x - W z - b‖² = ‖x - W μ - b‖² + Σ σ² ‖w‖²
        squares = ((row[0] - mean @ w - b) ** 2).sum()
        squares += (np.exp(log_var) * (w**2).sum(-1)).sum()
        return 0.5 * (squares + (mean**2 + np.exp(log_var) - 1 - log_var).sum())

    expected = numerical_gradient(expected_loss, weights[head.bias.path])
    # 40,000 draws leave about 0.5 %.
    assert_close(found[head.bias.path], expected, 0.03)


def test_draws_have_the_moments_of_the_posterior():
    mean = np.tile([[1.0, -2.0]], (50_000, 1)).astype("float32")
    log_var = np.tile([[0.0, -2.0]], (50_000, 1)).astype("float32")
    z = to_numpy(GaussianSample(seed=1)(mean, log_var, training=True))
    assert_close(z.mean(0), [1.0, -2.0], 0.02)  # 50,000 draws leave about 0.005
    assert_close(z.std(0), [1.0, np.exp(-1.0)], 0.02)


def test_inference_takes_the_mean_and_training_draws():
    model, x = small(), data()
    assert_close(model(x)["reconstruction"], model.decoder(model(x)["mu"]), 1e-6)
    drawn = [model(x, training=True)["reconstruction"] for _ in range(2)]
    assert difference(*drawn) > 1e-3


def test_log_variance_is_clipped():
    model = small(encoder_sizes=[])
    head = model.encoder.get_layer("encoder_log_var")
    head.set_weights([np.zeros((6, 3)), np.array([-100.0, 0.5, 100.0])])
    assert_close(model(data(1))["log_var"], [[-30.0, 0.5, 20.0]])


def test_weight_of_the_kl_rises_with_the_batches_of_training():
    model, x = small(kl_warmup_steps=4, beta=2.0), np.repeat(data(1), 8, 0)
    model.compile(keras.optimizers.SGD(0.0))
    logs = model.fit(x, batch_size=4, epochs=3, verbose=0, validation_data=(x,)).history
    # Two batches an epoch: weights 1/4 and 2/4, then 3/4 and 1, then 1 and 1.
    weights = np.subtract(logs["loss"], logs["reconstruction"]) / np.array(logs["kl"])
    assert_close(weights, [0.75, 1.75, 2.0], 1e-4)
    validation = np.subtract(logs["val_loss"], logs["val_reconstruction"])
    assert_close(validation / np.array(logs["val_kl"]), [2.0, 2.0, 2.0], 1e-4)
    assert to_numpy(model.get_layer("sample").step) == 6


def test_fit_needs_no_targets_and_reports_both_parts():
    model, x = small(), data(16)
    model.compile("adam")
    logs = model.fit(x, batch_size=8, verbose=0, validation_data=(x, x)).history
    parts = ["kl", "loss", "reconstruction"]
    assert sorted(logs) == sorted([*parts, *(f"val_{part}" for part in parts)])


def test_sample_weight_weighs_examples():
    model, x = small(), data(4)
    model.compile("adam")
    weight = np.array([2.0, 2.0, 0.0, 0.0])
    weighted = model.evaluate(x, x, sample_weight=weight, verbose=0, return_dict=True)
    alone = model.evaluate(x[:2], verbose=0, return_dict=True)
    for part in alone:
        assert_close(weighted[part], alone[part])


def test_more_draws_have_less_noise():
    x, spread = data(8), []
    for num_samples in (1, 9):
        model = small(num_samples=num_samples)
        model.compile(keras.optimizers.SGD(0.0))
        losses = model.fit(x, epochs=12, verbose=0, shuffle=False).history["loss"]
        spread.append(np.std(losses))
    assert spread[1] < 0.6 * spread[0]  # a third in expectation


def test_training_does_not_collapse_onto_the_prior():
    # Two clusters far apart in 20 features: with the squared error summed, as it must
    # be, the latent tells them apart.
    side = np.sign(rng.normal(size=(256, 1)))
    x = (side * np.ones((1, 20)) + 0.3 * rng.normal(size=(256, 20))).astype("float32")
    keras.utils.set_random_seed(0)
    model = keras_edifice.build(
        "vae", input_size=20, latent_size=2, encoder_sizes=[16], decoder_sizes=[16]
    )
    model.compile(keras.optimizers.Adam(1e-2))
    logs = model.fit(x, batch_size=32, epochs=15, verbose=0).history
    assert logs["kl"][-1] > 0.5
    error = np.square(x - model.predict(x, verbose=0)["reconstruction"]).mean()
    assert error < 0.3  # the data have 1.09 about zero, 0.09 within the clusters


def test_parts_are_models_also_after_loading(tmp_path):
    model, x = small(kl_warmup_steps=2), data()
    model.save(tmp_path / "vae.keras")
    loaded = keras.saving.load_model(tmp_path / "vae.keras")
    for each in (model, loaded):
        assert isinstance(each.encoder, keras.Model)
        assert each.encoder is each.get_layer("encoder")
        assert each.decoder is each.get_layer("decoder")
    assert_close(loaded.encoder(x)["mu"], model(x)["mu"], 1e-6)
    assert_close(loaded.sample(2, seed=3), model.sample(2, seed=3), 1e-6)
    assert_close(loaded.elbo(x, seed=3), model.elbo(x, seed=3), 1e-5)
    loaded.compile("adam")
    loaded.fit(x, verbose=0)
    loaded.decoder.save(tmp_path / "decoder.keras")
    decoder = keras.saving.load_model(tmp_path / "decoder.keras")
    z = rng.normal(size=(2, 3)).astype("float32")
    assert_close(decoder(z), loaded.decoder(z), 1e-6)


def test_samples_are_means_of_the_likelihood():
    for likelihood in ("gaussian", "bernoulli"):
        model = small(likelihood=likelihood)
        x = model.sample(5, seed=1)
        assert x.shape == (5, 6)
        assert_close(x, model.sample(5, seed=1), 0)
        assert difference(x, model.sample(5, seed=2)) > 1e-3
        inside = (x > 0).all() and (x < 1).all()
        assert inside == (likelihood == "bernoulli")


def test_convolutional_form_trains_on_images():
    keras.utils.set_random_seed(0)
    model = keras_edifice.build(
        "vae",
        input_size=8 * 8 * 2,
        num_channels=2,
        architecture="conv",
        encoder_sizes=[3, 5],
        decoder_sizes=[4, 3],
        latent_size=2,
        likelihood="bernoulli",
    )
    x = rng.uniform(size=(4, 8, 8, 2)).astype("float32")
    y = model(x)
    assert y["reconstruction"].shape == (4, 8, 8, 2)
    assert y["mu"].shape == y["log_var"].shape == (4, 2)
    assert model.encoder.get_layer("encoder_conv_1").output.shape == (None, 2, 2, 5)
    logits = to_numpy(y["reconstruction"])
    expected = (x * logits - np.logaddexp(0, logits)).sum((1, 2, 3))
    assert_close(model.log_likelihood(x, y["reconstruction"]), expected)
    model.compile(keras.optimizers.Adam(1e-2))
    before = model.evaluate(x, verbose=0, return_dict=True)["loss"]
    model.fit(x, epochs=8, verbose=0)
    assert model.evaluate(x, verbose=0, return_dict=True)["loss"] < before


def test_images_that_cannot_be_halved_are_refused():
    options = dict(architecture="conv", encoder_sizes=[4, 4], decoder_sizes=[4])
    for size in (48, 36):
        with pytest.raises(ValueError, match="input_size must be side") as caught:
            keras_edifice.build("vae", input_size=size, **options)
        assert str(size) in str(caught.value)


def test_bounds_need_a_draw():
    with pytest.raises(ValueError, match="num_samples must be >= 1"):
        small().elbo(data(), num_samples=0)


def test_published_sizes():
    mnist = keras_edifice.build(
        "vae",
        input_size=784,
        latent_size=20,
        encoder_sizes=[500],
        decoder_sizes=[500],
        activation="tanh",
        likelihood="bernoulli",
    )
    assert mnist.count_params() == 815_824
    path = keras_edifice.build(
        "vae",
        input_size=784,
        latent_size=32,
        encoder_sizes=[512, 256],
        decoder_sizes=[256, 512],
    )
    assert path.count_params() == 1_091_920
