import keras
import numpy as np
import torch
from transformers import ResNetConfig, ResNetForImageClassification

import keras_edifice
from tests.support.close import difference, to_numpy
from tests.support.gradients import gradients

rng = np.random.default_rng(0)
SIZES = [1, 2, 1, 1]


def peer(block_type, stride_on):
    expansion = 1 if block_type == "basic" else 4
    config = ResNetConfig(
        num_channels=2,
        embedding_size=4,
        hidden_sizes=[4 * 2**i * expansion for i in range(4)],
        depths=SIZES,
        layer_type=block_type,
        downsample_in_bottleneck=stride_on == "1x1",
        num_labels=5,
    )
    model = ResNetForImageClassification(config).eval()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.dtype == torch.float32:
            noise = torch.as_tensor(0.1 * rng.normal(size=value.shape)).float()
            value.data = noise.abs() + 1 if name.endswith("var") else value.data + noise
    return model


def units(model):
    """Name of our unit -> the peer's convolution and normalisation."""
    pairs = {"stem": model.resnet.embedder.embedder}
    for s, stage in enumerate(model.resnet.encoder.stages, 1):
        for b, block in enumerate(stage.layers, 1):
            prefix = f"stage{s}_block{b}"
            convolutions = [m for m in block.layer if hasattr(m, "convolution")]
            pairs |= {f"{prefix}_{i}": m for i, m in enumerate(convolutions, 1)}
            if hasattr(block.shortcut, "convolution"):
                pairs[f"{prefix}_shortcut"] = block.shortcut
    return pairs


def by_path(model, of):
    """Path of our weight -> `of` the peer's parameter, in our layout."""
    found = {}
    for name, unit in units(model).items():
        norm = unit.normalization
        kernel = of(unit.convolution.weight)
        found[f"{name}_conv/kernel"] = kernel.permute(2, 3, 1, 0)
        found[f"{name}_norm/gamma"] = of(norm.weight)
        found[f"{name}_norm/beta"] = of(norm.bias)
        found[f"{name}_norm/moving_mean"] = norm.running_mean
        found[f"{name}_norm/moving_variance"] = norm.running_var
    head = model.classifier[1]
    found["predictions/kernel"], found["predictions/bias"] = (
        of(head.weight).T,
        of(head.bias),
    )
    return {path: value.detach().numpy() for path, value in found.items()}


def differences(block_type, stride_on):
    reference = peer(block_type, stride_on)
    model = keras_edifice.build(
        "resnet",
        input_channels=2,
        hidden_size=4,
        block_sizes=SIZES,
        block_type=block_type,
        stride_on=stride_on,
        num_classes=5,
        classifier_activation=None,
    )
    values = by_path(reference, lambda p: p)
    assert set(values) == {w.path for w in model.weights}
    for weight in model.weights:
        weight.assign(values[weight.path])

    x = rng.normal(size=(2, 35, 38, 2)).astype("float32")  # odd at some stage each
    pixels = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    expected = reference(pixels).logits
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


def test_resnet_is_that_of_transformers(fidelity):
    cases = [("basic", "3x3"), ("bottleneck", "3x3"), ("bottleneck", "1x1")]
    forward, gradient = np.max([differences(*case) for case in cases], axis=0)
    fidelity.record(
        "resnet", "transformers ResNetForImageClassification", forward, gradient
    )
