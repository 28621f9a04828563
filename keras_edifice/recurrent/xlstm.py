"""xLSTM: LSTMs with exponential gates, of matrix and of scalar memories, in a stack.

    x ← x + mLSTM(norm(x))                                  block with a matrix memory
    x ← x + sLSTM(norm(x)),    x ← x + FFN(norm(x))         block with scalar memories
    y = norm(x)

Seven blocks of mLSTM, which run in parallel over time, to one of sLSTM, whose gates see
its own past, is the xLSTM[7:1] of the paper. The blocks are those of `mlstm.py` and
`slstm.py`.
"""

from typing import Literal

from keras_edifice.blocks.sequence import sequence_input
from keras_edifice.model import EdificeModel
from keras_edifice.options import Count, Positive, Rate, Size
from keras_edifice.recurrent.mlstm import BlockStyle, mlstm_block, xlstm_model
from keras_edifice.recurrent.slstm import slstm_block
from keras_edifice.registry import architecture


def places(cells, slstm_at, num_layers):
    """Indexes of the blocks with scalar memory.

    Raises:
        ValueError: `slstm_at` contradicts `cells`, or names a block that is not there.
    """
    if slstm_at is not None and cells != "mixed":
        raise ValueError(
            f"slstm_at places the blocks of cells='mixed', received cells={cells!r}; "
            "leave one of them out"
        )
    if cells == "slstm" or slstm_at == "all":
        return set(range(num_layers))
    if slstm_at is None:
        return set(range(1, num_layers, 8)) if cells == "mixed" else set()
    if any(i >= num_layers for i in slstm_at):
        raise ValueError(
            f"slstm_at must be below num_layers={num_layers}, received {slstm_at}"
        )
    return set(slstm_at)


@architecture(
    paper="Beck et al. 2024, xLSTM: Extended Long Short-Term Memory, arXiv:2405.04517",
    title="xLSTM",
    kind="sequence",
    inputs="(batch, window_size, embed_size)",
    outputs="(batch, hidden_size)",
    causal=True,
    streaming=True,
    tiny=dict(
        embed_size=3,
        hidden_size=4,
        num_layers=2,
        num_heads=2,
        qkv_block_size=2,
        proj_round=4,
        chunk_size=4,
        window_size=7,
    ),
    variants={
        "408m": dict(hidden_size=1024, num_layers=48, num_heads=4),
        "409m": dict(hidden_size=1024, num_layers=48, num_heads=4, cells="mlstm"),
        "7b": dict(
            hidden_size=4096,
            num_layers=32,
            num_heads=8,
            cells="mlstm",
            block_style="7b",
        ),
    },
)
def xlstm(
    *,
    embed_size: Size | None = None,
    hidden_size: Size = 256,
    num_layers: Size = 4,
    num_heads: Size = 4,
    cells: Literal["mixed", "mlstm", "slstm"] = "mixed",
    slstm_at: list[Count] | Literal["all"] | None = None,
    block_style: BlockStyle = "original",
    conv_size: Count = 4,
    qkv_block_size: Size = 4,
    mlstm_proj_factor: Positive = 2.0,
    slstm_mlp_factor: Positive = 1.3,
    proj_round: Size = 64,
    chunk_size: Size = 64,
    dropout: Rate = 0.0,
    return_sequences: bool = False,
    pool: Literal["last", "mean"] = "last",
    vocab_size: Size | None = None,
    tie_embeddings: bool = False,
    window_size: Size | None = 60,
) -> EdificeModel:
    """Pre-norm residual stack of mLSTM and sLSTM blocks.

    Args:
        embed_size: features of each step; None for tokens.
        hidden_size: width of the residual stream.
        num_layers: number of blocks.
        num_heads: memories of each block, side by side.
        cells: "mixed", or all blocks of one kind, as the architectures `mlstm` and
            `slstm`.
        slstm_at: indexes, from 0, of the sLSTM blocks of "mixed", or "all"; None for
            the second of every eight.
        block_style: "original", or "7b" for the blocks of xLSTM 7B, mLSTM only.
        conv_size: taps of the convolution in each block; 0 for none.
        qkv_block_size: features that queries, keys and values mix with each other.
        mlstm_proj_factor: width of the matrix memories relative to hidden_size.
        slstm_mlp_factor: width of the feed-forwards after scalar memories, relative to
            hidden_size.
        proj_round: those widths are rounded up to multiples of this.
        chunk_size: steps that mLSTM computes side by side; changes no number.
        dropout: rate on each branch, in training.
        return_sequences: give every step, (batch, window_size, hidden_size).
        pool: how the steps become one vector, by the last or by their mean.
        vocab_size: number of tokens, where the input is their numbers, (batch,
            window_size), instead of features; the output is then the logits of the
            next token at every step, (batch, window_size, vocab_size).
        tie_embeddings: those logits use the matrix that embeds the tokens.
        window_size: steps of the input, None for any number.
    """
    scalar = places(cells, slstm_at, num_layers)
    if block_style == "7b" and cells != "mlstm":
        raise ValueError(
            f"block_style='7b' has mLSTM blocks only, received cells={cells!r}; pass "
            "cells='mlstm'"
        )
    inputs, x = sequence_input(
        window_size, embed_size, hidden_size, vocab_size, tie_embeddings
    )
    shared = dict(num_heads=num_heads, conv_size=conv_size)
    for i in range(num_layers):
        if i in scalar:
            x = slstm_block(
                x, i, slstm_mlp_factor, proj_round, dropout, num_layers, **shared
            )
        else:
            x = mlstm_block(
                x,
                i,
                block_style,
                dropout,
                proj_round,
                num_layers,
                proj_factor=mlstm_proj_factor,
                qkv_block_size=qkv_block_size,
                chunk_size=chunk_size,
                **shared,
            )
    return xlstm_model(inputs, x, block_style, return_sequences, pool, "xlstm")
