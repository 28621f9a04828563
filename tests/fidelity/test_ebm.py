import keras
import numpy as np
import pytest
import torch

import keras_edifice
from keras_edifice.energy.ebm import langevin
from tests.support.close import assert_close, difference, to_numpy
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake

ARCHITECTURE = "ebm"
STEPS, ALPHA = 5, 0.7
STEP_SIZE, NOISE_SCALE, GRAD_CLIP, CLAMP = 0.6, 0.05, 0.2, (0.0, 1.0)


class Reference:
    """Dense silu network, its Langevin chain and its loss; NumPy in float64."""

    def __init__(self, weights):
        self.weights = [np.asarray(w, "float64") for w in weights]

    def energy(self, x):
        w1, b1, w2, b2, w3, b3 = self.weights
        for w, b in ((w1, b1), (w2, b2)):
            x = x @ w + b
            x = x / (1.0 + np.exp(-x))
        return (x @ w3 + b3)[:, 0]

    def input_gradient(self, x):
        return numerical_gradient(lambda x: self.energy(x).sum(), x)

    def chain(self, x, noise):
        for e in noise:
            x = x + NOISE_SCALE * e
            slope = np.clip(self.input_gradient(x), -GRAD_CLIP, GRAD_CLIP)
            x = np.clip(x - STEP_SIZE * slope, *CLAMP)
        return x

    def loss(self, real, unreal):
        real, unreal = self.energy(real), self.energy(unreal)
        return real.mean() - unreal.mean() + ALPHA * np.mean(real**2 + unreal**2)

    def loss_gradients(self, real, unreal):
        found = []
        for i, weight in enumerate(list(self.weights)):

            def loss(w, i=i):
                kept, self.weights[i] = self.weights[i], w
                value = self.loss(real, unreal)
                self.weights[i] = kept
                return value

            found.append(numerical_gradient(loss, weight))
        return found


def test_chain_loss_and_gradient_are_those_of_numpy(fidelity, monkeypatch):
    rng = np.random.default_rng(0)
    model = shake(
        keras_edifice.build(
            ARCHITECTURE,
            input_size=3,
            hidden_sizes=[7, 5],
            langevin_steps=STEPS,
            step_size=STEP_SIZE,
            noise_scale=NOISE_SCALE,
            grad_clip=GRAD_CLIP,
            clamp=list(CLAMP),
            reg_alpha=ALPHA,
        )
    )
    network = model.get_layer("network")
    reference = Reference(network.get_weights())
    x, start, noise = (
        rng.uniform(size=(6, 3)),
        rng.uniform(size=(6, 3)),
        rng.normal(size=(STEPS, 6, 3)),
    )
    x, start, noise = (a.astype("float32") for a in (x, start, noise))
    unreal = reference.chain(start, noise)
    assert np.abs(unreal - start).max() > 0.1

    buffer = model.get_layer("replay_buffer")
    monkeypatch.setattr(buffer, "draw", lambda n, prob: torch.as_tensor(start))
    monkeypatch.setattr(keras.random, "normal", lambda *a, **k: torch.as_tensor(noise))
    ours = torch.as_tensor(x).requires_grad_()
    energies = model(ours)
    loss = model.compute_loss(ours, None, energies, training=True)
    loss.backward()

    kept = to_numpy(buffer.samples)[: len(start)]
    forward = max(
        difference(energies[:, 0], reference.energy(x)),
        difference(kept, unreal),
        difference(loss, reference.loss(x, unreal)),
    )
    by_input = numerical_gradient(lambda x: reference.loss(x, unreal), x)
    pairs = [(ours.grad, by_input)] + [
        (weight.value.grad, expected)
        for weight, expected in zip(
            network.trainable_variables,
            reference.loss_gradients(x, unreal),
            strict=True,
        )
    ]
    fidelity.record(
        ARCHITECTURE,
        "float64 NumPy: one chain with given noise, the loss and its gradient",
        forward=forward,
        gradient=max(difference(a, b) for a, b in pairs),
    )


def test_unadjusted_chain_is_that_of_numpy():
    rng = np.random.default_rng(1)
    x, noise = rng.normal(size=(4, 3)), rng.normal(size=(6, 4, 3))
    found = langevin(
        lambda x: (x**4).sum(-1) / 4,
        torch.as_tensor(x.astype("float32")),
        torch.as_tensor(noise.astype("float32")),
        step_size=0.1,
        sampler="ula",
    )
    for e in noise:
        x = x - 0.05 * x**3 + np.sqrt(0.1) * e
    assert_close(found, x)


class TorchImageEnergy(torch.nn.Module):
    """The residual network of IGEBM from its description, in torch's own layers.

    Every kernel is divided by its largest singular value, taken from a full
    decomposition; the second of each block only as far as it is above one.
    """

    def __init__(self, model, sizes, num_classes):
        super().__init__()
        network = model.get_layer("network")
        self.layers = {layer.name: layer for layer in network.layers}
        self.sizes, self.num_classes = sizes, num_classes
        self.parameters_by_path = {
            w.path: torch.tensor(to_numpy(w), dtype=torch.float64, requires_grad=True)
            for w in network.trainable_variables
        }

    def weight(self, layer, name):
        return self.parameters_by_path[getattr(self.layers[layer], name).path]

    def conv(self, x, name, bias, bound=False):
        kernel = self.weight(name, "kernel").permute(3, 2, 0, 1)
        sigma = torch.linalg.svdvals(kernel.reshape(kernel.shape[0], -1))[0]
        scale = sigma.clamp(max=1) / (sigma + 1e-6) if bound else 1 / sigma
        bias = self.weight(name, "bias") if bias else None
        return torch.nn.functional.conv2d(x, kernel * scale, bias, padding="same")

    def affine(self, x, name, label):
        if label is None:
            return x
        scale, shift = (self.weight(name, n)[label] for n in ("scale", "shift"))
        return x * scale.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1)

    def block(self, x, name, downsample, label):
        slope = 0.2
        h = self.conv(x, f"{name}_conv_0", label is None)
        h = self.affine(h, f"{name}_affine_0", label)
        h = torch.nn.functional.leaky_relu(h, slope)
        h = self.conv(h, f"{name}_conv_1", label is None, bound=True)
        h = self.affine(h, f"{name}_affine_1", label)
        if f"{name}_shortcut" in self.layers:
            x = self.conv(x, f"{name}_shortcut", False)
        h = h + x
        h = torch.nn.functional.avg_pool2d(h, 2) if downsample else h
        return torch.nn.functional.leaky_relu(h, slope)

    def forward(self, x, label=None):
        x = self.conv(x.permute(0, 3, 1, 2), "stem", True)
        x = torch.nn.functional.leaky_relu(x, 0.2)
        for i in range(len(self.sizes)):
            for j in range(2):
                x = self.block(x, f"stage_{i}_block_{j}", j == 0, label)
        x = torch.relu(x).sum((2, 3))
        return x @ self.weight("energies", "kernel") + self.weight("energies", "bias")


@pytest.mark.parametrize("num_classes", [None, 3])
def test_image_network_is_that_of_igebm(num_classes):
    keras.utils.set_random_seed(0)
    sizes = [4, 6]
    model = shake(
        keras_edifice.build(
            ARCHITECTURE,
            variant="igebm_cifar10",
            image_size=8,
            hidden_sizes=sizes,
            num_classes=num_classes,
            classifier_activation=None,
            buffer_size=4,
        )
    )
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(3, 8, 8, 3)).astype("float32")
    for _ in range(300):  # the power iteration converges to the singular value
        model(x[:1], training=True)
    ours = torch.as_tensor(x).requires_grad_()
    found = model.get_layer("network")(ours)
    found.square().sum().backward()

    reference = TorchImageEnergy(model, sizes, num_classes)
    theirs = torch.as_tensor(x, dtype=torch.float64).requires_grad_()
    labels = [None] if num_classes is None else range(num_classes)
    y = torch.cat([reference(theirs, label) for label in labels], -1)
    y.square().sum().backward()

    assert difference(found, y) < 1e-4
    assert difference(ours.grad, theirs.grad) < 1e-4
    for weight in model.get_layer("network").trainable_variables:
        expected = reference.parameters_by_path[weight.path].grad
        assert difference(weight.value.grad, expected) < 1e-4, weight.path
