from xlstm.blocks.slstm.block import sLSTMBlockConfig
from xlstm.blocks.slstm.layer import sLSTMLayerConfig
from xlstm.components.feedforward import FeedForwardConfig
from xlstm.xlstm_block_stack import xLSTMBlockStack, xLSTMBlockStackConfig

from tests.fidelity.test_mlstm import (
    HEADS,
    HIDDEN,
    LAYERS,
    LENGTH,
    compared,
    model,
    same,
    scale,
    turned,
)


def scalar_block(ours, i, block):
    """(ours, theirs, the function of ours that gives theirs) for all its weights."""
    mine, layer = ours.get_layer(f"slstm_{i}"), block.xlstm
    size = HIDDEN // HEADS
    yield ours.get_layer(f"slstm_{i}_norm").gamma, [block.xlstm_norm.weight], scale
    conv = layer.conv1d.conv
    yield mine.conv.kernel, [conv.weight], lambda a: [a.T[:, None]]
    yield mine.conv.bias, [conv.bias], same

    def gates(a):  # (heads, inputs, 2 outputs) -> two of (heads, outputs, inputs)
        return [
            a[..., part].swapaxes(1, 2) for part in (slice(size), slice(size, None))
        ]

    # The names are the wrong way round: `fgate` feeds the input gate.
    yield mine.if_proj.kernel, [layer.fgate.weight, layer.igate.weight], gates
    yield mine.zo_proj.kernel, [layer.zgate.weight, layer.ogate.weight], gates
    cell = layer.slstm_cell
    yield mine.R, [cell._recurrent_kernel_], lambda a: [a.swapaxes(1, 2)]

    def gate_first(a):
        return [a.reshape(HEADS, 4, size).swapaxes(0, 1).reshape(-1)]

    yield mine.bias, [cell._bias_], gate_first
    yield mine.norm.gamma, [layer.group_norm.weight], scale
    yield ours.get_layer(f"ffn_{i}_norm").gamma, [block.ffn_norm.weight], scale
    ffn = ours.get_layer(f"ffn_{i}")
    up = block.ffn.proj_up.weight
    yield (ffn.gate.kernel, ffn.up.kernel), [up], turned
    yield ffn.down.kernel, [block.ffn.proj_down.weight], turned


def stack(ours, peer):
    for i, block in enumerate(peer.blocks):
        yield from scalar_block(ours, i, block)
    yield ours.get_layer("final_norm").gamma, [peer.post_blocks_norm.weight], scale


def block_config():
    layer = sLSTMLayerConfig(
        backend="vanilla", num_heads=HEADS, conv1d_kernel_size=4, dtype="float32"
    )
    feed_forward = FeedForwardConfig(proj_factor=1.3, act_fn="gelu")
    return sLSTMBlockConfig(slstm=layer, feedforward=feed_forward)


def test_slstm_equals_that_of_its_authors(fidelity):
    config = xLSTMBlockStackConfig(
        slstm_block=block_config(),
        context_length=LENGTH,
        num_blocks=LAYERS,
        embedding_dim=HIDDEN,
        slstm_at="all",
    )
    peer = xLSTMBlockStack(config)
    forward, gradient = compared(model("slstm"), peer, peer, stack)
    fidelity.record("slstm", "xlstm xLSTMBlockStack", forward, gradient)
