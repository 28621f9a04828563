from unittest import mock

import keras
import numpy as np
import torch
import transformers
from xlstm.blocks.mlstm.block import mLSTMBlockConfig
from xlstm.blocks.mlstm.layer import mLSTMLayerConfig
from xlstm.xlstm_block_stack import xLSTMBlockStack, xLSTMBlockStackConfig

import keras_edifice
from tests.support.close import difference
from tests.support.gradients import gradients
from tests.support.shaking import shake

HIDDEN, HEADS, LAYERS, LENGTH = 32, 4, 2, 19


def turned(a):
    return [a.T]


def halves(a):
    return [half.T for half in np.split(a, 2, axis=-1)]


def same(a):
    return [a]


def scale(a):
    """Theirs is added to one."""
    return [a.reshape(-1) - 1]


def matrix_block(ours, i, block):
    """(ours, theirs, the function of ours that gives theirs) for all its weights."""
    mine, layer = ours.get_layer(f"mlstm_{i}"), block.xlstm
    cell, conv = layer.mlstm_cell, layer.conv1d.conv
    yield ours.get_layer(f"mlstm_{i}_norm").gamma, [block.xlstm_norm.weight], scale
    yield mine.up_proj.kernel, [layer.proj_up.weight], turned
    yield mine.conv.kernel, [conv.weight], lambda a: [a.T[:, None]]
    yield mine.conv.bias, [conv.bias], same
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(layer, name).weight
        yield getattr(mine, name).kernel, [weight], lambda a: [a.swapaxes(1, 2)]
    gates = cell.igate, cell.fgate
    yield mine.gates.kernel, [gate.weight for gate in gates], halves
    yield mine.gates.bias, [gate.bias for gate in gates], halves
    yield mine.norm.gamma, [cell.outnorm.weight], scale
    yield mine.skip, [layer.learnable_skip], same
    yield mine.down_proj.kernel, [layer.proj_down.weight], turned


def stack(ours, peer):
    for i, block in enumerate(peer.blocks):
        yield from matrix_block(ours, i, block)
    yield ours.get_layer("final_norm").gamma, [peer.post_blocks_norm.weight], scale


def stack_of_7b(ours, peer):

    def flat(a):
        return [a.reshape(-1)]

    for i, block in enumerate(peer.blocks):
        mine, layer = ours.get_layer(f"mlstm_{i}"), block.mlstm_layer
        yield ours.get_layer(f"mlstm_{i}_norm").gamma, [block.norm_mlstm.weight], flat
        yield ours.get_layer(f"ffn_{i}_norm").gamma, [block.norm_ffn.weight], flat
        names = dict(q="q", k="k", v="v", o="ogate_preact", out="out_proj")
        for name, other in names.items():
            kernel = getattr(mine, f"{name}_proj").kernel
            yield kernel, [getattr(layer, other).weight], turned
        gates = layer.igate_preact, layer.fgate_preact
        yield mine.gates.kernel, [gate.weight for gate in gates], halves
        yield mine.gates.bias, [gate.bias for gate in gates], halves
        yield mine.norm.gamma, [layer.multihead_norm.weight], flat
        ffn = ours.get_layer(f"ffn_{i}")
        names = dict(gate="proj_up_gate", up="proj_up", down="proj_down")
        for name, other in names.items():
            kernel = getattr(ffn, name).kernel
            yield kernel, [getattr(block.ffn, other).weight], turned
    yield ours.get_layer("final_norm").gamma, [peer.out_norm.weight], flat


def compared(ours, peer, run, pairs):
    """Largest differences forward and of all gradients, with our shaken weights."""
    shake(ours)
    pairs = [
        (mine if isinstance(mine, tuple) else (mine,), parts, turn)
        for mine, parts, turn in pairs(ours, peer)
    ]
    paths = [v.path for mine, *_ in pairs for v in mine]
    assert sorted(paths) == sorted(v.path for v in ours.trainable_variables)
    for mine, parts, turn in pairs:
        value = np.concatenate([v.numpy() for v in mine], axis=-1)
        for part, theirs in zip(parts, turn(value), strict=True):
            assert part.shape == theirs.shape
            part.data = torch.tensor(np.ascontiguousarray(theirs))
    rng = np.random.default_rng(0)
    x, r = rng.normal(size=(2, 3, LENGTH, HIDDEN)).astype("float32")
    # Not the sum of squares: after a norm it hardly depends on anything.
    by_weight, by_input = gradients(
        ours, x, lambda y: keras.ops.sum(keras.ops.multiply(y, r))
    )
    x_theirs = torch.tensor(x, requires_grad=True)
    outputs = run(x_theirs)
    (outputs * torch.tensor(r)).sum().backward()
    found = [difference(by_input, x_theirs.grad.numpy())]
    slopes = zip(ours.trainable_variables, by_weight, strict=True)
    slopes = {variable.path: gradient for variable, gradient in slopes}
    for mine, parts, turn in pairs:
        gradient = np.concatenate([slopes[v.path] for v in mine], axis=-1)
        offset = turn(np.zeros_like(gradient))  # what is added to a weight, see `scale`
        for part, value, zero in zip(parts, turn(gradient), offset, strict=True):
            found.append(difference(value - zero, part.grad.numpy()))
    return difference(ours(x), outputs.detach().numpy()), max(found)


def model(name, **options):
    keras.utils.set_random_seed(0)
    return keras_edifice.build(
        name,
        embed_size=HIDDEN,
        hidden_size=HIDDEN,
        num_heads=HEADS,
        num_layers=LAYERS,
        return_sequences=True,
        window_size=LENGTH,
        **options,
    )


def test_mlstm_equals_that_of_its_authors(fidelity):
    layer = mLSTMLayerConfig(
        conv1d_kernel_size=4, qkv_proj_blocksize=4, num_heads=HEADS
    )
    config = xLSTMBlockStackConfig(
        mlstm_block=mLSTMBlockConfig(mlstm=layer),
        context_length=LENGTH,
        num_blocks=LAYERS,
        embedding_dim=HIDDEN,
        slstm_at=[],
    )
    peer = xLSTMBlockStack(config)
    forward, gradient = compared(model("mlstm"), peer, peer, stack)
    fidelity.record("mlstm", "xlstm xLSTMBlockStack", forward, gradient)


def test_the_style_of_7b_equals_that_of_transformers():
    # Where the package above is there, transformers would take kernels from another.
    with mock.patch("transformers.utils.is_xlstm_available", return_value=False):
        from transformers.models.xlstm.modeling_xlstm import xLSTMModel
    config = transformers.xLSTMConfig(
        hidden_size=HIDDEN,
        num_heads=HEADS,
        num_hidden_layers=LAYERS,
        vocab_size=5,
        chunk_size=8,
        autocast_kernel_dtype="float32",
    )
    peer = xLSTMModel(config).train()

    def run(x):
        return peer(inputs_embeds=x, use_cache=False).last_hidden_state

    differences = compared(model("mlstm", block_style="7b"), peer, run, stack_of_7b)
    assert max(differences) < 1e-4
