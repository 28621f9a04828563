"""S5: one diagonal state space that reads and writes all features at once.

    x' = Λ x + B̃ u,    Λ̄ = e^(ΛΔ),    B̄ = (Λ̄ - 1) / Λ B̃
    x_k = Λ̄ x_{k-1} + B̄ u_k,    y_k = 2 Re(C̃ x_k) + D u_k
    output = g ⊙ σ(W g + b),    g = GELU(y)

Where `s4d.py` has a small state for each feature, this has one state of P complex
numbers, which is scanned. Λ starts as the normal part of HiPPO-LegS.
"""

import math
from typing import Literal

import keras
import numpy as np
from keras import initializers, layers, ops

from keras_edifice.blocks.batch_norm import BatchNorm
from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.feed_forward import FeedForward
from keras_edifice.blocks.layer_norm import LayerNorm
from keras_edifice.blocks.post_norm import post_norm_residual
from keras_edifice.blocks.recurrence_initializers import fan_in_uniform
from keras_edifice.blocks.sequence import residual, sequence_input, sequence_model
from keras_edifice.model import EdificeModel
from keras_edifice.ops.complex_scan import complex_linear_scan, complex_linear_scan_step
from keras_edifice.ops.gelu import gelu
from keras_edifice.ops.hippo import nplr
from keras_edifice.ops.pairs import exp, times
from keras_edifice.ops.state_space import DISCRETIZATIONS, discretize
from keras_edifice.options import NonNegative, Positive, Rate, Size, check
from keras_edifice.registry import architecture

Discretization = Literal[DISCRETIZATIONS]
OutputInit = Literal["trunc_standard_normal", "lecun_normal", "complex_normal"]
Activation = Literal["half_glu1", "full_glu", "half_glu2", "gelu"]
Norm = Literal["layer", "batch"]


def _truncated_normal(rng, shape, stddev):
    """Normal numbers without those beyond two deviations, then of that `stddev`."""
    z = rng.normal(size=shape)
    while (far := np.abs(z) > 2).any():
        z[far] = rng.normal(size=far.sum())
    return stddev / 0.87962566103423978 * z


def _batch_norm(epsilon=1e-5, **kwargs):
    return BatchNorm(epsilon=epsilon, momentum=0.95, **kwargs)


@keras.saving.register_keras_serializable("keras_edifice")
class S5Layer(Composite):
    """(batch, time, features) -> the same. Causal; O(1) state per step.

    The same at all times: a shifted input gives a shifted output. The state is x as its
    real and its imaginary part, (batch, states) each, in float32, where there are
    state_size / 2 states if `conj_sym`, else state_size. A masked step leaves it as it
    is.

    The weights `Lambda_real`, `Lambda_imag`, `B_real`, `B_imag` and `log_step` want a
    learning rate of at most 0.001 and no weight decay.

    Args:
        state_size: P, the real numbers that are remembered.
        num_blocks: number of copies of HiPPO that Λ starts from, of P / num_blocks
            eigenvalues each.
        conj_sym: whether each eigenvalue stands for its conjugate too.
        discretization: "zoh" or "bilinear", how Λ̄ and B̄ follow from Λ, B̃ and Δ.
        c_init: "trunc_standard_normal" and "lecun_normal" turn a C of variance 1/P, or
            1 / (P · features), into the eigenvectors; "complex_normal" is a C̃ of unit
            variance.
        clip_eigs: whether the real parts of Λ are at most -0.0001.
        activation: "half_glu1" as above, "full_glu" (W_1 g + b_1) ⊙ σ(W g + b),
            "half_glu2" y ⊙ σ(W g + b), or "gelu" for g itself.
        bidirectional: adds a scan from the end, with a C̃ of its own; then there is no
            state.
        dt_min: smallest Δ at the start.
        dt_max: largest Δ at the start.
        dropout: rate on g, in training.

    Raises:
        ValueError: a choice is not one of the above, or `state_size` is no even
            multiple of `num_blocks`; a state of a bidirectional layer.
    """

    def __init__(
        self,
        state_size=64,
        num_blocks=1,
        conj_sym=True,
        discretization="zoh",
        c_init="trunc_standard_normal",
        clip_eigs=False,
        activation="half_glu1",
        bidirectional=False,
        dt_min=0.001,
        dt_max=0.1,
        dropout=0.0,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)  # the state keeps its precision
        if state_size % (2 * num_blocks):
            raise ValueError(
                "state_size must be an even multiple of num_blocks, received "
                f"{state_size} and {num_blocks}"
            )
        self.state_size, self.num_blocks = state_size, num_blocks
        self.conj_sym, self.clip_eigs = conj_sym, clip_eigs
        self.discretization = check(Discretization, "discretization", discretization)
        self.c_init = check(OutputInit, "c_init", c_init)
        self.activation = check(Activation, "activation", activation)
        self.bidirectional, self.dropout = bidirectional, dropout
        self.dt_min, self.dt_max = dt_min, dt_max
        self.supports_masking = True

    def build(self, input_shape):
        features = input_shape[-1]
        self.states = self.state_size // (2 if self.conj_sym else 1)
        for name, array in self._start(features).items():
            start = initializers.Constant(array.astype("float32"))
            weight = self.add_weight(array.shape, start, autocast=False, name=name)
            setattr(self, name, weight)
        self.drop = layers.Dropout(self.dropout, dtype=self.dtype_policy, name="drop")
        gates = {"gelu": [], "full_glu": ["gate", "value"]}
        for name in gates.get(self.activation, ["gate"]):
            dense = Dense(
                features,
                kernel_initializer=fan_in_uniform(),
                dtype=self.dtype_policy,
                name=name,
            )
            dense.build((None, None, features))
            setattr(self, name, dense)

    def _start(self, features):
        """The weights of the state space at the start, by name."""
        rng = np.random.default_rng(initializers.RandomNormal().seed)
        size, blocks = self.state_size, self.num_blocks
        Lambda, _, _, V = nplr("legs", size // blocks)
        kept = self.states // blocks
        Lambda, V = np.tile(Lambda[:kept], blocks), np.kron(np.eye(blocks), V[:, :kept])
        B = V.conj().T @ _truncated_normal(rng, (size, features), size**-0.5)
        arrays = dict(Lambda_real=Lambda.real, Lambda_imag=Lambda.imag)
        arrays |= dict(B_real=B.real, B_imag=B.imag)
        for name in ["C", "C_ahead"][: 1 + self.bidirectional]:
            if self.c_init == "complex_normal":
                shape = 2, features, self.states
                C = rng.normal(size=shape, scale=math.sqrt(0.5))
                C = C[0] + 1j * C[1]
            else:
                inputs = size * (features if self.c_init == "lecun_normal" else 1)
                C = _truncated_normal(rng, (2, features, size), inputs**-0.5)
                C = (C[0] + 1j * C[1]) @ V
            arrays |= {f"{name}_real": C.real, f"{name}_imag": C.imag}
        arrays["D"] = rng.normal(size=features)
        low, high = math.log(self.dt_min), math.log(self.dt_max)
        arrays["log_step"] = rng.uniform(low, high, self.states)
        return arrays

    def system(self):
        """Λ̄ (states,) and B̄ (states, features), pairs (real, imaginary part)."""
        real = ops.convert_to_tensor(self.Lambda_real)
        if self.clip_eigs:
            real = ops.minimum(real, -1e-4)
        Lambda = ops.expand_dims(real, -1), ops.expand_dims(self.Lambda_imag, -1)
        rate, weight = discretize(Lambda, ops.exp(self.log_step), self.discretization)
        B = ops.convert_to_tensor(self.B_real), ops.convert_to_tensor(self.B_imag)
        return tuple(z[:, 0] for z in exp(rate)), times(weight, B)

    def call(
        self, x, mask=None, initial_state=None, return_state=False, training=False
    ):
        stateful = initial_state is not None or return_state
        if stateful and self.bidirectional:
            raise ValueError("a bidirectional S5Layer has no state; pass none")
        u, (decay, B) = ops.cast(x, "float32"), self.system()
        driven = tuple(ops.matmul(u, ops.transpose(z)) for z in B)  # (b, t, states)
        if mask is not None:
            valid = ops.expand_dims(mask, -1)
            driven = tuple(ops.where(valid, z, ops.zeros_like(z)) for z in driven)
            decay = tuple(
                ops.where(valid, z, other * ops.ones_like(driven[0]))
                for z, other in zip(decay, (1.0, 0.0), strict=True)
            )
        states, last = complex_linear_scan(decay, driven, initial_state, True)
        y = self._read(states, self.C_real, self.C_imag)
        if self.bidirectional:
            driven = tuple(ops.flip(z, axis=1) for z in driven)
            if mask is not None:
                decay = tuple(ops.flip(z, axis=1) for z in decay)
            states = complex_linear_scan(decay, driven)
            states = tuple(ops.flip(z, axis=1) for z in states)
            y = y + self._read(states, self.C_ahead_real, self.C_ahead_imag)
        y = self._activated(y, u, training)
        return (y, last) if return_state else y

    def _read(self, states, real, imag):
        """Re(C̃ x), or twice that for the conjugates."""
        y = ops.matmul(states[0], ops.transpose(real))
        y = y - ops.matmul(states[1], ops.transpose(imag))
        return 2.0 * y if self.conj_sym else y

    def _activated(self, y, u, training=False):
        """What happens at each step by itself: D and the gate."""
        y = y + self.D * u
        g = self.drop(ops.cast(gelu(y), self.compute_dtype), training=training)
        if self.activation == "gelu":
            return g
        gated = {
            "half_glu1": lambda: g,
            "half_glu2": lambda: ops.cast(y, self.compute_dtype),
            "full_glu": lambda: self.value(g),
        }
        return gated[self.activation]() * ops.sigmoid(self.gate(g))

    def initial_state(self, batch_size):
        """The state before the first step: zeros."""
        shape = (batch_size, self.states)
        return ops.zeros(shape, dtype="float32"), ops.zeros(shape, dtype="float32")

    def step(self, x_t, state):
        """One step: (batch, features) and the state -> the output and the new state."""
        if self.bidirectional:
            raise ValueError("a bidirectional S5Layer cannot run step by step")
        u, (decay, B) = ops.cast(x_t, "float32"), self.system()
        driven = tuple(ops.matmul(u, ops.transpose(z)) for z in B)
        state = complex_linear_scan_step(decay, driven, state)
        return self._activated(self._read(state, self.C_real, self.C_imag), u), state

    def compute_output_shape(self, input_shape):
        return input_shape


@architecture(
    paper="Smith, Warrington & Linderman 2023, Simplified State Space Layers for "
    "Sequence Modeling, arXiv:2208.04933",
    kind="sequence",
    inputs="(batch, window_size, embed_size)",
    outputs="(batch, hidden_size)",
    causal=True,
    streaming=True,
    multiples={"state_size": "num_blocks"},
    tiny=dict(
        embed_size=3,
        hidden_size=4,
        state_size=8,
        num_blocks=2,
        activation="full_glu",
        num_layers=1,
        mlp_ratio=2.0,
        window_size=7,
    ),
)
def s5(
    *,
    embed_size: Size | None = None,
    hidden_size: Size = 256,
    state_size: Size = 64,
    num_blocks: Size = 1,
    num_layers: Size = 4,
    conj_sym: bool = True,
    discretization: Discretization = "zoh",
    c_init: OutputInit = "trunc_standard_normal",
    clip_eigs: bool = False,
    activation: Activation = "half_glu1",
    prenorm: bool = True,
    norm: Norm = "layer",
    dt_min: Positive = 0.001,
    dt_max: Positive = 0.1,
    bidirectional: bool = False,
    mlp_ratio: NonNegative = 0.0,
    dropout: Rate = 0.1,
    return_sequences: bool = False,
    pool: Literal["last", "mean"] | None = None,
    vocab_size: Size | None = None,
    tie_embeddings: bool = True,
    window_size: Size | None = 60,
) -> EdificeModel:
    """Residual stack of S5 layers.

    Args:
        embed_size: features of each step; None for tokens.
        hidden_size: width of the residual stream.
        state_size: numbers that a layer remembers, for all features together.
        num_blocks: copies of HiPPO that the state starts from; twice as many must
            divide state_size.
        num_layers: number of S5 layers.
        conj_sym: keep one of each two conjugate eigenvalues.
        discretization: zero-order hold or bilinear method.
        c_init: how the state's output starts.
        clip_eigs: keep the eigenvalues to the left of zero.
        activation: the gate after the state space, or none but "gelu".
        prenorm: normalise before each layer and at the end, instead of after each sum.
        norm: layer or batch normalisation.
        dt_min: smallest step size at the start.
        dt_max: largest step size at the start.
        bidirectional: steps see those ahead, too; then it cannot run token by token.
        mlp_ratio: width of a feed-forward layer after each S5 layer, relative to
            hidden_size; 0 for none.
        dropout: rate within each layer and on its output, in training.
        return_sequences: give every step, (batch, window_size, hidden_size).
        pool: how the steps become one vector, by the last or by their mean; None for
            the last, for the mean if bidirectional.
        vocab_size: number of tokens, where the input is their numbers, (batch,
            window_size), instead of features; the output is then the logits of the
            next token at every step, (batch, window_size, vocab_size).
        tie_embeddings: those logits use the matrix that embeds the tokens.
        window_size: steps of the input, None for any number.

    Raises:
        ValueError: `vocab_size` together with `bidirectional`.
    """
    inputs, x = sequence_input(
        window_size, embed_size, hidden_size, vocab_size, tie_embeddings, bidirectional
    )
    normalise = {"layer": LayerNorm, "batch": _batch_norm}[norm]
    add = residual if prenorm else post_norm_residual
    for i in range(num_layers):
        mixers = [
            S5Layer(
                state_size=state_size,
                num_blocks=num_blocks,
                conj_sym=conj_sym,
                discretization=discretization,
                c_init=c_init,
                clip_eigs=clip_eigs,
                activation=activation,
                bidirectional=bidirectional,
                dt_min=dt_min,
                dt_max=dt_max,
                dropout=dropout,
                name=f"s5_{i}",
            )
        ]
        if width := int(mlp_ratio * hidden_size):
            mixers.append(FeedForward(width, dropout=dropout, name=f"mlp_{i}"))
        for mixer in mixers:
            x = add(x, mixer, normalise, dropout=dropout)
    if prenorm:
        x = normalise(name="final_norm")(x)
    pool = pool or ("mean" if bidirectional else "last")
    return sequence_model(inputs, x, return_sequences, pool, name="s5")
