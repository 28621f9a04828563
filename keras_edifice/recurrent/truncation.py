"""Truncated backpropagation through time, for any recurrent layer of Keras.

    s_{T-k} ← stop_gradient(s_{T-k})

The values stay as they are; the gradient runs through the last k states alone.
"""

from keras import ops, tree


class TruncatedBPTT:
    """Beside a recurrent layer of Keras, before it among the bases of a class.

    Args:
        units: width of the state.
        truncate_bptt: the last steps, as a number, through whose states the gradient
            runs; it stops at the state before them. None for all.
        **kwargs: those of the layer.

    Raises:
        ValueError: truncation of a sequence of unknown length, or from its end to its
            beginning.
    """

    def __init__(self, units, truncate_bptt=None, **kwargs):
        super().__init__(units, **kwargs)
        self.truncate_bptt = truncate_bptt

    def build(self, sequences_shape, initial_state_shape=None):
        if self.truncate_bptt and sequences_shape[1] is None:
            raise ValueError(
                f"truncate_bptt={self.truncate_bptt} needs a known number of steps, "
                "received None; pass window_size"
            )
        if self.truncate_bptt and self.go_backwards:
            raise ValueError(
                f"truncate_bptt={self.truncate_bptt} keeps the last steps, which a "
                "layer that goes backwards takes first; pass bidirectional=False"
            )
        super().build(sequences_shape, initial_state_shape)

    def inner_loop(self, sequences, initial_state, mask, training=False):
        kept = self.truncate_bptt
        if not kept or sequences.shape[1] <= kept:
            return super().inner_loop(sequences, initial_state, mask, training)
        if mask is not None:
            early, late = mask[:, :-kept], mask[:, -kept:]
        else:
            early = late = None
        _, before, state = super().inner_loop(
            sequences[:, :-kept], initial_state, early, training
        )
        state = [ops.stop_gradient(part) for part in state]
        last, after, state = super().inner_loop(
            sequences[:, -kept:], state, late, training
        )
        if self.return_sequences:
            after = ops.concatenate([before, after], axis=1)
        return last, after, state

    def prefill(self, x, state):
        """Many steps: (batch, time, features), the state -> all outputs, the state."""
        x = ops.cast(x, self.compute_dtype)
        parts = tree.flatten(state)
        _, outputs, parts = self.inner_loop(x, parts, None, training=False)
        return outputs, tree.pack_sequence_as(state, list(parts))

    def get_config(self):
        return {**super().get_config(), "truncate_bptt": self.truncate_bptt}
