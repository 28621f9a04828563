import keras
import numpy as np
import torch
from transformers import EfficientNetConfig, EfficientNetForImageClassification

import keras_edifice
from tests.support.close import difference, to_numpy
from tests.support.gradients import gradients

rng = np.random.default_rng(0)
BLOCKS = [  # expansion, kernel, strides, filters, repeats
    [1, 3, 1, 16, 1],
    [6, 3, 2, 24, 2],
    [4, 5, 2, 40, 2],
    [3, 3, 1, 56, 1],
]
REPEATS = [2, 3, 3, 2]  # of ⌈1.1 n⌉


def peer():
    expansions, kernels, strides, filters, repeats = zip(*BLOCKS, strict=True)
    config = EfficientNetConfig(
        num_channels=2,
        width_coefficient=0.5,
        depth_coefficient=1.1,
        kernel_sizes=kernels,
        in_channels=(32, *filters[:-1]),
        out_channels=filters,
        strides=strides,
        num_block_repeats=repeats,
        expand_ratios=expansions,
        hidden_dim=640,
        num_labels=5,
    )
    model = EfficientNetForImageClassification(config).eval()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.dtype == torch.float32:
            matrix = value.ndim > 1  # of He's variance: gradients reach the first layer
            scale = (2 / value[0].numel()) ** 0.5 if matrix else 0.1
            noise = torch.as_tensor(scale * rng.normal(size=value.shape)).float()
            ones = name.endswith(("var", "weight")) and not matrix
            value.data = noise + 1 if ones else noise
    return model


def by_path(model, of):
    """Path of our weight -> `of` the peer's parameter, in our layout."""
    found = {}

    def unit(name, convolution, norm):
        order = (2, 3, 0, 1) if "depthwise" in name else (2, 3, 1, 0)
        found[f"{name}_conv/kernel"] = of(convolution.weight).permute(order)
        found[f"{name}_norm/gamma"] = of(norm.weight)
        found[f"{name}_norm/beta"] = of(norm.bias)
        found[f"{name}_norm/moving_mean"] = norm.running_mean
        found[f"{name}_norm/moving_variance"] = norm.running_var

    def dense(path, module):
        found[f"{path}/kernel"] = of(module.weight).flatten(1).T
        found[f"{path}/bias"] = of(module.bias)

    start, encoder = model.efficientnet.embeddings, model.efficientnet.encoder
    unit("stem", start.convolution, start.batchnorm)
    blocks = iter(encoder.blocks)
    for stage, repeats in enumerate(REPEATS, 1):
        for i in range(1, repeats + 1):
            block, name = next(blocks), f"stage{stage}_block{i}"
            if block.expand:
                inner = block.expansion
                unit(f"{name}_expand", inner.expand_conv, inner.expand_bn)
            inner = block.depthwise_conv
            unit(f"{name}_depthwise", inner.depthwise_conv, inner.depthwise_norm)
            dense(f"{name}_squeeze/reduce", block.squeeze_excite.reduce)
            dense(f"{name}_squeeze/expand", block.squeeze_excite.expand)
            inner = block.projection
            unit(f"{name}_project", inner.project_conv, inner.project_bn)
    unit("last", encoder.top_conv, encoder.top_bn)
    dense("predictions", model.classifier)
    return {path: value.detach().numpy() for path, value in found.items()}


def differences():
    reference = peer()
    model = keras_edifice.build(
        "efficientnet",
        input_channels=2,
        width_multiplier=0.5,
        depth_multiplier=1.1,
        blocks=BLOCKS,
        num_classes=5,
        classifier_activation=None,
    )
    values = by_path(reference, lambda p: p)
    assert set(values) == {w.path for w in model.weights}
    for weight in model.weights:
        weight.assign(values[weight.path])

    # The peer's padding is TensorFlow's where all sides are even.
    x = rng.normal(size=(2, 32, 48, 2)).astype("float32")
    pixels = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    expected = reference(pixels).logits
    expected.square().sum().backward()
    forward = difference(model(x), to_numpy(expected))
    assert pixels.grad.abs().max() > 1e-3

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


def test_efficientnet_is_that_of_transformers(fidelity):
    forward, gradient = differences()
    fidelity.record(
        "efficientnet",
        "transformers EfficientNetForImageClassification",
        forward,
        gradient,
    )
