import keras
import numpy as np
import torch
from torch import nn
from transformers import (
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
)

import keras_edifice
from tests.support.close import difference, to_numpy
from tests.support.gradients import gradients

rng = np.random.default_rng(0)
V3_BLOCKS = [  # kernel, expanded, filters, squeeze, hard swish, strides
    [3, 16, 16, 1, 0, 2],
    [3, 40, 24, 0, 0, 2],
    [5, 64, 24, 1, 1, 1],
    [5, 96, 32, 0, 1, 2],
]


class Unit(nn.Module):
    """Convolution, normalisation and activation of PyTorch's own layers."""

    def __init__(self, source, filters, size, strides=1, groups=1, activation=None):
        super().__init__()
        self.convolution = nn.Conv2d(
            source, filters, size, strides, size // 2, groups=groups, bias=False
        )
        self.normalization = nn.BatchNorm2d(filters, eps=1e-3)
        self.activation = activation or nn.Identity()

    def forward(self, x):
        return self.activation(self.normalization(self.convolution(x)))


class Squeeze(nn.Module):
    """Squeeze and excitation of Howard et al. 2019: ReLU and hard sigmoid."""

    def __init__(self, channels, squeezed):
        super().__init__()
        self.reduce = nn.Linear(channels, squeezed)
        self.expand = nn.Linear(squeezed, channels)

    def forward(self, x):
        z = torch.relu(self.reduce(x.mean((2, 3))))
        return x * nn.functional.hardsigmoid(self.expand(z))[:, :, None, None]


class V3Block(nn.Module):
    """Row of table 1 and 2 of Howard et al. 2019."""

    def __init__(self, source, size, expanded, filters, squeeze, hard, strides):
        super().__init__()
        act = nn.Hardswish() if hard else nn.ReLU()
        self.added = source == filters and strides == 1
        self.expand = (
            None if expanded == source else Unit(source, expanded, 1, 1, 1, act)
        )
        self.depthwise = Unit(expanded, expanded, size, strides, expanded, act)
        self.squeeze = Squeeze(expanded, squeeze) if squeeze else None
        self.project = Unit(expanded, filters, 1)

    def forward(self, x):
        y = x if self.expand is None else self.expand(x)
        y = self.depthwise(y)
        y = y if self.squeeze is None else self.squeeze(y)
        y = self.project(y)
        return x + y if self.added else y


class V3(nn.Module):
    """The network of Howard et al. 2019 with the blocks above."""

    def __init__(self):
        super().__init__()
        self.stem = Unit(2, 16, 3, 2, 1, nn.Hardswish())
        source, blocks = 16, []
        for size, expanded, filters, squeeze, hard, strides in V3_BLOCKS:
            squeezed = squeeze * max(8, expanded // 4)
            blocks.append(
                V3Block(source, size, expanded, filters, squeezed, hard, strides)
            )
            source = filters
        self.blocks = nn.ModuleList(blocks)
        self.last = Unit(source, 6 * source, 1, 1, 1, nn.Hardswish())
        self.hidden, self.classifier = nn.Linear(6 * source, 1024), nn.Linear(1024, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = nn.functional.hardswish(self.hidden(self.last(x).mean((2, 3))))
        return self.classifier(x)


def shaken(model):
    model = model.eval()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.dtype == torch.float32:
            matrix = value.ndim > 1  # of He's variance: gradients reach the first layer
            scale = (2 / value[0].numel()) ** 0.5 if matrix else 0.1
            noise = torch.as_tensor(scale * rng.normal(size=value.shape)).float()
            value.data = noise if matrix else value.data + noise
            value.data = value.data.abs() if name.endswith("var") else value.data
    return model


def v1_units(model):
    model, units = model.mobilenet_v1, {}
    for i, layer in enumerate(model.layer):
        part = "pointwise" if i % 2 else "depthwise"
        units[f"block{i // 2 + 1}_{part}"] = layer
    return {"stem": model.conv_stem, **units}


def v2_units(model):
    model = model.mobilenet_v2
    first, blocks = model.conv_stem, iter(model.layer)
    units = {
        "stem": first.first_conv,
        "stage1_block1_depthwise": first.conv_3x3,
        "stage1_block1_project": first.reduce_1x1,
    }
    for stage, repeats in enumerate([2, 3, 4, 3, 3, 1], 2):
        for b in range(1, repeats + 1):
            block, name = next(blocks), f"stage{stage}_block{b}"
            units[f"{name}_expand"] = block.expand_1x1
            units[f"{name}_depthwise"] = block.conv_3x3
            units[f"{name}_project"] = block.reduce_1x1
    return {**units, "last": model.conv_1x1}


def v3_units(model):
    units = {"stem": model.stem, "last": model.last}
    for i, block in enumerate(model.blocks, 1):
        for part in ("expand", "depthwise", "project"):
            if getattr(block, part) is not None:
                units[f"block{i}_{part}"] = getattr(block, part)
    return units


def v3_dense(model):
    layers = {"last_hidden": model.hidden}
    for i, block in enumerate(model.blocks, 1):
        if block.squeeze is not None:
            layers[f"block{i}_squeeze/reduce"] = block.squeeze.reduce
            layers[f"block{i}_squeeze/expand"] = block.squeeze.expand
    return layers


def by_path(units, dense, of):
    """Path of our weight -> `of` the peer's parameter, in our layout."""
    found = {}
    for name, unit in units.items():
        order = (2, 3, 0, 1) if "depthwise" in name else (2, 3, 1, 0)
        found[f"{name}_conv/kernel"] = of(unit.convolution.weight).permute(order)
        norm = unit.normalization
        found[f"{name}_norm/gamma"] = of(norm.weight)
        found[f"{name}_norm/beta"] = of(norm.bias)
        found[f"{name}_norm/moving_mean"] = norm.running_mean
        found[f"{name}_norm/moving_variance"] = norm.running_var
    for name, layer in dense.items():
        found[f"{name}/kernel"], found[f"{name}/bias"] = (
            of(layer.weight).T,
            of(layer.bias),
        )
    return {path: value.detach().numpy() for path, value in found.items()}


def differences(reference, units, dense, **options):
    model = keras_edifice.build(
        "mobilenet",
        input_channels=2,
        num_classes=5,
        classifier_activation=None,
        **options,
    )
    dense = {"predictions": reference.classifier, **dense}
    values = by_path(units, dense, lambda p: p)
    assert set(values) == {w.path for w in model.weights}
    for weight in model.weights:
        weight.assign(values[weight.path])

    x = rng.normal(size=(2, 35, 38, 2)).astype("float32")  # odd at some stage each
    pixels = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    expected = reference(pixels)
    expected = getattr(expected, "logits", expected)
    expected.square().sum().backward()
    forward = difference(model(x), to_numpy(expected))
    assert pixels.grad.abs().max() > 1e-3

    by_weight, by_input = gradients(
        model, x, lambda y: keras.ops.sum(keras.ops.square(y))
    )
    wanted = by_path(units, dense, lambda p: p.grad)
    pairs = [
        (g, wanted[w.path])
        for g, w in zip(by_weight, model.trainable_variables, strict=True)
    ]
    pairs += [(by_input, pixels.grad.numpy().transpose(0, 2, 3, 1))]
    return forward, max(difference(*pair) for pair in pairs)


def test_mobilenet_is_that_of_transformers_and_of_torch_layers(fidelity):
    shared = dict(num_channels=2, tf_padding=False, layer_norm_eps=1e-5, num_labels=5)
    config = MobileNetV1Config(depth_multiplier=0.25, **shared)
    first = shaken(MobileNetV1ForImageClassification(config))
    # A width at which the peer's first block, which never adds its input, need not.
    config = MobileNetV2Config(depth_multiplier=0.35, **shared)
    second = shaken(MobileNetV2ForImageClassification(config))
    third = shaken(V3())
    measured = [
        differences(first, v1_units(first), {}, version="v1", width_multiplier=0.25),
        differences(second, v2_units(second), {}, version="v2", width_multiplier=0.35),
        differences(
            third,
            v3_units(third),
            v3_dense(third),
            version="v3_small",
            blocks=V3_BLOCKS,
        ),
    ]
    forward, gradient = np.max(measured, axis=0)
    fidelity.record(
        "mobilenet",
        "transformers MobileNetV1 and V2ForImageClassification, V3 of torch.nn layers",
        forward,
        gradient,
    )
