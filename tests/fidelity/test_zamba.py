import keras
import numpy as np
import torch
from transformers import Zamba2Config, Zamba2Model, ZambaConfig, ZambaModel

import keras_edifice
from tests.support.close import difference
from tests.support.gradients import gradients
from tests.support.shaking import shake

HIDDEN, MLP, STATE, HEADS, LENGTH = 20, 12, 4, 2, 13
WIDTH = 2 * HIDDEN // HEADS
"""Channels of a head of Mamba."""
USES = {1: [2, 4], 2: [2, 4, 5]}
"""Version -> the layers that use a shared block."""


def same(z):
    return z


def transposed(z):
    return z.mT


def pairs_of_weights(version, ours, theirs):
    """(our variable, their parameter, the part that is ours in our axes), all."""
    for i, layer in enumerate(theirs.layers):
        if i in USES[version]:
            yield ours.get_layer(f"linear_{i}").kernel, layer.linear.weight, transposed
            layer = layer.mamba_decoder
        gamma = ours.get_layer(f"mamba_{i}_norm").gamma
        yield gamma, layer.input_layernorm.weight, same
        own = ours.get_layer(f"mamba_{i}")
        yield from (mamba_pairs, mamba_2_pairs)[version - 1](own, layer.mamba)
    for b, i in enumerate(USES[version][:version]):
        yield from (shared_pairs, shared_2_pairs)[version - 1](
            ours, theirs.layers[i], b
        )
    yield ours.get_layer("final_norm").gamma, theirs.final_layernorm.weight, same


def mamba_pairs(own, other):
    yield own.out_proj.kernel, other.out_proj.weight, transposed
    for j, head in enumerate(own.heads):
        part = slice(j * WIDTH, (j + 1) * WIDTH)
        yield head.conv.kernel, other.conv1d.weight, lambda z, p=part: z[p, 0].T
        yield head.conv.bias, other.conv1d.bias, lambda z, p=part: z[p]
        yield head.x_proj.kernel, other.x_proj_weight, lambda z, j=j: z[j].T
        yield head.dt_proj.kernel, other.dt_proj_weight, lambda z, j=j: z[j].T
        yield head.dt_bias, other.dt_proj_bias, lambda z, j=j: z[j]
        yield head.A_log, other.A_log, lambda z, j=j: z[j]
        yield head.D, other.D, lambda z, j=j: z[j]


def mamba_2_pairs(own, other):
    yield own.in_proj.kernel, other.in_proj.weight, transposed
    yield own.conv.kernel, other.conv1d.weight, lambda z: z[:, 0].T
    yield own.conv.bias, other.conv1d.bias, same
    yield own.dt_bias, other.dt_bias, same
    yield own.A_log, other.A_log, same
    yield own.D, other.D, same
    yield own.norm.gamma, other.norm.weight, same
    yield own.out_proj.kernel, other.out_proj.weight, transposed


def shared_pairs(ours, layer, b):
    block = layer.shared_transf
    attention, mlp = block.self_attn, block.feed_forward
    yield from common_pairs(ours, block, attention, b)
    gate_up = ours.get_layer(f"shared_{b}_gate_up").kernel
    yield gate_up, mlp, same  # two matrices in one: see `parts`
    yield ours.get_layer(f"shared_{b}_down").kernel, mlp.down_proj.weight, transposed


def shared_2_pairs(ours, layer, b):
    block = layer.shared_transformer
    attention, mlp = block.self_attn, block.feed_forward
    yield from common_pairs(ours, block, attention, b)
    gate_up = ours.get_layer(f"shared_{b}_gate_up").kernel
    yield gate_up, mlp.gate_up_proj.weight, transposed
    yield ours.get_layer(f"shared_{b}_down").kernel, mlp.down_proj.weight, transposed
    for n, i in enumerate(USES[2]):
        if n % 2 != b:
            continue
        adapters = {
            "q": attention.linear_q_adapter_list[n],
            "k": attention.linear_k_adapter_list[n],
            "v": attention.linear_v_adapter_list[n],
            "gate_up": mlp.gate_up_proj_adapter_list[n],
        }
        for name, pair in adapters.items():
            for end, matrix in zip(("in", "out"), pair, strict=True):
                own = ours.get_layer(f"{name}_adapter_{i}_{end}").kernel
                yield own, matrix.weight, transposed


def common_pairs(ours, block, attention, b):
    for name, norm in (("norm", "input"), ("mlp_norm", "pre_ff")):
        gamma = ours.get_layer(f"shared_{b}_{name}").gamma
        yield gamma, getattr(block, f"{norm}_layernorm").weight, same
    for name, theirs in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o")):
        kernel = ours.get_layer(f"shared_{b}_{name}").kernel
        yield kernel, getattr(attention, f"{theirs}_proj").weight, transposed


def parts(version, ours, theirs):
    """`pairs_of_weights` with each matrix that they arrange otherwise in its parts.

    (index into our array, our variable, their parameter, the part that is ours).
    """
    for variable, parameter, ours_of in pairs_of_weights(version, ours, theirs):
        if not isinstance(parameter, torch.nn.Module):
            yield slice(None), variable, parameter, ours_of
            continue
        first, last = np.s_[:, :MLP], np.s_[:, MLP:]
        yield first, variable, parameter.gate_proj.weight, transposed
        yield last, variable, parameter.up_proj.weight, transposed
    if version == 2:
        return
    for i, layer in enumerate(theirs.layers):  # x and z, channel by channel
        layer = layer.mamba_decoder if i in USES[1] else layer
        matrix = layer.mamba.in_proj.weight
        kernel = ours.get_layer(f"mamba_{i}").in_proj.kernel
        for j in range(HEADS):
            for part in range(2):
                start = (2 * j + part) * WIDTH
                rows = slice(2 * j * WIDTH + part, 2 * (j + 1) * WIDTH, 2)
                yield (
                    np.s_[:, start : start + WIDTH],
                    kernel,
                    matrix,
                    lambda z, r=rows: z[r].T,
                )


def reference(version):
    sizes = dict(vocab_size=11, hidden_size=HIDDEN, intermediate_size=MLP)
    sizes |= dict(num_hidden_layers=6, num_attention_heads=4, mamba_d_state=STATE)
    kinds = ["hybrid" if i in USES[version] else "mamba" for i in range(6)]
    sizes |= dict(layers_block_type=kinds, n_mamba_heads=HEADS)
    if version == 1:
        return ZambaModel(ZambaConfig(num_key_value_heads=4, **sizes))
    return Zamba2Model(
        Zamba2Config(
            **dict(sizes, chunk_size=4, adapter_rank=2, num_mem_blocks=2),
            **dict(use_shared_attention_adapter=True, use_mem_rope=True),
            time_step_min=1e-9,  # also their lower bound of the step, ours has none
        )
    )


def differences(version):
    """Of the outputs and of the gradients."""
    keras.utils.set_random_seed(0)
    second = dict(num_shared_blocks=2, adapter_rank=2)
    second |= dict(attention_adapters=True, use_rope=True)
    ours = shake(
        keras_edifice.build(
            "zamba",
            **dict(
                embed_size=HIDDEN, hidden_size=HIDDEN, mlp_size=MLP, version=version
            ),
            **dict(state_size=STATE, num_mamba_heads=HEADS, dropout=0.0),
            **dict(attention_layers=USES[version], window_size=LENGTH),
            **(second if version == 2 else {}),
            return_sequences=True,
        )
    )
    theirs = reference(version)
    weights = list(parts(version, ours, theirs))
    assert len({v.path for _, v, _, _ in weights}) == len(ours.weights)
    for index, variable, parameter, ours_of in weights:
        part = ours_of(parameter.data)  # a view, so that this writes theirs
        value = variable.numpy()[index]
        assert tuple(part.shape) == value.shape
        part.copy_(torch.tensor(value.copy()))
    x = np.random.default_rng(0).normal(size=(3, LENGTH, HIDDEN)).astype("float32")
    by_weight, by_input = gradients(
        ours, x, lambda y: keras.ops.sum(keras.ops.square(y))
    )
    by_weight = {
        v.path: g for v, g in zip(ours.trainable_variables, by_weight, strict=True)
    }
    theirs_x = torch.tensor(x, requires_grad=True)
    outputs = theirs(inputs_embeds=theirs_x, use_cache=False).last_hidden_state
    outputs.square().sum().backward()
    pairs = [(by_input, theirs_x.grad.numpy())]
    pairs += [
        (by_weight[v.path][index], f(p.grad).numpy()) for index, v, p, f in weights
    ]
    forward = difference(ours(x), outputs.detach().numpy())
    return forward, max(difference(a, b) for a, b in pairs)


def test_zamba_equals_both_versions_of_transformers(fidelity):
    forward, gradient = zip(differences(1), differences(2), strict=True)
    fidelity.record(
        "zamba",
        "transformers ZambaModel and Zamba2Model",
        forward=max(forward),
        gradient=max(gradient),
    )
