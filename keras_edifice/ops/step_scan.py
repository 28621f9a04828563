"""A loop over time for steps that no parallel scan can take."""

from keras import layers, ops

from keras_edifice.backends.traits import COMPILES_LOOPS
from keras_edifice.ops.tracing import static_length


def step_scan(step, inputs, state):
    """Runs `step` over time. (batch, time, features) -> (batch, time, outputs).

    On JAX and TensorFlow a compiled loop: it compiles in the time of one step, while
    an unrolled one takes as long as the number of steps. PyTorch runs step by step.

    Args:
        step: (x_t, state) -> (y_t, state), state as below.
        inputs: tensor with a time axis, in float32.
        state: list of tensors (batch, size), in float32.

    Returns:
        (outputs of all steps, state after the last one).

    Raises:
        ValueError: an export from PyTorch leaves the length open.
    """
    if COMPILES_LOOPS:
        if not state:  # RNN wants one
            return _without_state(step, inputs), []
        sizes = [part.shape[-1] for part in state]
        loop = layers.RNN(_Step(step, sizes), return_sequences=True, return_state=True)
        outputs, *state = loop(inputs, initial_state=list(state))
        return outputs, state
    length = static_length(inputs)
    if length is None:
        raise ValueError(
            "PyTorch exports a loop over time for a fixed length only, received an "
            "unknown one; fix it, or export from TensorFlow or JAX"
        )
    outputs = []
    for x in ops.unstack(inputs, num=length, axis=1):
        y, state = step(x, state)
        outputs.append(y)
    return ops.stack(outputs, axis=1), list(state)


def _without_state(step, inputs):
    def counting(x, count):
        return step(x, [])[0], [count[0] + 1.0]

    zeros = ops.zeros((ops.shape(inputs)[0], 1), dtype="float32")
    return step_scan(counting, inputs, [zeros])[0]


class _Step(layers.Layer):
    """`step` as the cell of an RNN layer. It lives for one call and is never saved."""

    def __init__(self, step, state_size):
        super().__init__(dtype="float32")
        self.step, self.state_size = step, state_size
        self.built = True

    def call(self, inputs, states):
        outputs, states = self.step(inputs, list(states))
        return outputs, list(states)
