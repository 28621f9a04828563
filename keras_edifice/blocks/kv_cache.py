"""A cache of keys and values, of the size that it will ever have.

    slot of the token at position p:   p         (static)
                                       p mod S   (rolling, of S slots)

A state is a dict of tensors, (batch, slots, ...) under the names of what is cached and
`length`, (batch,), the tokens so far of each row. So the position in a slot is known
without being stored, rows may be of different lengths, and nothing changes its shape:
a step compiles once.
"""

import keras
from keras import layers, ops

from keras_edifice.ops.masks import positions
from keras_edifice.ops.tracing import static_length


@keras.saving.register_keras_serializable("keras_edifice")
class KVCache(layers.Layer):
    """A state and entries (batch, time, ...) -> the new state. Without weights.

    Not for keys and values alone: any tensors (batch, time, ...) can be cached, such
    as the latents of multi-head latent attention.

    Args:
        slots: tokens that it holds. A static cache ignores tokens beyond them.
        rolling: whether a new token takes the place of the oldest.
    """

    def __init__(self, slots, rolling=False, **kwargs):
        super().__init__(autocast=False, **kwargs)  # entries keep their dtype
        self.slots, self.rolling = slots, rolling
        self.supports_masking = True

    def initial_state(self, batch_size, shapes, dtype=None, slots=None):
        """An empty cache.

        Args:
            batch_size: number of rows.
            shapes: the shape of one token's entry under each name, such as
                {"k": (heads, size), "v": (heads, size)}.
            dtype: of the entries; the layer's compute dtype if None.
            slots: of this cache; the layer's if None.
        """
        dtype, slots = dtype or self.compute_dtype, slots or self.slots
        state = {
            name: ops.zeros((batch_size, slots, *shape), dtype=dtype)
            for name, shape in shapes.items()
        }
        return {**state, "length": ops.zeros((batch_size,), dtype="int32")}

    def call(self, state, entries, mask=None):
        return self.update(state, entries, mask)

    def update(self, state, entries, mask=None):
        """The state with the entries of more tokens.

        Args:
            state: a state.
            entries: tensors (batch, time, ...) under the names of the state.
            mask: (batch, time), False for tokens that are not to be cached.
        """
        first = next(iter(entries.values()))
        time = ops.shape(first)[1]
        tokens = ops.expand_dims(ops.arange(0, time, dtype="int32"), 0)
        count = time
        if mask is not None:  # the valid tokens first
            mask = ops.cast(mask, "bool")
            count = ops.sum(ops.cast(mask, "int32"), axis=1)
            tokens = ops.argsort(ops.where(mask, tokens, tokens + time), axis=1)
        length = state["length"] + count
        held = _held(state, length, self.rolling)
        rank = held - ops.expand_dims(state["length"], 1)
        new = ops.logical_and(rank >= 0, held < ops.expand_dims(length, 1))
        source = None
        if static_length(first) != 1:
            tokens = ops.cast(tokens, "int32") + ops.zeros_like(rank[:, :1])  # (b, t)
            rank = ops.clip(rank, 0, time - 1)
            source = ops.take_along_axis(tokens, rank, axis=1)  # (b, slots)
        updated = {
            name: _merged(state[name], x, new, source) for name, x in entries.items()
        }
        return {**state, **updated, "length": length}

    def positions(self, state):
        """The position of the token in each slot, -1 in empty ones. (b, slots)."""
        held = _held(state, state["length"], self.rolling)
        seen = ops.logical_and(held >= 0, held < ops.expand_dims(state["length"], 1))
        return ops.where(seen, held, -1)

    def next_positions(self, state, entries, mask=None):
        """The positions that more tokens get, (batch, time) in float32.

        Args:
            state: a state.
            entries: tensor whose axis 1 are the tokens.
            mask: (batch, time); a masked token has the position of the one before it.
        """
        if mask is None:
            return positions(entries, state["length"])
        return ops.cast(ops.expand_dims(state["length"], 1), "float32") + ranks(mask)

    def reorder(self, state, rows):
        """The state of other rows, as beam search wants it. rows: (batch,), whole."""
        return {name: ops.take(x, rows, axis=0) for name, x in state.items()}

    def compute_mask(self, state, mask=None):
        """None: the entries that are held are all valid."""
        return

    def compute_output_shape(self, state_shape, entries_shape=None):
        return state_shape


def ranks(mask):
    """How many valid tokens there are before each valid one. (batch, time), float32."""
    return ops.cumsum(ops.cast(mask, "float32"), axis=1) - 1.0


def _held(state, length, rolling):
    """The position that each slot holds, or will hold first. (b, slots), int32."""
    count = next(x for name, x in state.items() if name != "length").shape[1]
    slots = ops.expand_dims(ops.arange(0, count, dtype="int32"), 0)
    length = ops.expand_dims(length, 1)
    if not rolling:
        return slots + ops.zeros_like(length)
    return length - 1 - ops.mod(length - 1 - slots, count)


def _merged(cached, x, new, source):
    """Slots that are new from the token `source`, None for the only one."""
    axes = (1,) * (len(x.shape) - 2)
    if source is not None:
        source = ops.reshape(source, (*ops.shape(source), *axes))
        x = ops.take_along_axis(x, source, axis=1)
    new = ops.reshape(new, (*ops.shape(new), *axes))
    return ops.where(new, ops.cast(x, cached.dtype), cached)
