from xlstm.blocks.mlstm.block import mLSTMBlockConfig
from xlstm.blocks.mlstm.layer import mLSTMLayerConfig
from xlstm.xlstm_block_stack import xLSTMBlockStack, xLSTMBlockStackConfig

from tests.fidelity.test_mlstm import (
    HEADS,
    HIDDEN,
    LAYERS,
    LENGTH,
    compared,
    matrix_block,
    model,
    scale,
)
from tests.fidelity.test_slstm import block_config, scalar_block


def stack(ours, peer):
    for i, block in enumerate(peer.blocks):
        yield from (scalar_block if i == 1 else matrix_block)(ours, i, block)
    yield ours.get_layer("final_norm").gamma, [peer.post_blocks_norm.weight], scale


def test_xlstm_equals_that_of_its_authors(fidelity):
    layer = mLSTMLayerConfig(
        conv1d_kernel_size=4, qkv_proj_blocksize=4, num_heads=HEADS
    )
    config = xLSTMBlockStackConfig(
        mlstm_block=mLSTMBlockConfig(mlstm=layer),
        slstm_block=block_config(),
        context_length=LENGTH,
        num_blocks=LAYERS,
        embedding_dim=HIDDEN,
        slstm_at=[1],
    )
    peer = xLSTMBlockStack(config)
    forward, gradient = compared(model("xlstm"), peer, peer, stack)
    fidelity.record("xlstm", "xlstm xLSTMBlockStack", forward, gradient)
