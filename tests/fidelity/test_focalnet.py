import keras
import numpy as np
import torch
from transformers import FocalNetConfig, FocalNetForImageClassification

import keras_edifice
from tests.support.close import difference, to_numpy
from tests.support.gradients import gradients

rng = np.random.default_rng(0)
OPTIONS = dict(depths=[1, 2], focal_levels=[2, 3], focal_window=[3, 5])


def peer(post_norm, overlap_down, layer_scale, in_modulation, normalize):
    config = FocalNetConfig(
        image_size=32,
        patch_size=4,
        num_channels=3,
        embed_dim=8,
        depths=OPTIONS["depths"],
        focal_levels=OPTIONS["focal_levels"],
        focal_windows=OPTIONS["focal_window"],
        use_conv_embed=overlap_down,
        use_layerscale=layer_scale is not None,
        layerscale_value=layer_scale or 1e-4,
        use_post_layernorm=post_norm,
        use_post_layernorm_in_modulation=in_modulation,
        normalize_modulator=normalize,
        hidden_act="gelu",
        layer_norm_eps=1e-5,
        drop_path_rate=0.0,
        num_labels=5,
    )
    model = FocalNetForImageClassification(config).eval()
    for parameter in model.parameters():
        noise = torch.as_tensor(0.2 * rng.normal(size=parameter.shape)).float()
        parameter.data = parameter.data + noise
    return model


def by_path(model, of):
    """Path of our weight -> `of` the peer's parameter, in our layout."""

    def conv(path, module, axes=(2, 3, 1, 0)):
        found[f"{path}/kernel"] = of(module.weight).permute(*axes)
        if module.bias is not None:
            found[f"{path}/bias"] = of(module.bias)

    def dense(path, module):
        weight = of(module.weight)
        found[f"{path}/kernel"] = weight.reshape(weight.shape[:2]).T
        found[f"{path}/bias"] = of(module.bias)

    def norm(path, module):
        found[f"{path}/gamma"] = of(module.weight)
        found[f"{path}/beta"] = of(module.bias)

    found, net = {}, model.focalnet
    conv("stage1_patches", net.embeddings.patch_embeddings.projection)
    norm("stage1_patches_norm", net.embeddings.norm)
    for s, stage in enumerate(net.encoder.stages, 1):
        for b, block in enumerate(stage.layers, 1):
            name, mod = f"stage{s}_block{b}", block.modulation
            dense(f"{name}_modulation/projection", mod.projection_in)
            dense(f"{name}_modulation/modulator", mod.projection_context)
            dense(f"{name}_modulation/out", mod.projection_out)
            for level, focal in enumerate(mod.focal_layers, 1):
                conv(f"{name}_modulation/context{level}", focal[0], (2, 3, 0, 1))
            if mod.use_post_layernorm_in_modulation:
                norm(f"{name}_modulation/norm", mod.layernorm)
            norm(f"{name}_modulation_norm", block.norm1)
            norm(f"{name}_mlp_norm", block.norm2)
            dense(f"{name}_mlp/first", block.mlp.fc1)
            dense(f"{name}_mlp/second", block.mlp.fc2)
            if isinstance(block.gamma_1, torch.Tensor):
                found[f"{name}_modulation_scale/gamma"] = of(block.gamma_1)
                found[f"{name}_mlp_scale/gamma"] = of(block.gamma_2)
        if stage.downsample is not None:
            conv(f"stage{s + 1}_patches", stage.downsample.projection)
            norm(f"stage{s + 1}_patches_norm", stage.downsample.norm)
    norm("norm", net.layernorm)
    dense("predictions", model.classifier)
    return {path: value.detach().numpy() for path, value in found.items()}


def differences(*case):
    reference = peer(*case)
    post_norm, overlap_down, layer_scale, in_modulation, normalize = case
    model = keras_edifice.build(
        "focalnet",
        embed_size=8,
        **OPTIONS,
        post_norm=post_norm,
        overlap_down=overlap_down,
        layer_scale=layer_scale,
        post_norm_in_modulation=in_modulation,
        normalize_modulator=normalize,
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


def test_focalnet_is_that_of_transformers(fidelity):
    cases = [
        (False, False, None, False, False),
        (True, True, 0.5, False, True),
        (True, True, 0.5, True, False),
    ]
    forward, gradient = np.max([differences(*case) for case in cases], axis=0)
    fidelity.record(
        "focalnet", "transformers FocalNetForImageClassification", forward, gradient
    )
