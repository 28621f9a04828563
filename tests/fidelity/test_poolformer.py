import keras
import numpy as np
import torch
from transformers import PoolFormerConfig, PoolFormerForImageClassification

import keras_edifice
from tests.support.close import difference, to_numpy
from tests.support.gradients import gradients

rng = np.random.default_rng(0)
DEPTHS, SIZES = [1, 2, 1, 1], [8, 16, 32, 64]


def peer():
    config = PoolFormerConfig(
        num_channels=3,
        depths=DEPTHS,
        hidden_sizes=SIZES,
        hidden_act="gelu",
        drop_path_rate=0.0,
        num_labels=10,
    )
    model = PoolFormerForImageClassification(config).eval()
    for parameter in model.parameters():
        noise = torch.as_tensor(0.1 * rng.normal(size=parameter.shape)).float()
        parameter.data = parameter.data + noise
    return model


def by_path(model, of):
    """Path of our weight -> `of` the peer's parameter, in our layout."""

    def conv(path, module):
        found[f"{path}/kernel"] = of(module.weight).permute(2, 3, 1, 0)
        found[f"{path}/bias"] = of(module.bias)

    def dense(path, module):
        weight = of(module.weight)
        found[f"{path}/kernel"] = weight.reshape(weight.shape[:2]).T
        found[f"{path}/bias"] = of(module.bias)

    def norm(path, module):
        found[f"{path}/gamma"] = of(module.weight)
        found[f"{path}/beta"] = of(module.bias)

    found, encoder = {}, model.poolformer.encoder
    stages = zip(encoder.patch_embeddings, encoder.block, strict=True)
    for s, (embedding, blocks) in enumerate(stages, 1):
        conv(f"stage{s}_patches", embedding.projection)
        for b, block in enumerate(blocks, 1):
            name = f"stage{s}_block{b}"
            norm(f"{name}_mixer_norm", block.before_norm)
            norm(f"{name}_mlp_norm", block.after_norm)
            dense(f"{name}_mlp/first", block.output.conv1)
            dense(f"{name}_mlp/second", block.output.conv2)
            found[f"{name}_mixer_scale/gamma"] = of(block.layer_scale_1)
            found[f"{name}_mlp_scale/gamma"] = of(block.layer_scale_2)
    norm("norm", model.norm)
    dense("predictions", model.classifier)
    return {path: value.detach().numpy() for path, value in found.items()}


def test_poolformer_is_that_of_transformers(fidelity):
    reference = peer()
    model = keras_edifice.build(
        "poolformer",
        depths=DEPTHS,
        hidden_sizes=SIZES,
        num_classes=10,
        classifier_activation=None,
    )
    values = by_path(reference, lambda p: p)
    assert set(values) == {w.path for w in model.weights}
    for weight in model.weights:
        weight.assign(values[weight.path])

    x = rng.normal(size=(2, 61, 66, 3)).astype("float32")  # odd at some stage each
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
    gradient = max(difference(*pair) for pair in pairs)
    fidelity.record(
        "poolformer", "transformers PoolFormerForImageClassification", forward, gradient
    )
