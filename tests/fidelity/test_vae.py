import keras
import numpy as np
import torch
from torch.distributions import Normal, kl_divergence

import keras_edifice
from tests.support.close import assert_close, difference, to_numpy
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake

rng = np.random.default_rng(0)
SIZES = dict(input_size=6, latent_size=3, encoder_sizes=[7, 5], decoder_sizes=[4])
LAYERS = ["encoder_dense_0", "encoder_dense_1", "encoder_mu", "encoder_log_var"]
STD, BETA = 0.7, 1.5


def reference(x, w, noise):
    """The equations in float64: reconstruction, μ, log σ² for the given noise."""
    h = x
    for kernel, bias in w[:2]:
        h = np.tanh(h @ kernel + bias)
    mean, log_var = (h @ kernel + bias for kernel, bias in w[2:4])
    z = mean + np.exp(0.5 * log_var) * noise
    for kernel, bias in w[4:-1]:
        z = np.tanh(z @ kernel + bias)
    return z @ w[-1][0] + w[-1][1], mean, log_var


def loss(x, reconstruction, mean, log_var, likelihood):
    if likelihood == "gaussian":
        fit = ((x - reconstruction) ** 2).sum(-1) / (2 * STD**2)
        fit = fit + x.shape[-1] / 2 * np.log(2 * np.pi * STD**2)
    else:
        fit = (np.logaddexp(0, reconstruction) - x * reconstruction).sum(-1)
    kl = 0.5 * (mean**2 + np.exp(log_var) - 1 - log_var).sum(-1)
    return (fit + BETA * kl).mean()


def drawn_noise(model, x):
    """The noise of the draw that a training pass with the same seed makes."""
    sampler = model.get_layer("sample")
    encoded = model.encoder(x)
    zeros = keras.ops.zeros_like(encoded["mu"])
    state = sampler.noise.state.numpy()
    noise = to_numpy(sampler.draw(zeros, zeros))  # μ = 0 and σ = 1 leave ε
    sampler.noise.state.assign(state)
    return noise


def compare(likelihood, training):
    model = shake(
        keras_edifice.build(
            "vae",
            activation="tanh",
            likelihood=likelihood,
            decoder_std=STD,
            beta=BETA,
            **SIZES,
        )
    )
    x = rng.uniform(size=(3, 6)).astype("float32")
    layers = [model.encoder.get_layer(name) for name in LAYERS]
    names = ["decoder_dense_0", "decoder_output"]
    layers += [model.decoder.get_layer(name) for name in names]
    weights = [[to_numpy(layer.kernel), to_numpy(layer.bias)] for layer in layers]
    noise = drawn_noise(model, x) if training else np.zeros((3, 3))
    state = model.get_layer("sample").noise.state.numpy()

    def objective(y):
        return model.compute_loss(x=x, y_pred=y, training=training)

    by_weight, _ = gradients(model, x, objective, training=training)
    found = {
        v.path: g for v, g in zip(model.trainable_variables, by_weight, strict=True)
    }
    pairs = []
    for i, layer in enumerate(layers):
        for j, variable in enumerate((layer.kernel, layer.bias)):

            def moved(w, i=i, j=j):
                changed = [list(pair) for pair in weights]
                changed[i][j] = w
                return loss(x, *reference(x, changed, noise), likelihood)

            expected = numerical_gradient(moved, weights[i][j])
            pairs.append((found[variable.path], expected))
    model.get_layer("sample").noise.state.assign(state)
    y = model(x, training=training)
    expected = reference(x, weights, noise)
    outputs = [y["reconstruction"], y["mu"], y["log_var"]]
    forward = [difference(a, b) for a, b in zip(outputs, expected, strict=True)]
    value = to_numpy(objective(y))
    forward += [difference([value], [loss(x, *expected, likelihood)])]
    return max(forward), max(difference(a, b) for a, b in pairs)


def test_kl_equals_that_of_torch():
    mean, log_var = rng.normal(size=(2, 5, 3))
    posterior = Normal(torch.tensor(mean), torch.tensor(np.exp(0.5 * log_var)))
    prior = Normal(torch.zeros(3).double(), torch.ones(3).double())
    expected = kl_divergence(posterior, prior).sum(-1)
    model = keras_edifice.build("vae", **SIZES)
    assert_close(model.kl_divergence(mean, log_var), expected.numpy())


def test_vae_equals_the_equations(fidelity):
    measured = [
        compare(likelihood, training)
        for likelihood in ("gaussian", "bernoulli")
        for training in (False, True)
    ]
    fidelity.record(
        "vae",
        "float64 NumPy of outputs, bound and draw",
        forward=max(forward for forward, _ in measured),
        gradient=max(gradient for _, gradient in measured),
    )
