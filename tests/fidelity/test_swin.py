import keras
import numpy as np
import torch
from transformers import SwinConfig, SwinForImageClassification

import keras_edifice
from tests.support.close import difference, to_numpy
from tests.support.gradients import gradients

rng = np.random.default_rng(0)


def peer(side):
    config = SwinConfig(
        image_size=side,
        patch_size=2,
        num_channels=3,
        embed_dim=8,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        mlp_ratio=4.0,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        drop_path_rate=0.0,
        num_labels=5,
    )
    model = SwinForImageClassification(config).eval()
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
        found[f"{path}/gamma"] = of(module.weight)
        found[f"{path}/beta"] = of(module.bias)

    start = model.swin.embeddings
    patches = start.patch_embeddings.projection
    found = {
        "patches/projection/kernel": of(patches.weight).permute(2, 3, 1, 0),
        "patches/projection/bias": of(patches.bias),
    }
    norm("patches/layer_norm", start.norm)
    for s, stage in enumerate(model.swin.encoder.layers, 1):
        for b, block in enumerate(stage.blocks, 1):
            name, a = f"stage{s}_block{b}", block.attention
            table = a.relative_position_bias.relative_position_bias_table
            found[f"{name}_attention/bias_table"] = of(table)
            norm(f"{name}_attention_norm", block.layernorm_before)
            dense(f"{name}_attention/qkv", a.q_proj, a.k_proj, a.v_proj)
            dense(f"{name}_attention/out", a.o_proj)
            norm(f"{name}_mlp_norm", block.layernorm_after)
            dense(f"{name}_mlp/first", block.mlp.fc1)
            dense(f"{name}_mlp/second", block.mlp.fc2)
        if stage.downsample is not None:
            norm(f"stage{s + 1}_merging/norm", stage.downsample.norm)
            dense(f"stage{s + 1}_merging/reduction", stage.downsample.reduction)
    norm("norm", model.swin.layernorm)
    dense("predictions", model.classifier)
    return {path: value.detach().numpy() for path, value in found.items()}


def differences(side):
    reference = peer(side)
    model = keras_edifice.build(
        "swin",
        image_size=side,
        patch_size=2,
        embed_size=8,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        num_classes=5,
        classifier_activation=None,
    )
    values = by_path(reference, lambda p: p)
    assert set(values) == {w.path for w in model.weights}
    for weight in model.weights:
        weight.assign(values[weight.path])

    x = rng.normal(size=(2, side, side, 3)).astype("float32")
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


def test_swin_is_that_of_transformers(fidelity):
    # 32: whole windows. 26: maps of 13 and, merged with padding, of 7.
    forward, gradient = np.max([differences(side) for side in (32, 26)], axis=0)
    fidelity.record(
        "swin", "transformers SwinForImageClassification", forward, gradient
    )
