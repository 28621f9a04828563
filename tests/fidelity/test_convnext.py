import keras
import numpy as np
import torch
from transformers import ConvNextConfig, ConvNextForImageClassification

import keras_edifice
from tests.support.close import difference, to_numpy
from tests.support.gradients import gradients

rng = np.random.default_rng(0)
DEPTHS, WIDTHS = [1, 2, 1, 1], [6, 8, 10, 12]


def peer():
    config = ConvNextConfig(
        num_channels=2,
        patch_size=4,
        depths=DEPTHS,
        hidden_sizes=WIDTHS,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        num_labels=5,
    )
    model = ConvNextForImageClassification(config).eval()
    for parameter in model.parameters():
        noise = torch.as_tensor(0.3 * rng.normal(size=parameter.shape)).float()
        parameter.data = parameter.data + noise
    return model


def by_path(model, of):
    """Path of our weight -> `of` the peer's parameter, in our layout."""
    found = {}

    def convolution(path, module, order=(2, 3, 1, 0)):
        found[f"{path}/kernel"] = of(module.weight).permute(order)
        found[f"{path}/bias"] = of(module.bias)

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

    start = model.convnext.embeddings
    convolution("stem", start.patch_embeddings)
    norm("stem_norm", start.layernorm)
    for s, stage in enumerate(model.convnext.encoder.stages, 1):
        if s > 1:
            norm(f"stage{s}_norm", stage.downsampling_layer[0])
            convolution(f"stage{s}_downsample", stage.downsampling_layer[1])
        for b, block in enumerate(stage.layers, 1):
            name = f"stage{s}_block{b}"
            convolution(f"{name}_depthwise", block.dwconv, (2, 3, 0, 1))
            norm(f"{name}_norm", block.layernorm)
            dense(f"{name}_mlp/first", block.pwconv1)
            dense(f"{name}_mlp/second", block.pwconv2)
            found[f"{name}_scale/gamma"] = of(block.layer_scale_parameter)
    norm("norm", model.convnext.layernorm)
    dense("predictions", model.classifier)
    return {path: value.detach().numpy() for path, value in found.items()}


def differences():
    reference = peer()
    model = keras_edifice.build(
        "convnext",
        num_channels=2,
        depths=DEPTHS,
        hidden_sizes=WIDTHS,
        num_classes=5,
        classifier_activation=None,
    )
    values = by_path(reference, lambda p: p)
    assert set(values) == {w.path for w in model.weights}
    for weight in model.weights:
        weight.assign(values[weight.path])

    x = rng.normal(size=(2, 64, 70, 2)).astype("float32")  # the last rows are cut off
    pixels = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    expected = reference(pixels).logits
    expected.square().sum().backward()
    assert pixels.grad.abs().max() > 1e-3
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


def test_convnext_is_that_of_transformers(fidelity):
    forward, gradient = differences()
    fidelity.record(
        "convnext", "transformers ConvNextForImageClassification", forward, gradient
    )
