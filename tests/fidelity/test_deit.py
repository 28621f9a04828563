import keras
import numpy as np
import torch
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

import keras_edifice
from tests.support.close import assert_close, difference, to_numpy
from tests.support.gradients import gradients

rng = np.random.default_rng(0)
OPTIONS = dict(
    image_size=32,
    patch_size=8,
    embed_size=24,
    num_layers=2,
    num_heads=3,
    num_classes=5,
    classifier_activation=None,
)


def peer():
    config = DeiTConfig(
        image_size=32,
        patch_size=8,
        num_channels=3,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        num_labels=5,
    )
    model = DeiTForImageClassificationWithTeacher(config).eval()
    for parameter in model.parameters():
        noise = torch.as_tensor(0.3 * rng.normal(size=parameter.shape)).float()
        parameter.data = parameter.data + noise
    return model


def by_path(model, of):
    """Path of our weight -> `of` the peer's parameter, in our layout."""

    def dense(path, *modules):
        found[f"{path}/kernel"] = torch.cat([of(m.weight).T for m in modules], dim=1)
        found[f"{path}/bias"] = torch.cat([of(m.bias) for m in modules])

    def norm(path, module):
        found[f"{path}/gamma"] = of(module.weight)
        found[f"{path}/beta"] = of(module.bias)

    start = model.deit.embeddings
    patches = start.patch_embeddings.projection
    found = {
        "patches/projection/kernel": of(patches.weight).permute(2, 3, 1, 0),
        "patches/projection/bias": of(patches.bias),
        "distillation_token/token": of(start.distillation_token),
        "class_token/token": of(start.cls_token),
        "positions/table": of(start.position_embeddings),
    }
    for i, block in enumerate(model.deit.layers, 1):
        a, mlp = block.attention, block.mlp
        norm(f"block{i}_attention_norm", block.layernorm_before)
        dense(f"block{i}_attention/qkv", a.q_proj, a.k_proj, a.v_proj)
        dense(f"block{i}_attention/out", a.o_proj)
        norm(f"block{i}_mlp_norm", block.layernorm_after)
        dense(f"block{i}_mlp/first", mlp.fc1)
        dense(f"block{i}_mlp/second", mlp.fc2)
    norm("norm", model.deit.layernorm)
    dense("predictions", model.cls_classifier)
    dense("teacher_predictions", model.distillation_classifier)
    return {path: value.detach().numpy() for path, value in found.items()}


def same_weights(reference, **options):
    model = keras_edifice.build("deit", **OPTIONS, **options)
    values = by_path(reference, lambda p: p)
    assert set(values) == {w.path for w in model.weights}
    for weight in model.weights:
        weight.assign(values[weight.path])
    return model


def test_deit_is_that_of_transformers(fidelity):
    reference = peer()
    model, apart = (
        same_weights(reference),
        same_weights(reference, teacher_num_classes=5),
    )
    x = rng.normal(size=(2, 32, 32, 3)).astype("float32")
    pixels = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    expected = reference(pixels)
    expected.logits.square().sum().backward()
    forward = difference(model(x), to_numpy(expected.logits))
    outputs = apart(x)
    assert_close(outputs["cls"], expected.cls_logits.detach(), 1e-4)
    assert_close(outputs["dist"], expected.distillation_logits.detach(), 1e-4)

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
        "deit", "transformers DeiTForImageClassificationWithTeacher", forward, gradient
    )
