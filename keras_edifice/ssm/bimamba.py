"""BiMamba: Mamba that reads the sequence forwards and backwards.

    [x, z] = u W_in,    y_f = core_f(x, z),    y_b = reverse(core_b(reverse(x, z)))
    output = (y_f + y_b) W_out

A core is what is between the projections of `mamba.py`: convolution, selection,
recurrence and gate; each direction has its own. Zhu et al. 2024 take the mean of the
directions, Schiff et al. 2024 also the product. It needs the whole sequence: it does
not stream.
"""

import math
from typing import Literal

import keras
from keras import layers, ops

from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.feed_forward import FeedForward
from keras_edifice.blocks.recurrence_initializers import fan_in_uniform
from keras_edifice.blocks.rms_norm import RMSNorm
from keras_edifice.blocks.sequence import residual, sequence_input, sequence_model
from keras_edifice.model import EdificeModel
from keras_edifice.options import NonNegative, Positive, Rate, Size, check
from keras_edifice.registry import architecture
from keras_edifice.ssm.mamba import Discretization, MambaBlock, Scan

Combine = Literal["add", "mean", "concat", "multiply"]


@keras.saving.register_keras_serializable("keras_edifice")
class MambaCore(MambaBlock):
    """(batch, time, 2 * channels), x and z -> (batch, time, channels). Causal.

    A `MambaBlock` without its projections in and out. The options and the state are
    those of it; `dt_rank` must be given, `expand_factor`, `use_bias` and `depth` have
    no meaning.
    """

    def build(self, input_shape):
        self.rank = self.dt_rank
        self.in_proj, self.out_proj = (
            layers.Identity(dtype=self.dtype_policy, name=name)
            for name in ("in_proj", "out_proj")
        )
        self._build_core(input_shape[-1] // 2)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], input_shape[-1] // 2)


@keras.saving.register_keras_serializable("keras_edifice")
class BiMambaBlock(Composite):
    """(batch, time, features) -> the same. Each step sees those on both sides.

    Padding that a mask hides changes nothing; it belongs on one side, not in between.

    Args:
        combine: how the directions become one: "add" or "mean" of them, "multiply"
            for the product of their projections, "concat" for one projection of both.
        tie_projections: whether both directions share W_in and W_out.
        expand_factor: width of each recurrence relative to that of the input.
        dt_rank: width of δ; None for features / 16, rounded up.
        use_bias: whether W_in and W_out have biases.
        depth: number of such blocks in the model; W_out starts divided by its root.
        core: further options of both `MambaCore`s; None for the defaults.

    Raises:
        ValueError: `combine` is not one of the above.
    """

    def __init__(
        self,
        combine="add",
        tie_projections=True,
        expand_factor=2,
        dt_rank=None,
        use_bias=False,
        depth=1,
        core=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.combine = check(Combine, "combine", combine)
        self.tie_projections, self.expand_factor = tie_projections, expand_factor
        self.dt_rank, self.use_bias, self.depth = dt_rank, use_bias, depth
        self.core = core
        self.supports_masking = True

    def build(self, input_shape):
        features = input_shape[-1]
        width = self.expand_factor * features
        rank = self.dt_rank or math.ceil(features / 16)
        concat, shared = self.combine == "concat", self.tie_projections
        wide = 2 * width if concat else width
        self.in_proj = self._dense("in_proj", 2 * width, features)
        self.out_proj = self._dense("out_proj", features, wide, self.depth)
        self.in_proj_back, self.out_proj_back = self.in_proj, self.out_proj
        if not shared:
            self.in_proj_back = self._dense("in_proj_back", 2 * width, features)
        if not (shared or concat):
            self.out_proj_back = self._dense(
                "out_proj_back", features, width, self.depth
            )
        self.ahead, self.back = (
            MambaCore(
                dt_rank=rank, dtype=self.dtype_policy, name=name, **(self.core or {})
            )
            for name in ("ahead", "back")
        )
        for core in (self.ahead, self.back):
            core.build((None, None, 2 * width))

    def _dense(self, name, units, inputs, depth=1):
        layer = Dense(
            units,
            use_bias=self.use_bias,
            kernel_initializer=fan_in_uniform(depth),
            dtype=self.dtype_policy,
            name=name,
        )
        layer.build((None, None, inputs))
        return layer

    def call(self, x, mask=None):
        ahead = self.ahead(self.in_proj(x), mask=mask)
        reverse = None if mask is None else ops.flip(mask, axis=1)
        back = self.back(ops.flip(self.in_proj_back(x), axis=1), mask=reverse)
        return self._combined(ahead, ops.flip(back, axis=1))

    def _combined(self, ahead, back):
        """The output of both directions, each (batch, time, channels)."""
        if self.combine == "concat":
            return self.out_proj(ops.concatenate([ahead, back], axis=-1))
        if self.combine == "multiply":
            return self.out_proj(ahead) * self.out_proj_back(back)
        if self.tie_projections:
            y = self.out_proj(ahead + back)
        else:
            y = self.out_proj(ahead) + self.out_proj_back(back)
        return 0.5 * y if self.combine == "mean" else y

    def compute_output_shape(self, input_shape):
        return input_shape


@architecture(
    paper="Zhu et al. 2024, Vision Mamba: Efficient Visual Representation Learning "
    "with Bidirectional State Space Model, arXiv:2401.09417; Schiff et al. 2024, "
    "Caduceus, arXiv:2403.03234",
    kind="sequence",
    inputs="(batch, window_size, embed_size)",
    outputs="(batch, hidden_size)",
    tiny=dict(
        embed_size=3,
        hidden_size=4,
        state_size=3,
        dt_rank=2,
        num_layers=1,
        inner_norms=True,
        chunk_size=3,
        mlp_ratio=1.5,
        window_size=7,
    ),
)
def bimamba(
    *,
    embed_size: Size | None = None,
    hidden_size: Size = 256,
    state_size: Size = 16,
    expand_factor: Size = 2,
    conv_size: Size = 4,
    dt_rank: Size | None = None,
    num_layers: Size = 4,
    combine: Combine = "add",
    tie_projections: bool = True,
    mlp_ratio: NonNegative = 0.0,
    scan: Scan = "auto",
    chunk_size: Size = 16,
    discretization: Discretization = "euler_b",
    dt_min: Positive = 0.001,
    dt_max: Positive = 0.1,
    dt_init_floor: Positive = 1e-4,
    dt_scale: Positive = 1.0,
    conv_bias: bool = True,
    use_bias: bool = False,
    inner_norms: bool = False,
    norm_eps: Positive = 1e-5,
    dropout: Rate = 0.1,
    return_sequences: bool = False,
    pool: Literal["last", "mean"] = "mean",
    vocab_size: Size | None = None,
    tie_embeddings: bool = True,
    window_size: Size | None = 60,
) -> EdificeModel:
    """Pre-norm residual stack of bidirectional Mamba blocks.

    Args:
        embed_size: features of each step; None for tokens.
        hidden_size: width of the residual stream.
        state_size: numbers that each channel remembers.
        expand_factor: width of each recurrence relative to hidden_size.
        conv_size: taps of the convolution before each recurrence.
        dt_rank: width of the projection that gives the step sizes; None for
            hidden_size / 16, rounded up.
        num_layers: number of blocks.
        combine: how the directions become one: their sum, their mean, the product of
            their projections, or a projection of both side by side.
        tie_projections: both directions share the projections into and out of the
            block.
        mlp_ratio: width of a feed-forward after each block relative to hidden_size;
            none at 0.
        scan: how the recurrence is computed; all ways give the same numbers.
        chunk_size: steps whose states exist at once, for the scans "auto", "chunked"
            and "sequential".
        discretization: weight of the input, Euler's Δ B as in the authors' code, or
            the zero-order hold of Mamba's equation 4.
        dt_min: smallest step size at the start.
        dt_max: largest step size at the start.
        dt_init_floor: no step size is below this at the start.
        dt_scale: scale of the step sizes' projection at the start.
        conv_bias: the convolutions have biases.
        use_bias: the projections into and out of the block have biases.
        inner_norms: normalise what selects step size, input and output, as in Jamba.
        norm_eps: epsilon of every RMSNorm.
        dropout: rate on each block's output, in training.
        return_sequences: give every step, (batch, window_size, hidden_size).
        pool: how the steps become one vector, by the last or by their mean.
        vocab_size: number of tokens, where the input is their numbers, (batch,
            window_size), instead of features; the output is then the logits of the
            token at every step, (batch, window_size, vocab_size), to be trained where
            the input's is masked.
        tie_embeddings: those logits use the matrix that embeds the tokens.
        window_size: steps of the input, None for any number.
    """
    inputs, x = sequence_input(
        window_size, embed_size, hidden_size, vocab_size, tie_embeddings
    )
    core = dict(
        state_size=state_size,
        conv_size=conv_size,
        scan=scan,
        chunk_size=chunk_size,
        discretization=discretization,
        dt_min=dt_min,
        dt_max=dt_max,
        dt_init_floor=dt_init_floor,
        dt_scale=dt_scale,
        conv_bias=conv_bias,
        inner_norms=inner_norms,
        norm_eps=norm_eps,
    )
    for i in range(num_layers):
        block = BiMambaBlock(
            combine=combine,
            tie_projections=tie_projections,
            expand_factor=expand_factor,
            dt_rank=dt_rank,
            use_bias=use_bias,
            depth=num_layers,
            core=core,
            name=f"bimamba_{i}",
        )
        x = residual(x, block, epsilon=norm_eps, dropout=dropout)
        if mlp_ratio:
            mlp = FeedForward(max(1, round(mlp_ratio * hidden_size)), name=f"mlp_{i}")
            x = residual(x, mlp, epsilon=norm_eps, dropout=dropout)
    x = RMSNorm(norm_eps, name="final_norm")(x)
    return sequence_model(inputs, x, return_sequences, pool, name="bimamba")
