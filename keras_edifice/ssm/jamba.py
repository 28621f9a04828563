"""Jamba: Mamba, now and then attention, and a mixture of experts behind every other.

    x ← x + mixer_i(norm(x)),    x ← x + ffn_i(norm(x))
    mixer_i = attention if i mod a = o, else Mamba with norms on δ, B and C
    ffn_i = mixture of experts if i mod m = p, else SwiGLU

The attention has no position encoding: the Mamba layers before it know the order.
Read `mamba.py` and `blocks/mixture_of_experts.py` first.
"""

from typing import Literal

from keras_edifice.blocks.feed_forward import GatedFFN
from keras_edifice.blocks.grouped_query_attention import GroupedQueryAttention
from keras_edifice.blocks.mixture_of_experts import MixtureOfExperts
from keras_edifice.blocks.rms_norm import RMSNorm
from keras_edifice.blocks.sequence import residual, sequence_input, sequence_model
from keras_edifice.model import EdificeModel
from keras_edifice.options import Count, Fraction, NonNegative, Positive, Rate, Size
from keras_edifice.registry import architecture
from keras_edifice.ssm.mamba import MambaBlock

STDDEV = 0.02
"""Of the normal distribution that the matrices around Mamba start from."""
NORMAL = {"class_name": "RandomNormal", "config": {"stddev": STDDEV}}


def _period(attention_every, attention_ratio):
    """Layers from one attention to the next."""
    if attention_ratio is None:
        return attention_every
    if attention_ratio == 0.0:
        raise ValueError(
            "attention_ratio must be above 0, received 0.0; a model without attention "
            "is 'mamba'"
        )
    return round(1.0 / attention_ratio)


def _check_offset(kind, offset, period):
    if offset >= period:
        raise ValueError(
            f"{kind}_offset must be below {kind}_every, received {offset} and "
            f"{period}; change one of them"
        )


@architecture(
    paper="Lieber et al. 2024, Jamba: A Hybrid Transformer-Mamba Language Model, "
    "arXiv:2403.19887",
    kind="sequence",
    inputs="(batch, window_size, embed_size)",
    outputs="(batch, hidden_size)",
    causal=True,
    streaming=True,
    multiples={"num_heads": "num_kv_heads"},
    tiny=dict(
        embed_size=3,
        hidden_size=18,
        num_layers=2,
        attention_every=2,
        num_heads=2,
        num_kv_heads=1,
        state_size=3,
        mlp_size=5,
        num_experts=3,
        dropout=0.1,
        window_size=7,
    ),
    variants={
        "v0.1": dict(
            hidden_size=4096,
            num_layers=32,
            attention_every=8,
            num_heads=32,
            num_kv_heads=8,
            mlp_size=14_336,
            num_experts=16,
        ),
    },
)
def jamba(
    *,
    embed_size: Size | None = None,
    hidden_size: Size = 256,
    num_layers: Size = 6,
    attention_every: Size = 3,
    attention_offset: Count | None = None,
    attention_ratio: Fraction | None = None,
    num_heads: Size = 4,
    num_kv_heads: Size | None = None,
    head_dim: Size | None = None,
    attention_window: Size | None = None,
    state_size: Size = 16,
    expand_factor: Size = 2,
    conv_size: Size = 4,
    mlp_size: Size | None = None,
    num_experts: Size = 4,
    num_experts_per_token: Size = 2,
    expert_every: Size = 2,
    expert_offset: Count = 1,
    router_aux_weight: NonNegative = 0.001,
    norm_eps: Positive = 1e-6,
    dropout: Rate = 0.1,
    return_sequences: bool = False,
    pool: Literal["last", "mean"] = "last",
    vocab_size: Size | None = None,
    tie_embeddings: bool = False,
    window_size: Size | None = 60,
) -> EdificeModel:
    """Pre-norm residual stack of Mamba and attention, each with a feed-forward.

    Args:
        embed_size: features of each step; None for tokens.
        hidden_size: width of the residual stream.
        num_layers: number of pairs of a mixer and a feed-forward.
        attention_every: layers from one attention to the next; 8 in the paper.
        attention_offset: first layer with attention, from 0; None for half of
            attention_every.
        attention_ratio: share of the layers that are attention, which then gives
            attention_every as its inverse, rounded.
        num_heads: query heads of the attention.
        num_kv_heads: its key and value heads, None for as many.
        head_dim: size of each head, None for an equal share of hidden_size.
        attention_window: tokens that the attention sees, its own included; None for
            all before.
        state_size: numbers that each channel of Mamba remembers.
        expand_factor: width of its recurrence relative to hidden_size.
        conv_size: taps of the convolution before the recurrence.
        mlp_size: width of each feed-forward, also as an expert; None for 3.5 times
            hidden_size.
        num_experts: feed-forwards to choose from, 16 in the paper; with 1 all layers
            are dense.
        num_experts_per_token: experts that each token takes.
        expert_every: layers from one mixture of experts to the next.
        expert_offset: first layer with a mixture of experts, from 0.
        router_aux_weight: factor of each router's load-balancing loss, in training.
        norm_eps: epsilon of every RMSNorm.
        dropout: rate on each branch's output, in training.
        return_sequences: give every step, (batch, window_size, hidden_size).
        pool: how the steps become one vector, by the last or by their mean.
        vocab_size: number of tokens, where the input is their numbers, (batch,
            window_size), instead of features; the output is then the logits of the
            next token at every step, (batch, window_size, vocab_size).
        tie_embeddings: those logits use the matrix that embeds the tokens.
        window_size: steps of the input, None for any number.
    """
    attention_every = _period(attention_every, attention_ratio)
    if attention_offset is None:
        attention_offset = attention_every // 2
    _check_offset("attention", attention_offset, attention_every)
    _check_offset("expert", expert_offset, expert_every)
    mlp_size = mlp_size or int(3.5 * hidden_size)
    inputs, x = sequence_input(
        window_size, embed_size, hidden_size, vocab_size, tie_embeddings
    )
    for i in range(num_layers):
        if i % attention_every == attention_offset:
            mixer = GroupedQueryAttention(
                num_heads,
                num_kv_heads,
                head_dim,
                attention_window=attention_window,
                kernel_initializer=NORMAL,
                name=f"attention_{i}",
            )
        else:
            mixer = MambaBlock(
                state_size=state_size,
                expand_factor=expand_factor,
                conv_size=conv_size,
                inner_norms=True,
                norm_eps=norm_eps,
                depth=num_layers,
                name=f"mamba_{i}",
            )
        if num_experts > 1 and i % expert_every == expert_offset:
            ffn = MixtureOfExperts(
                num_experts,
                num_experts_per_token,
                mlp_size,
                balance_weight=router_aux_weight,
                stddev=STDDEV,
                name=f"experts_{i}",
            )
        else:
            ffn = GatedFFN(mlp_size, stddev=STDDEV, name=f"ffn_{i}")
        x = residual(x, mixer, epsilon=norm_eps, dropout=dropout)
        x = residual(x, ffn, epsilon=norm_eps, dropout=dropout)
    x = RMSNorm(norm_eps, name="final_norm")(x)
    return sequence_model(inputs, x, return_sequences, pool, name="jamba")
