import keras
import numpy as np
import torch
from transformers import ViTConfig, ViTForImageClassification

import keras_edifice
from keras_edifice.blocks.position_table import resize_position_table
from tests.support.close import assert_close, difference, to_numpy
from tests.support.gradients import gradients

rng = np.random.default_rng(0)


def peer(qkv_bias):
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        num_channels=3,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        qkv_bias=qkv_bias,
        num_labels=5,
    )
    model = ViTForImageClassification(config).eval()
    for parameter in model.parameters():
        noise = torch.as_tensor(0.3 * rng.normal(size=parameter.shape)).float()
        parameter.data = parameter.data + noise
    return model


def by_path(model, of):
    """Path of our weight -> `of` the peer's parameter, in our layout."""

    def dense(path, *modules):
        found[f"{path}/kernel"] = torch.cat([of(m.weight).T for m in modules], dim=1)
        if modules[0].bias is not None:
            found[f"{path}/bias"] = torch.cat([of(m.bias) for m in modules])

    def norm(path, module):
        found[f"{path}/gamma"], found[f"{path}/beta"] = (
            of(module.weight),
            of(module.bias),
        )

    start = model.vit.embeddings
    patches = start.patch_embeddings.projection
    found = {
        "patches/projection/kernel": of(patches.weight).permute(2, 3, 1, 0),
        "patches/projection/bias": of(patches.bias),
        "class_token/token": of(start.cls_token),
        "positions/table": of(start.position_embeddings),
    }
    for i, block in enumerate(model.vit.layers, 1):
        a, mlp = block.attention, block.mlp
        norm(f"block{i}_attention_norm", block.layernorm_before)
        dense(f"block{i}_attention/qkv", a.q_proj, a.k_proj, a.v_proj)
        dense(f"block{i}_attention/out", a.o_proj)
        norm(f"block{i}_mlp_norm", block.layernorm_after)
        dense(f"block{i}_mlp/first", mlp.fc1)
        dense(f"block{i}_mlp/second", mlp.fc2)
    norm("norm", model.vit.layernorm)
    dense("predictions", model.classifier)
    return {path: value.detach().numpy() for path, value in found.items()}


def differences(qkv_bias):
    reference = peer(qkv_bias)
    model = keras_edifice.build(
        "vit",
        image_size=32,
        patch_size=8,
        embed_size=24,
        num_layers=2,
        num_heads=3,
        qkv_bias=qkv_bias,
        num_classes=5,
        classifier_activation=None,
    )
    values = by_path(reference, lambda p: p)
    assert set(values) == {w.path for w in model.weights}
    for weight in model.weights:
        weight.assign(values[weight.path])

    x = rng.normal(size=(2, 32, 32, 3)).astype("float32")
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


def test_vit_is_that_of_transformers(fidelity):
    forward, gradient = np.max([differences(True), differences(False)], axis=0)
    fidelity.record("vit", "transformers ViTForImageClassification", forward, gradient)


def test_positions_of_another_size_are_those_of_transformers():
    embeddings = peer(True).vit.embeddings
    table = embeddings.position_embeddings.detach()
    for grid in [(6, 6), (3, 3), (7, 2)]:
        tokens = torch.zeros(1, 1 + grid[0] * grid[1], table.shape[-1])
        expected = embeddings.interpolate_pos_encoding(
            tokens, *(8 * side for side in grid)
        )
        actual = resize_position_table(table.numpy(), grid)
        assert_close(actual, expected.detach().numpy(), 1e-5)
