import numpy as np
import torch
from bayesian_torch.layers import LinearFlipout, LinearReparameterization
from keras import ops

import keras_edifice
from tests.support.close import difference
from tests.support.shaking import shake

ARCHITECTURE = "bayesian"
PRIOR_SIGMA = 0.7


def recorded_signs(monkeypatch):
    """The signs that the reference draws, in order."""
    drawn, uniform = [], torch.Tensor.uniform_

    def record(self, *args):
        drawn.append(uniform(self, *args).detach().sign())
        return self

    monkeypatch.setattr(torch.Tensor, "uniform_", record)
    return drawn


def copy_weights(model, references):
    for layer, reference in zip(model.layers[1:], references, strict=True):
        arrays = (
            reference.mu_weight.T,
            reference.rho_weight.T,
            reference.mu_bias,
            reference.rho_bias,
        )
        for weight, array in zip(layer.trainable_variables, arrays, strict=True):
            weight.assign(array.detach().numpy())


def give_draws(model, references, signs):
    """Our layers draw what the reference drew."""
    signs = iter(signs)
    for layer, reference in zip(model.layers[1:], references, strict=True):
        noise = iter([reference.eps_weight.T.clone(), reference.eps_bias.clone()])
        layer._normal = lambda shape, seed=None, noise=noise: next(noise)
        layer._signs = lambda shape: next(signs)


def number_of_weights(reference, part):
    return getattr(reference, f"mu_{part}").numel()


def summed_kl(reference):
    """Theirs is a mean for the kernel and a mean for the bias; the bound has sums.

    Their `prior_variance` is used as the standard deviation.
    """
    total = 0.0
    for part in ("weight", "bias"):
        sigma = torch.log1p(torch.exp(getattr(reference, f"rho_{part}")))
        mean = reference.kl_div(
            getattr(reference, f"mu_{part}"),
            sigma,
            getattr(reference, f"prior_{part}_mu"),
            getattr(reference, f"prior_{part}_sigma"),
        )
        total = total + mean * number_of_weights(reference, part)
    return total


def differences(estimator, layer, monkeypatch):
    """Largest differences of outputs and divergence, and of all gradients."""
    torch.manual_seed(0)
    model = keras_edifice.build(
        ARCHITECTURE,
        input_size=5,
        hidden_sizes=[8, 6],
        output_size=3,
        estimator=estimator,
        prior_sigma=PRIOR_SIGMA,
        kl_weight=0.5,
    )
    sizes = [(5, 8), (8, 6), (6, 3)]
    references = [layer(*size, prior_variance=PRIOR_SIGMA) for size in sizes]
    for i, reference in enumerate(references):
        shake(_Parameters(reference), seed=i)
    copy_weights(model, references)
    signs = recorded_signs(monkeypatch)

    x = torch.randn(7, 5, requires_grad=True)
    y, kl = x, 0.0
    for i, reference in enumerate(references):
        y, _ = reference(y)
        y = torch.relu(y) if i < 2 else y
        kl = kl + summed_kl(reference)
    (y.square().sum() + 0.5 * kl).backward()

    give_draws(model, references, signs)
    ours = x.detach().clone().requires_grad_()
    found = model(ours, training=True)
    added = sum(model.losses)
    (ops.sum(ops.square(found)) + added).backward()

    forward = max(difference(found, y), difference(added, 0.5 * kl))
    pairs = [(ours.grad, x.grad)]
    for own, reference in zip(model.layers[1:], references, strict=True):
        theirs = (
            reference.mu_weight.grad.T,
            reference.rho_weight.grad.T,
            reference.mu_bias.grad,
            reference.rho_bias.grad,
        )
        pairs += zip(
            (w.value.grad for w in own.trainable_variables), theirs, strict=True
        )
    return forward, max(difference(a, b) for a, b in pairs)


def test_network_is_that_of_bayesian_torch(fidelity, monkeypatch):
    found = [
        differences("reparameterization", LinearReparameterization, monkeypatch),
        differences("flipout", LinearFlipout, monkeypatch),
    ]
    forward, gradient = (max(values) for values in zip(*found, strict=True))
    fidelity.record(
        ARCHITECTURE,
        "bayesian_torch LinearReparameterization and LinearFlipout",
        forward=forward,
        gradient=gradient,
    )


def test_their_divergence_is_the_mean():
    reference = LinearReparameterization(4, 3, prior_variance=PRIOR_SIGMA)
    layer = keras_edifice.build(
        ARCHITECTURE,
        input_size=4,
        hidden_sizes=[],
        output_size=3,
        prior_sigma=PRIOR_SIGMA,
    ).layers[1]
    kernel = _kl_of(reference.mu_weight, reference.rho_weight)
    bias = _kl_of(reference.mu_bias, reference.rho_bias)
    assert difference(reference.kl_loss(), kernel.mean() + bias.mean()) < 1e-6
    layer.set_weights(
        [
            reference.mu_weight.detach().T.numpy(),
            reference.rho_weight.detach().T.numpy(),
            reference.mu_bias.detach().numpy(),
            reference.rho_bias.detach().numpy(),
            *layer.get_weights()[4:],
        ]
    )
    assert difference(layer.kl(), kernel.sum() + bias.sum()) < 1e-6


def _kl_of(mu, rho):
    mu, sigma = (a.detach().numpy().astype("float64") for a in (mu, rho))
    sigma = np.log1p(np.exp(sigma))
    ratio = (sigma**2 + mu**2) / (2 * PRIOR_SIGMA**2)
    return np.log(PRIOR_SIGMA / sigma) + ratio - 0.5


class _Parameters:
    """The parameters of a torch module, as `shake` takes them."""

    def __init__(self, module):
        self.trainable_variables = [_Parameter(p) for p in module.parameters()]


class _Parameter:
    def __init__(self, parameter):
        self.parameter, self.shape = parameter, parameter.shape

    def numpy(self):
        return self.parameter.detach().numpy()

    def assign(self, array):
        with torch.no_grad():
            self.parameter.copy_(torch.as_tensor(array))
