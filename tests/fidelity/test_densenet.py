import keras
import numpy as np
import torch
from torch import nn

import keras_edifice
from tests.support.close import difference, to_numpy
from tests.support.gradients import gradients

rng = np.random.default_rng(0)
GROWTH, SIZES = 4, [2, 3, 1]


class Unit(nn.Module):
    """Normalisation, rectification, convolution."""

    def __init__(self, inputs, outputs, side):
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False)

    def forward(self, x):
        return self.conv(self.norm(x).relu())


class Peer(nn.Module):
    """DenseNet-BC for ImageNet, or plain DenseNet for CIFAR, of layers of PyTorch."""

    def __init__(self, plain):
        super().__init__()
        self.plain, channels = plain, 2 * GROWTH
        side, strides = (3, 1) if plain else (7, 2)
        self.stem = nn.Conv2d(2, channels, side, strides, side // 2, bias=False)
        self.stem_norm = None if plain else nn.BatchNorm2d(channels)
        self.units = nn.ModuleDict()
        for block, size in enumerate(SIZES, 1):
            if block > 1:
                kept = channels if plain else channels // 2
                self.units[f"transition{block - 1}"] = Unit(channels, kept, 1)
                channels = kept
            for i in range(1, size + 1):
                name, inputs = f"block{block}_layer{i}", channels
                if not plain:
                    self.units[f"{name}_1"] = Unit(inputs, 4 * GROWTH, 1)
                    inputs = 4 * GROWTH
                self.units[f"{name}_2"] = Unit(inputs, GROWTH, 3)
                channels += GROWTH
        self.last_norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, 5)

    def forward(self, x):
        x = self.stem(x)
        if not self.plain:
            x = nn.functional.max_pool2d(self.stem_norm(x).relu(), 3, 2, padding=1)
        for block, size in enumerate(SIZES, 1):
            if block > 1:
                x = self.units[f"transition{block - 1}"](x)
                x = nn.functional.avg_pool2d(x, 2)
            maps = [x]
            for i in range(1, size + 1):
                y, name = torch.cat(maps, 1), f"block{block}_layer{i}"
                if not self.plain:
                    y = self.units[f"{name}_1"](y)
                maps.append(self.units[f"{name}_2"](y))
            x = torch.cat(maps, 1)
        return self.head(self.last_norm(x).relu().mean((2, 3)))


def peer(plain):
    model = Peer(plain).eval()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.dtype == torch.float32:
            noise = torch.as_tensor(0.1 * rng.normal(size=value.shape)).float()
            value.data = noise.abs() + 1 if name.endswith("var") else value.data + noise
    return model


def by_path(model, of):
    """Path of our weight -> `of` the peer's parameter, in our layout."""
    norms = {"last": model.last_norm}
    if model.stem_norm is not None:
        norms["stem"] = model.stem_norm
    found = {"stem_conv/kernel": of(model.stem.weight).permute(2, 3, 1, 0)}
    for name, unit in model.units.items():
        norms[name] = unit.norm
        found[f"{name}_conv/kernel"] = of(unit.conv.weight).permute(2, 3, 1, 0)
    for name, norm in norms.items():
        found[f"{name}_norm/gamma"] = of(norm.weight)
        found[f"{name}_norm/beta"] = of(norm.bias)
        found[f"{name}_norm/moving_mean"] = norm.running_mean
        found[f"{name}_norm/moving_variance"] = norm.running_var
    found["predictions/kernel"] = of(model.head.weight).T
    found["predictions/bias"] = of(model.head.bias)
    return {path: value.detach().numpy() for path, value in found.items()}


def differences(plain):
    reference = peer(plain)
    options = dict(stem="cifar", bn_size=None, compression=1.0) if plain else {}
    model = keras_edifice.build(
        "densenet",
        input_channels=2,
        growth_rate=GROWTH,
        block_sizes=SIZES,
        num_classes=5,
        classifier_activation=None,
        **options,
    )
    values = by_path(reference, lambda p: p)
    assert set(values) == {w.path for w in model.weights}
    for weight in model.weights:
        weight.assign(values[weight.path])

    sides = (11, 14) if plain else (43, 38)  # odd at some block each
    x = rng.normal(size=(2, *sides, 2)).astype("float32")
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
    return forward, max(difference(*pair) for pair in pairs)


def test_densenet_is_the_same_of_layers_of_pytorch(fidelity):
    found = [differences(plain) for plain in (False, True)]
    forward, gradient = np.max(found, axis=0)
    reference = "the layers of PyTorch wired by eq. 2, DenseNet-BC and plain"
    fidelity.record("densenet", reference, forward, gradient)
