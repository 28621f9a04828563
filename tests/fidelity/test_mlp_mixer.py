import keras
import numpy as np
import torch
from torch import nn

import keras_edifice
from tests.support.close import difference, to_numpy
from tests.support.gradients import gradients

rng = np.random.default_rng(0)
OPTIONS = dict(
    image_size=32,
    patch_size=8,
    embed_size=32,
    num_layers=2,
    token_mlp_dim=24,
    channel_mlp_dim=128,
    num_classes=10,
    classifier_activation=None,
)


class Mlp(nn.Sequential):
    def __init__(self, size, hidden):
        super().__init__(nn.Linear(size, hidden), nn.GELU(), nn.Linear(hidden, size))


class Mixer(nn.Module):
    """Figure 1 and equation 1 of the paper, in layers of PyTorch."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(32, eps=1e-6) for _ in range(5))
        self.mlps = nn.ModuleList(
            Mlp(*sizes) for _ in range(2) for sizes in [(16, 24), (32, 128)]
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2)  # (b, channels, tokens)
        tokens_1, channels_1, tokens_2, channels_2 = self.mlps
        norm_1, norm_2, norm_3, norm_4, last = self.norms
        x = x + tokens_1(norm_1(x.mT).mT)
        x = x + channels_1(norm_2(x.mT)).mT
        x = x + tokens_2(norm_3(x.mT).mT)
        x = x + channels_2(norm_4(x.mT)).mT
        return self.head(last(x.mT).mean(1))


def peer():
    model = Mixer()
    for parameter in model.parameters():
        noise = torch.as_tensor(0.3 * rng.normal(size=parameter.shape)).float()
        parameter.data = parameter.data + noise
    return model


def by_path(model, of):
    """Path of our weight -> `of` the peer's parameter, in our layout."""

    def dense(path, module):
        found[f"{path}/kernel"], found[f"{path}/bias"] = (
            of(module.weight).T,
            of(module.bias),
        )

    def norm(path, module):
        found[f"{path}/gamma"], found[f"{path}/beta"] = (
            of(module.weight),
            of(module.bias),
        )

    found = {
        "patches/projection/kernel": of(model.patches.weight).permute(2, 3, 1, 0),
        "patches/projection/bias": of(model.patches.bias),
    }
    names = [f"block{i}_{kind}" for i in (1, 2) for kind in ("tokens", "channels")]
    for name, before, mlp in zip(names, model.norms[:-1], model.mlps, strict=True):
        norm(f"{name}_norm", before)
        dense(f"{name}/first", mlp[0])
        dense(f"{name}/second", mlp[2])
    norm("norm", model.norms[-1])
    dense("predictions", model.head)
    return {path: value.detach().numpy() for path, value in found.items()}


def test_mlp_mixer_is_that_of_the_paper_in_torch_layers(fidelity):
    reference, model = peer(), keras_edifice.build("mlp_mixer", **OPTIONS)
    values = by_path(reference, lambda p: p)
    assert set(values) == {w.path for w in model.weights}
    for weight in model.weights:
        weight.assign(values[weight.path])

    x = rng.normal(size=(2, 32, 32, 3)).astype("float32")
    pixels = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    expected = reference(pixels)
    expected.square().sum().backward()
    forward = difference(model(x), to_numpy(expected))

    by_weight, by_input = gradients(
        model, x, lambda y: keras.ops.sum(keras.ops.square(y))
    )
    wanted = by_path(reference, lambda p: p.grad)
    pairs = [
        (g, wanted[w.path])
        for g, w in zip(by_weight, model.trainable_variables, strict=True)
    ]
    pairs += [(by_input, pixels.grad.numpy().transpose(0, 2, 3, 1))]
    gradient = max(difference(*pair) for pair in pairs)
    fidelity.record(
        "mlp_mixer", "torch.nn layers joined as in equation 1", forward, gradient
    )
