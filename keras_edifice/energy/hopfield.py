"""Modern continuous Hopfield network: memory with an energy, and its trained layers.

    E(ξ) = -β⁻¹ lse(β X ξ) + ½ ξᵀξ + β⁻¹ ln S + ½ max ‖x_i‖²              eq. 2
    ξ ← Xᵀ softmax(β X ξ), which never raises E                             eq. 3

The rows of X are the S stored patterns x_i. The layers iterate in an association
space and then read out, eq. 10:

    Ξ = R W_q,  K = Y W_k,  Ξ ← softmax(β Ξ Kᵀ) K,  Z = softmax(β Ξ Kᵀ) Y W_v W_o

No update and one read are multi-head attention with the scale β.
"""

import math
from typing import Literal

import keras
import numpy as np
from keras import Input, layers, ops

from keras_edifice.backends.traits import SHARES_MATRICES
from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.layer_norm import LayerNorm
from keras_edifice.model import EdificeModel
from keras_edifice.options import Count, Positive, Rate, Size
from keras_edifice.registry import architecture


def _association(state, stored, beta, mask=None):
    """softmax(β Ξ Kᵀ) over the stored patterns that `mask` keeps; zeros if none."""
    scores = beta * ops.matmul(state, ops.swapaxes(stored, -1, -2))  # (..., t, s)
    if mask is None:
        return ops.softmax(scores, axis=-1)
    weights = ops.softmax(ops.where(mask, scores, -1e9), axis=-1)
    return ops.where(mask, weights, 0.0)


def associate(
    state, stored, beta, update_steps=0, update_eps=1e-4, max_updates=64, mask=None
):
    """Association after the state updates of eq. 3, in float32.

    Args:
        state: (..., t, d), the state patterns Ξ.
        stored: (..., s, d), the stored patterns K.
        beta: inverse temperature.
        update_steps: number of updates; None repeats until a state's association
            moves by no more than `update_eps` (2-norm). Each state stops on its own,
            so examples of a batch do not see each other.
        update_eps: where None stops.
        max_updates: updates at most if None. The loop is unrolled: it has a gradient
            on every backend and can be exported.
        mask: True where a stored pattern takes part; broadcasts to (..., t, s).

    Returns:
        (..., t, s), the weights of the final read.
    """
    state, stored = ops.cast(state, "float32"), ops.cast(stored, "float32")
    weights, active = _association(state, stored, beta, mask), None
    for _ in range(max_updates if update_steps is None else update_steps):
        new = _association(ops.matmul(weights, stored), stored, beta, mask)
        if update_steps is None:
            moved = ops.sum(ops.square(new - weights), axis=-1, keepdims=True)
            new = new if active is None else ops.where(active, new, weights)
            moving = moved > update_eps**2
            active = moving if active is None else ops.logical_and(active, moving)
        weights = new
    return weights


def energy(state, stored, beta, mask=None):
    """Energy of eq. 2, in float32.

    Args:
        state: (..., t, d), the states ξ.
        stored: (..., s, d), the stored patterns.
        beta: inverse temperature.
        mask: (..., s), True where a pattern is stored.

    Returns:
        (..., t).
    """
    state, stored = ops.cast(state, "float32"), ops.cast(stored, "float32")
    scores = beta * ops.matmul(state, ops.swapaxes(stored, -1, -2))
    norms = ops.sum(ops.square(stored), axis=-1)  # (..., s)
    count = ops.sum(ops.ones_like(norms), axis=-1)
    if mask is not None:
        scores = ops.where(ops.expand_dims(mask, -2), scores, -1e9)
        norms = ops.where(mask, norms, 0.0)
        count = ops.sum(ops.cast(mask, "float32"), axis=-1)
    constant = ops.log(count) / beta + 0.5 * ops.max(norms, axis=-1)
    attraction = ops.logsumexp(scores, axis=-1) / beta
    return (
        0.5 * ops.sum(ops.square(state), axis=-1)
        - attraction
        + ops.expand_dims(constant, -1)
    )


def _normal():
    """The initial values of every map and of every trained pattern."""
    return keras.initializers.RandomNormal(stddev=0.02)


def _for_all(stored, state):
    """Patterns (1 or b, ...) that are shared by the examples, once for each of them."""
    if SHARES_MATRICES or stored.shape[0] != 1 or state.shape[0] == 1:
        return stored
    return ops.broadcast_to(stored, (ops.shape(state)[0], *ops.shape(stored)[1:]))


@keras.saving.register_keras_serializable("keras_edifice")
class Hopfield(Composite):
    """States (b, t, r), stored (b, s, y) -> (b, t, output_dim).

    Invariant to the order of the stored patterns. What is read may differ from what
    is compared: pass `values` (b, s, v). Stored patterns with a batch of one are
    shared by all examples.

    Args:
        hidden_dim: width of the association space, all heads together.
        num_heads: associations side by side, each of width hidden_dim / num_heads.
        output_dim: width of the output; None is the width of the states.
        beta: inverse temperature; None is 1 / sqrt(hidden_dim / num_heads).
        update_steps: state updates before the read; None until they converge.
        update_eps: change of a state's association where None stops.
        max_updates: updates at most if None.
        normalize: LayerNorm of states, stored patterns and values before their maps.
        normalize_association: LayerNorm without weights of states and stored patterns
            in each head of the association space, in place of that of the states
            before their map.
        dropout: rate on the weights of the read.

    Raises:
        ValueError: hidden_dim is no multiple of num_heads.
    """

    def __init__(
        self,
        hidden_dim,
        num_heads=1,
        output_dim=None,
        beta=None,
        update_steps=0,
        update_eps=1e-4,
        max_updates=64,
        normalize=True,
        normalize_association=False,
        dropout=0.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if hidden_dim % num_heads:
            raise ValueError(
                f"hidden_dim must be a multiple of num_heads, received {hidden_dim} "
                f"and {num_heads}"
            )
        self.hidden_dim, self.num_heads = hidden_dim, num_heads
        self.output_dim, self.beta, self.dropout = output_dim, beta, dropout
        self.update_steps, self.update_eps = update_steps, update_eps
        self.max_updates = max_updates
        self.normalize = normalize
        self.normalize_association = normalize_association
        self.supports_masking = True

    def build(self, state_shape, stored_shape, values_shape=None):
        values_shape = values_shape or stored_shape
        self.state_map = self._map("state_map", self.hidden_dim, state_shape)
        self.stored_map = self._map("stored_map", self.hidden_dim, stored_shape)
        self.values_map = self._map("values_map", self.hidden_dim, values_shape)
        read_shape = (*state_shape[:-1], self.hidden_dim)
        self.output_map = self._map(
            "output_map", self.output_dim or state_shape[-1], read_shape
        )
        if self.normalize:
            self.stored_norm = self._norm("stored_norm", stored_shape)
            self.values_norm = self._norm("values_norm", values_shape)
        if self.normalize and not self.normalize_association:
            self.state_norm = self._norm("state_norm", state_shape)
        if self.normalize_association:
            width = self.hidden_dim // self.num_heads
            self.association_norm = self._norm("association_norm", (width,), False)
        self.drop = layers.Dropout(self.dropout, dtype=self.dtype_policy, name="drop")

    def _map(self, name, units, shape):
        layer = Dense(
            units,
            kernel_initializer=_normal(),
            dtype=self.dtype_policy,
            name=name,
        )
        layer.build(shape)
        return layer

    def _norm(self, name, shape, affine=True):
        layer = LayerNorm(
            center=affine, scale=affine, dtype=self.dtype_policy, name=name
        )
        layer.build(shape)
        return layer

    def call(self, state, stored, values=None, stored_mask=None, training=None):
        values = stored if values is None else values
        if self.normalize:
            stored, values = self.stored_norm(stored), self.values_norm(values)
        if self.normalize and not self.normalize_association:
            state = self.state_norm(state)
        state = self._split(self.state_map(state))  # (b, h, t, d)
        stored, values = (  # (b, h, s, d)
            _for_all(self._split(y), state)
            for y in (self.stored_map(stored), self.values_map(values))
        )
        if self.normalize_association:
            state, stored = self.association_norm(state), self.association_norm(stored)
        if stored_mask is not None:
            stored_mask = ops.cast(stored_mask, "bool")[:, None, None, :]
        weights = associate(
            state,
            stored,
            self.beta or 1.0 / math.sqrt(self.hidden_dim // self.num_heads),
            self.update_steps,
            self.update_eps,
            self.max_updates,
            stored_mask,
        )
        weights = self.drop(ops.cast(weights, values.dtype), training=training)
        return self.output_map(self._merge(ops.matmul(weights, values)))

    def _split(self, x):
        """(b, t, hidden_dim) -> (b, h, t, d)."""
        batch, length, _ = ops.shape(x)
        width = self.hidden_dim // self.num_heads
        x = ops.reshape(x, (batch, length, self.num_heads, width))
        return ops.transpose(x, (0, 2, 1, 3))

    def _merge(self, x):
        """(b, h, t, d) -> (b, t, hidden_dim)."""
        batch, _, length, _ = ops.shape(x)
        x = ops.transpose(x, (0, 2, 1, 3))
        return ops.reshape(x, (batch, length, self.hidden_dim))

    def compute_output_shape(self, state_shape, stored_shape, values_shape=None):
        return (*state_shape[:-1], self.output_dim or state_shape[-1])


@keras.saving.register_keras_serializable("keras_edifice")
class HopfieldLayer(Hopfield):
    """States (b, r) or (b, t, r) -> the same with output_dim: trained patterns.

    The stored patterns are weights, as wide as the association space.

    Args:
        num_patterns: number of stored patterns.
        hidden_dim: width of the association space and of each stored pattern.
        num_heads: as in `Hopfield`, like those that follow.
        output_dim: as in `Hopfield`.
        beta: as in `Hopfield`.
        update_steps: as in `Hopfield`.
        update_eps: as in `Hopfield`.
        max_updates: as in `Hopfield`.
        normalize: as in `Hopfield`.
        normalize_association: as in `Hopfield`; on by default, because a raw input of
            few features would lose its mean and its scale.
        dropout: as in `Hopfield`.
        shared_patterns: read the patterns that are compared; False learns separate
            ones to read.

    Raises:
        ValueError: hidden_dim is no multiple of num_heads.
    """

    def __init__(
        self,
        num_patterns,
        hidden_dim,
        num_heads=1,
        output_dim=None,
        beta=None,
        update_steps=0,
        update_eps=1e-4,
        max_updates=64,
        normalize=True,
        normalize_association=True,
        dropout=0.0,
        shared_patterns=True,
        **kwargs,
    ):
        super().__init__(
            hidden_dim,
            num_heads,
            output_dim,
            beta,
            update_steps,
            update_eps,
            max_updates,
            normalize,
            normalize_association,
            dropout,
            **kwargs,
        )
        self.num_patterns, self.shared_patterns = num_patterns, shared_patterns

    def build(self, input_shape):
        shape = (1, self.num_patterns, self.hidden_dim)
        self.stored = self.add_weight(shape, _normal(), name="stored")
        self.values = self.stored
        if not self.shared_patterns:
            self.values = self.add_weight(shape, _normal(), name="values")
        super().build((input_shape[0], None, input_shape[-1]), shape)

    def call(self, state, training=None):
        flat = len(state.shape) == 2
        x = ops.expand_dims(state, 1) if flat else state
        stored, values = (ops.convert_to_tensor(w) for w in (self.stored, self.values))
        x = super().call(x, stored, values, training=training)
        return ops.squeeze(x, 1) if flat else x

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.output_dim or input_shape[-1])


@keras.saving.register_keras_serializable("keras_edifice")
class HopfieldPooling(Hopfield):
    """Stored patterns (b, s, y) -> (b, output_dim): a trained state reads the set.

    Invariant to the order of the set; masked elements are left out. The constructor
    is that of `Hopfield`.
    """

    def build(self, input_shape):
        shape = (1, 1, input_shape[-1])
        self.state = self.add_weight(shape, _normal(), name="state")
        super().build(shape, input_shape)

    def call(self, stored, mask=None, training=None):
        # One state for all examples: its batch of one meets every set.
        state = ops.convert_to_tensor(self.state)
        read = super().call(state, stored, stored_mask=mask, training=training)
        return ops.squeeze(read, 1)

    def compute_mask(self, inputs, previous_mask=None):
        return None

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.output_dim or input_shape[-1])


@keras.saving.register_keras_serializable("keras_edifice")
class HopfieldMemory(layers.Layer):
    """States (b, d) or (b, t, d) -> the patterns they retrieve: no map, no training.

    Args:
        num_patterns: how many patterns there is room for.
        beta: inverse temperature; None is 1 / sqrt(d).
        update_steps: updates before the last one, which gives the output; None until
            the state converges.
        update_eps: change of a state's association where None stops.
        max_updates: updates at most if None.
    """

    def __init__(
        self,
        num_patterns,
        beta=None,
        update_steps=0,
        update_eps=1e-4,
        max_updates=64,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_patterns, self.beta, self.update_steps = (
            num_patterns,
            beta,
            update_steps,
        )
        self.update_eps, self.max_updates = update_eps, max_updates
        self.supports_masking = True

    def build(self, input_shape):
        def slots(shape, name):
            return self.add_weight(
                shape, "zeros", trainable=False, autocast=False, name=name
            )

        self.patterns = slots((self.num_patterns, input_shape[-1]), "patterns")
        self.taken = slots((self.num_patterns,), "taken")
        self.scale = self.beta or 1.0 / math.sqrt(input_shape[-1])

    def call(self, state):
        return ops.cast(self._retrieve(state, self.update_steps), state.dtype)

    def store(self, patterns):
        """Replaces what is stored by `patterns` (number, d).

        Raises:
            ValueError: they are wider or more than the memory.
        """
        patterns = np.asarray(patterns, "float32")
        room, width = self.patterns.shape
        if patterns.ndim != 2 or patterns.shape[1] != width or len(patterns) > room:
            raise ValueError(
                f"{self.name} stores up to {room} patterns (number, {width}), received "
                f"shape {patterns.shape}; build it with other sizes"
            )
        free = room - len(patterns)
        self.patterns.assign(np.pad(patterns, [[0, free], [0, 0]]))
        self.taken.assign(np.pad(np.ones(len(patterns), "float32"), [0, free]))

    def retrieve(self, query, steps=None):
        """States (..., t, d) or (d,) after `steps` updates; None until they converge.

        Raises:
            ValueError: steps is below one.
        """
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be >= 1 or None, received {steps!r}")
        query = ops.convert_to_tensor(query, "float32")
        return self._retrieve(query, None if steps is None else steps - 1)

    def energy(self, query):
        """Energy (...) of states (..., d), eq. 2.

        Raises:
            ValueError: nothing is stored.
        """
        if not ops.convert_to_numpy(self.taken).any():
            raise ValueError(f"{self.name} is empty; call store(patterns) first")
        query = ops.convert_to_tensor(query, "float32")
        stored, taken = self._contents()
        return energy(query[..., None, :], stored, self.scale, taken)[..., 0]

    def _contents(self):
        return ops.convert_to_tensor(self.patterns), ops.convert_to_tensor(
            self.taken
        ) > 0

    def _retrieve(self, state, update_steps):
        """As many updates and the one that gives the output: eq. 3 with V = X."""
        stored, taken = self._contents()
        weights = associate(
            ops.expand_dims(state, -2),
            stored,
            self.scale,
            update_steps,
            self.update_eps,
            self.max_updates,
            taken,
        )
        return ops.squeeze(ops.matmul(weights, stored), -2)

    def compute_output_shape(self, input_shape):
        return input_shape


@architecture(
    paper="Ramsauer et al. 2021, Hopfield Networks is All You Need, arXiv:2008.02217",
    kind="vector",
    inputs="(batch, input_dim)",
    outputs="(batch, hidden_dim)",
    tiny=dict(input_dim=3, hidden_dim=8, num_patterns=5, num_heads=2, update_steps=2),
    multiples={"hidden_dim": "num_heads"},
)
def hopfield(
    *,
    input_dim: Size,
    hidden_dim: Size = 128,
    num_patterns: Size = 64,
    num_heads: Size = 1,
    beta: Positive | None = None,
    update_steps: Count | None = 0,
    update_eps: Positive = 1e-4,
    max_updates: Size = 64,
    normalize: bool = True,
    normalize_association: bool | None = None,
    shared_patterns: bool = True,
    dropout: Rate = 0.0,
    mode: Literal["layer", "attention", "pooling", "memory"] = "layer",
    use_mask: bool = False,
) -> EdificeModel:
    """Looks its input up among stored patterns, by updates that lower an energy.

    `mode` says what meets what:
        layer: inputs (batch, input_dim) meet trained patterns -> (batch, hidden_dim).
        attention: "state" (batch, t, input_dim) meets "stored" (batch, s, input_dim)
            -> (batch, t, input_dim).
        pooling: a trained state meets inputs (batch, s, input_dim)
            -> (batch, input_dim).
        memory: inputs (batch, input_dim) meet what `get_layer("memory").store` was
            given -> (batch, input_dim). The layer has `retrieve` and `energy` too.

    Args:
        input_dim: features of each input.
        hidden_dim: width of the association space, all heads together.
        num_patterns: stored patterns of the modes layer and memory.
        num_heads: associations side by side.
        beta: inverse temperature; None is one over the root of a head's width.
        update_steps: updates of the state before the read; None until it converges.
        update_eps: change of a state's association below which it has converged.
        max_updates: updates at most if update_steps is None.
        normalize: LayerNorm of states, stored patterns and values before their maps.
        normalize_association: LayerNorm of states and stored patterns after their
            maps, in place of that of the states before; None is on in mode layer,
            where the state is a raw input that would lose its mean and its scale.
        shared_patterns: mode layer reads the patterns it compares; False learns two.
        dropout: rate on the weights of the read, in training.
        mode: what is state and what is stored.
        use_mask: modes attention and pooling take "stored_mask" (batch, s), 1 = real.
    """
    if normalize_association is None:
        normalize_association = mode == "layer"
    updates = dict(
        beta=beta,
        update_steps=update_steps,
        update_eps=update_eps,
        max_updates=max_updates,
    )
    if mode == "memory":
        inputs = Input((input_dim,), name="inputs")
        outputs = HopfieldMemory(num_patterns, name="memory", **updates)(inputs)
        return EdificeModel(inputs, outputs, name="hopfield")
    association = dict(
        hidden_dim=hidden_dim,
        num_heads=num_heads,
        normalize=normalize,
        normalize_association=normalize_association,
        dropout=dropout,
        name=mode,
        **updates,
    )
    if mode == "layer":
        inputs = Input((input_dim,), name="inputs")
        outputs = HopfieldLayer(
            num_patterns,
            output_dim=hidden_dim,
            shared_patterns=shared_patterns,
            **association,
        )(inputs)
        return EdificeModel(inputs, outputs, name="hopfield")
    names = ["state", "stored"] if mode == "attention" else ["inputs"]
    inputs = {name: Input((None, input_dim), name=name) for name in names}
    patterns = list(inputs.values())
    mask = None
    if use_mask:
        mask = inputs["stored_mask"] = Input((None,), name="stored_mask")
    if mode == "attention":
        outputs = Hopfield(**association)(*patterns, stored_mask=mask)
    else:
        outputs = HopfieldPooling(**association)(*patterns, mask=mask)
    if len(inputs) == 1:
        inputs = inputs["inputs"]
    return EdificeModel(inputs, outputs, name="hopfield")
