"""Recurrences that are linear in a complex state and do not mix its channels.

    h_t = a_t ⊙ h_{t-1} + b_t

A complex number is a pair (real part, imaginary part) of tensors of the same shape;
`linear_scan.py` has the recurrence of real numbers. Where the decay is the same at
every step it is held once, not once a step.

Smith et al. 2022, Simplified State Space Layers, arXiv:2208.04933, scan such a state.
"""

import math

from keras import backend, ops

from keras_edifice.ops.linear_scan import LONGEST, RADIX
from keras_edifice.ops.pairs import add, conjugate, exact, times
from keras_edifice.ops.positions import positions
from keras_edifice.ops.tracing import exporting, static_length


def complex_linear_scan(decay, inputs, initial_state=None, return_state=False):
    """All states of h_t = decay_t * h_{t-1} + inputs_t, differentiable.

    Args:
        decay: pair of (batch, time, ...), or of the same shape without batch and time
            where it is the same for all.
        inputs: pair of (batch, time, ...).
        initial_state: pair of (batch, ...), the state before the first step; zero if
            None.
        return_state: whether to give the state after the last step as well.

    Returns:
        Pair of (batch, time, ...) in the inputs' dtype, or that and a pair of
        (batch, ...) in float32 (float64 for float64 inputs).

    Raises:
        ValueError: the decay has neither the rank of the inputs nor two axes less.
    """
    dtype, missing = inputs[0].dtype, len(inputs[0].shape) - len(decay[0].shape)
    if missing not in (0, 2):
        raise ValueError(
            "decay must be (batch, time, ...) as the inputs, or (...) for all steps; "
            f"received {tuple(decay[0].shape)} with inputs {tuple(inputs[0].shape)}"
        )
    if initial_state is None:
        initial_state = tuple(ops.zeros_like(z[:, 0]) for z in inputs)
    pairs = (exact(pair) for pair in (decay, inputs, initial_state))
    states = _complex_scan(*(part for pair in pairs for part in pair))  # (2, b, t, ...)
    outputs = ops.cast(states[0], dtype), ops.cast(states[1], dtype)
    return (outputs, (states[0][:, -1], states[1][:, -1])) if return_state else outputs


def complex_linear_scan_step(decay, inputs, state):
    """One step: pairs of (batch, ...) -> the new state, which is also the output."""
    return add(times(decay, state), inputs)


@ops.custom_gradient
def _complex_scan(decay_re, decay_im, inputs_re, inputs_im, state_re, state_im):
    """The pairs of `complex_linear_scan` -> its states as one tensor."""
    decay, inputs = (decay_re, decay_im), (inputs_re, inputs_im)
    state = state_re, state_im
    states = _scan(decay, inputs, state)

    def gradient(*args, upstream=None):
        upstream = args[0] if upstream is None else upstream
        # λ_t = ∂/∂h_t + ā_{t+1} λ_{t+1}; the factor of the λ after the last is any.
        first = later = conjugate(decay)
        if _varies(decay, inputs):
            first = [z[:, 0] for z in first]
            later = [ops.concatenate([z[:, 1:], z[:, :1]], axis=1) for z in later]
        zero = tuple(ops.zeros_like(z) for z in state)
        adjoint = _scan(later, (upstream[0], upstream[1]), zero, reverse=True)
        by_decay = times(adjoint, conjugate(_before(states, state)))
        if not _varies(decay, inputs):
            by_decay = [ops.sum(z, axis=(0, 1)) for z in by_decay]
        by_state = times(first, [z[:, 0] for z in adjoint])
        return *by_decay, *adjoint, *by_state

    return ops.stack(states), gradient


def _scan(decay, inputs, state, reverse=False):
    """The states, by the form that suits the length and the backend."""
    if static_length(inputs[0]) is None:
        return doubling(decay, inputs, state, reverse)
    if backend.backend() == "jax" and exporting() != "onnx":
        return sequential(decay, inputs, state, reverse)
    return blocked(decay, inputs, state, reverse)


def blocked(decay, inputs, state, reverse=False):
    """Scan of a static length in O(length) work and O(log length) steps.

    Blocks of `RADIX` steps are composed side by side, the scan of the blocks gives
    the state at each block's start, and from there the steps are taken.
    """
    length, varying = inputs[0].shape[1], _varies(decay, inputs)
    if length <= RADIX:
        return _step_by_step(decay, inputs, state, reverse, axis=1)
    padding = -length % RADIX
    widths = (padding, 0) if reverse else (0, padding)
    inputs = tuple(_in_blocks(z, widths, 0.0) for z in inputs)
    if varying:  # a padded step has the decay 1 and changes nothing
        decay = tuple(
            _in_blocks(z, widths, one) for z, one in zip(decay, (1.0, 0.0), strict=True)
        )
    product, end = _composed(decay, inputs, reverse, varying)
    starts = _before(blocked(product, end, state, reverse), state, reverse)
    states = _step_by_step(decay, inputs, starts, reverse, axis=2)
    states = tuple(ops.reshape(z, (-1, length + padding, *z.shape[3:])) for z in states)
    return tuple(z[:, padding:] if reverse else z[:, :length] for z in states)


def _in_blocks(x, widths, value):
    """(batch, time, ...) -> (batch, blocks, RADIX, ...), padded with `value`."""
    length = x.shape[1] + sum(widths)
    if any(widths):
        rest = [(0, 0)] * (len(x.shape) - 2)
        x = ops.pad(x, [(0, 0), widths, *rest], constant_values=value)
    return ops.reshape(x, (-1, length // RADIX, RADIX, *x.shape[2:]))


def _composed(decay, inputs, reverse, varying):
    """The map h -> product * h + end that the steps of axis 2 make together."""
    inputs = _steps(inputs, 2, reverse)
    decays = _steps(decay, 2, reverse) if varying else [decay] * len(inputs)
    product, end = decays[0], inputs[0]
    for a, b in zip(decays[1:], inputs[1:], strict=True):
        product, end = times(a, product), complex_linear_scan_step(a, b, end)
    return product, end


def _step_by_step(decay, inputs, state, reverse, axis):
    """The definition, unrolled along a short static `axis`."""
    varying = _varies(decay, inputs)
    inputs = _steps(inputs, axis, reverse)
    decays = _steps(decay, axis, reverse) if varying else [decay] * len(inputs)
    states = []
    for a, b in zip(decays, inputs, strict=True):
        state = complex_linear_scan_step(a, b, state)
        states.append(state)
    states = states[::-1] if reverse else states
    return tuple(ops.stack(z, axis=axis) for z in zip(*states, strict=True))


def _steps(pair, axis, reverse):
    """The pair at each place of `axis`, in the order of the recurrence."""
    size = pair[0].shape[axis]
    places = zip(*(ops.unstack(z, num=size, axis=axis) for z in pair), strict=True)
    return list(places)[:: -1 if reverse else 1]


def sequential(decay, inputs, state, reverse=False):
    """The definition: a loop over a static length."""
    varying = _varies(decay, inputs)
    steps = (*decay, *inputs) if varying else inputs

    def step(state, now):
        a = now[:2] if varying else decay
        state = complex_linear_scan_step(a, now[-2:], state)
        return state, state

    states = ops.scan(step, tuple(state), _time_first(steps), reverse=reverse)[1]
    return _time_first(states)


def doubling(decay, inputs, state, reverse=False):
    """Scan in log2(length) rounds of Hillis & Steele 1986, any length up to `LONGEST`.

    After round r each step holds the map of the 2^r steps up to it. A shift is a
    lookup by position, so that no size depends on the shift.
    """
    varying = _varies(decay, inputs)
    if reverse:
        decay = _flipped(decay) if varying else decay
        return _flipped(doubling(decay, _flipped(inputs), state))
    position = ops.reshape(
        positions(inputs[0]), (-1,) + (1,) * (len(inputs[0].shape) - 1)
    )
    inputs = _time_first(inputs)  # lookups are along axis 0
    decay = _time_first(decay) if varying else decay
    start = times([z[:1] for z in decay] if varying else decay, state)
    inputs = add(inputs, [ops.where(position < 0.5, z, 0.0) for z in start])
    for r in range(math.ceil(math.log2(static_length(inputs[0], 0) or LONGEST))):
        known = position >= 2**r
        source = ops.cast(ops.maximum(position - 2**r, 0.0), "int32")
        source = ops.reshape(source, (-1,))
        before = [ops.take(z, source, axis=0) for z in inputs]
        before = [ops.where(known, z, 0.0) for z in times(decay, before)]
        earlier = decay
        if varying:
            earlier = [ops.take(z, source, axis=0) for z in decay]
            earlier = [
                ops.where(known, z, one)
                for z, one in zip(earlier, (1.0, 0.0), strict=True)
            ]
        inputs, decay = add(inputs, before), times(decay, earlier)
    return _time_first(inputs)


def _before(states, state, reverse=False):
    """The state before each step, from the state after each and the initial one."""
    pairs = [(z, ops.expand_dims(s, 1)) for z, s in zip(states, state, strict=True)]
    if reverse:
        return tuple(ops.concatenate([z[:, 1:], s], axis=1) for z, s in pairs)
    return tuple(ops.concatenate([s, z[:, :-1]], axis=1) for z, s in pairs)


def _varies(decay, inputs):
    """Whether there is a decay for every step."""
    return len(decay[0].shape) == len(inputs[0].shape)


def _time_first(pair):
    """Swaps the first two axes: batch and time."""
    return tuple(ops.swapaxes(z, 0, 1) for z in pair)


def _flipped(pair):
    return tuple(ops.flip(z, axis=1) for z in pair)
