"""Recurrences that are linear in the state and do not mix its channels.

    h_t = a_t ⊙ h_{t-1} + b_t                                      linear_scan
    h_t = exp(Δ_t A) ⊙ h_{t-1} + (Δ_t x_t) B_tᵀ,  y_t = h_t C_t    selective_scan

The second is the state-space model of Gu & Dao 2023, Mamba, arXiv:2312.00752. Its
state is `state` times larger than its input, so it is computed in chunks of time: the
states of one chunk exist at once, and the backward pass, written by hand, computes
them again from the state at the chunk's start.

A scan is a function (decay, inputs, state, reverse) -> all states, with time on axis
0. Those below give the same numbers; `blocked` is the one to train with, `doubling`
the one that takes a length which is unknown while it is traced.
"""

import math

from keras import backend, ops

from keras_edifice.ops.positions import positions
from keras_edifice.ops.precision import exact_dtype
from keras_edifice.ops.tracing import exporting, static_length

RADIX = 8 if backend.backend() == "jax" else 16
"""Steps that a blocked scan takes one after another at each level.

XLA computes the head of an unrolled chain again for each of its later steps.
"""

CHUNK = 16
"""Steps whose states a selective scan holds at once."""

LONGEST = 65536
"""Steps that a doubling scan reaches where the length is unknown."""

METHODS = ("auto", "associative", "hillis_steele", "cumsum", "sequential", "chunked")


def linear_scan(decay, inputs, initial_state=None, return_state=False):
    """All states of h_t = decay_t * h_{t-1} + inputs_t, differentiable.

    Args:
        decay: (batch, time, ...).
        inputs: the same shape.
        initial_state: (batch, ...), the state before the first step; zero if None.
        return_state: whether to give the state after the last step as well.

    Returns:
        (batch, time, ...) in the inputs' dtype, or that and (batch, ...) in float32
        (float64 for float64 inputs).
    """
    dtype, exact = inputs.dtype, exact_dtype(inputs)
    decay = _time_first(ops.cast(decay, exact))
    inputs = _time_first(ops.cast(inputs, exact))
    if initial_state is None:
        initial_state = ops.zeros_like(inputs[0])
    states = _linear_scan(decay, inputs, ops.cast(initial_state, exact))
    outputs = ops.cast(_time_first(states), dtype)
    return (outputs, states[-1]) if return_state else outputs


def linear_scan_step(decay, inputs, state):
    """One step: (batch, ...) each -> the new state, which is also the output."""
    return decay * state + inputs


@ops.custom_gradient
def _linear_scan(decay, inputs, state):
    """`linear_scan` with time on axis 0 and the backward pass as a scan of its own."""
    scan = blocked if static_length(inputs, 0) else doubling
    states = scan(decay, inputs, state)
    kept = ops.stop_gradient(states)  # PyTorch never frees what its own gradient holds

    def gradient(*args, upstream=None):
        upstream = args[0] if upstream is None else upstream
        # λ_t = ∂/∂h_t + a_{t+1} λ_{t+1}; the ones multiply a λ of zero.
        later = ops.concatenate([decay[1:], ops.ones_like(decay[:1])], axis=0)
        adjoint = scan(later, upstream, ops.zeros_like(state), reverse=True)
        previous = _shifted(kept, state, reverse=False)
        return adjoint * previous, adjoint, decay[0] * adjoint[0]

    return states, gradient


def blocked(decay, inputs, state, reverse=False):
    """Scan of a static length in O(length) work and O(log length) steps.

    Blocks of `RADIX` steps are composed side by side, the scan of the blocks gives
    the state at each block's start, and from there the steps are taken.
    """
    length = inputs.shape[0]
    if length <= RADIX:
        return _step_by_step(decay, inputs, state, reverse, axis=0)
    decay, inputs, padding = _padded(decay, inputs, RADIX, reverse)
    shape = tuple(ops.shape(inputs)[1:])
    count = (length + padding) // RADIX
    decay = ops.reshape(decay, (count, RADIX, *shape))
    inputs = ops.reshape(inputs, (count, RADIX, *shape))
    product, end = _composed(decay, inputs, reverse)
    starts = _shifted(blocked(product, end, state, reverse), state, reverse)
    states = _step_by_step(decay, inputs, starts, reverse, axis=1)
    states = ops.reshape(states, (count * RADIX, *shape))
    return states[padding:] if reverse else states[:length]


def _composed(decay, inputs, reverse):
    """The map h -> product * h + end that the steps of axis 1 make together."""
    decays = ops.unstack(decay, num=decay.shape[1], axis=1)
    inputs = ops.unstack(inputs, num=inputs.shape[1], axis=1)
    order = list(range(len(inputs)))[:: -1 if reverse else 1]
    product, end = decays[order[0]], inputs[order[0]]
    for t in order[1:]:
        product, end = decays[t] * product, decays[t] * end + inputs[t]
    return product, end


def _step_by_step(decay, inputs, state, reverse, axis):
    """The definition, unrolled along a short static `axis`."""
    decays = ops.unstack(decay, num=decay.shape[axis], axis=axis)
    inputs = ops.unstack(inputs, num=inputs.shape[axis], axis=axis)
    states = [None] * len(inputs)
    for t in list(range(len(inputs)))[:: -1 if reverse else 1]:
        state = states[t] = decays[t] * state + inputs[t]
    return ops.stack(states, axis=axis)


def _shifted(states, state, reverse):
    """The state before each step, from the state after each and the initial one."""
    state = ops.expand_dims(state, 0)
    kept = [states[1:], state] if reverse else [state, states[:-1]]
    return ops.concatenate(kept, axis=0)


def _padded(decay, inputs, multiple, reverse, neutral=1.0):
    """Steps that change nothing, up to a multiple: at the end, or first if reversed."""
    padding = -inputs.shape[0] % multiple
    if padding:
        widths = [(padding, 0) if reverse else (0, padding)]
        widths += [(0, 0)] * (len(inputs.shape) - 1)
        decay = ops.pad(decay, widths, constant_values=neutral)
        inputs = ops.pad(inputs, widths)
    return decay, inputs, padding


def doubling(decay, inputs, state, reverse=False):
    """Scan in log2(length) rounds of Hillis & Steele 1986, any length up to `LONGEST`.

    After round r each step holds the map of the 2^r steps up to it. A shift is a
    lookup by position, so that no size depends on the shift.
    """
    if reverse:
        flipped = doubling(ops.flip(decay, axis=0), ops.flip(inputs, axis=0), state)
        return ops.flip(flipped, axis=0)
    position = positions(inputs, axis=0)
    # Not a concatenation with the first step, whose length jax2onnx takes for all.
    start = ops.reshape(position < 0.5, (-1,) + (1,) * (len(inputs.shape) - 1))
    inputs = inputs + ops.where(start, decay * ops.expand_dims(state, 0), 0.0)
    length = static_length(inputs, 0) or LONGEST
    for r in range(math.ceil(math.log2(length))):
        inputs, decay = doubling_round(decay, inputs, position, 2**r)
    return inputs


def doubling_round(decay, inputs, position, shift):
    """Composes the map of each step with that of the step `shift` before it."""
    source = ops.cast(ops.maximum(position - shift, 0.0), "int32")
    known = position >= shift
    known = ops.reshape(known, (-1,) + (1,) * (len(inputs.shape) - 1))
    before = ops.where(known, ops.take(inputs, source, axis=0), 0.0)
    inputs = inputs + decay * before
    decay = decay * ops.where(known, ops.take(decay, source, axis=0), 1.0)
    return inputs, decay


def sequential(decay, inputs, state, reverse=False):
    """The definition: a loop over a static length."""

    def step(state, now):
        state = now[0] * state + now[1]
        return state, state

    return ops.scan(step, state, (decay, inputs), reverse=reverse)[1]


def cumulative_sums(log_decay, inputs, state, reverse=False):
    """Scan of a static length by cumulative sums in log space (Heinsen 2023).

        h_t = e^{F_t} (h_0 + Σ_{s<=t} e^{-F_s} b_s),    F = cumsum(log a)

    e^{-F} overflows over a long time, so the sums run over blocks of four with each
    log-decay at least -20 (-150 in float64), where a state counts for 2e-9 of itself;
    the scan of the blocks, made the same way, gives the state at each block's start.
    Arxiv:2311.06281.
    """
    length, block = inputs.shape[0], 4
    floor = -150.0 if exact_dtype(inputs) == "float64" else -20.0
    floor = ops.convert_to_tensor(floor, dtype=inputs.dtype)
    log_decay, inputs, padding = _padded(log_decay, inputs, block, reverse, 0.0)
    shape = tuple(ops.shape(inputs)[1:])
    count = (length + padding) // block
    log_decay = ops.reshape(ops.maximum(log_decay, floor), (count, block, *shape))
    inputs = ops.reshape(inputs, (count, block, *shape))
    if reverse:
        log_decay, inputs = ops.flip(log_decay, axis=1), ops.flip(inputs, axis=1)
    total = ops.cumsum(log_decay, axis=1)
    # From the middle of the block the exponents are half as large, on both sides.
    centred = total - (total[:, :1] + total[:, -1:]) / 2.0
    states = ops.exp(centred) * ops.cumsum(ops.exp(-centred) * inputs, axis=1)
    if count > 1:
        ends = cumulative_sums(total[:, -1], states[:, -1], state, reverse)
        state = _shifted(ends, state, reverse)
    else:
        state = ops.expand_dims(state, 0)
    states = states + ops.exp(total) * ops.expand_dims(state, 1)
    if reverse:
        states = ops.flip(states, axis=1)
    states = ops.reshape(states, (count * block, *shape))
    return states[padding:] if reverse else states[:length]


def selective_scan(
    x,
    dt,
    A,
    B,
    C,
    initial_state=None,
    method="auto",
    chunk_size=CHUNK,
    discretization="euler_b",
):
    """Mamba's map of a sequence, with parameters that depend on the step.

    A step with dt = 0 leaves the state as it is: so masked steps are taken out.

    Args:
        x: (batch, time, channels).
        dt: the same shape, not negative.
        A: (channels, state), negative.
        B: (batch, time, state).
        C: (batch, time, state).
        initial_state: (batch, channels, state); zero if None.
        method: how the states of a chunk are computed. "chunked" takes chunks of
            `chunk_size` with `blocked`, "sequential" the same chunks in a loop over
            the steps, "auto" the faster of these two; "associative" (`blocked`),
            "hillis_steele" (`doubling`) and "cumsum" (`cumulative_sums`) take the
            whole length as one chunk. Of an unknown length, the whole is one chunk
            for `doubling`.
        chunk_size: steps whose states exist at once. Small chunks fit a processor's
            cache; larger ones occupy an accelerator better.
        discretization: "euler_b" weighs the input by dt B, "zoh" (zero-order hold) by
            (exp(dt A) - 1) / A B.

    Returns:
        (batch, time, channels) and the last state (batch, channels, state), both in
        float32 (float64 for a float64 x).
    """
    exact, size = exact_dtype(x), B.shape[-1]
    x, dt, B, C = (_time_first(ops.cast(z, exact)) for z in (x, dt, B, C))
    A = ops.transpose(ops.cast(A, exact))  # (n, e): channels last, as in x
    if initial_state is None:
        initial_state = ops.expand_dims(ops.zeros_like(x[0]), 1) * ops.zeros_like(A)
    else:
        initial_state = ops.swapaxes(ops.cast(initial_state, exact), 1, 2)
    length = static_length(x, 0)
    method, chunk = _plan(method, chunk_size, length)
    x, dt, B, C = (_in_chunks(z, length, chunk) for z in (x, dt, B, C))
    arguments = x, dt, A, B, C, initial_state
    if exporting():  # a file has no gradient
        y, last, _ = _outputs_and_states(method, discretization, *arguments)
    else:
        y = _selective_scan(method, discretization)(*arguments)  # (t + n, b, e)
        last = ops.transpose(y[-size:], (1, 0, 2))
        y = y if length else y[:-size]
    y = y[:length] if length else y  # one slice: each costs TensorFlow a gradient
    return _time_first(y), ops.swapaxes(last, 1, 2)


def selective_step(x, dt, A, B, C, state, discretization="euler_b"):
    """One step of `selective_scan`.

    Args:
        x: (batch, channels).
        dt: the same shape.
        A: (channels, state).
        B: (batch, state).
        C: (batch, state).
        state: (batch, channels, state).
        discretization: as in `selective_scan`.

    Returns:
        (batch, channels) and the new state.
    """
    exact = exact_dtype(x)
    x, dt, A, B, C = (ops.cast(z, exact) for z in (x, dt, A, B, C))
    x, dt = ops.expand_dims(x, 2), ops.expand_dims(dt, 2)
    B, C = ops.expand_dims(B, 1), ops.expand_dims(C, 1)
    decay = ops.exp(dt * A)
    weight = dt if discretization == "euler_b" else _held_weight(dt * A, decay, A)
    state = linear_scan_step(decay, weight * x * B, state)
    return ops.sum(state * C, axis=-1), state


def _plan(method, chunk_size, length):
    """(method, steps of a chunk) for a length, None if it is unknown."""
    if length is None:
        return "hillis_steele", None
    # A loop over chunks does not load as ONNX from TensorFlow: one chunk instead.
    if exporting() == "onnx" and method in ("auto", "chunked", "sequential"):
        return "associative", length
    if method == "auto":  # XLA computes the head of an unrolled chain again and again
        method = "sequential" if backend.backend() == "jax" else "chunked"
    whole = method not in ("chunked", "sequential")
    return method, length if whole else min(chunk_size, length)


def _in_chunks(x, length, chunk):
    """(time, ...) -> (chunks, steps of a chunk, ...), zeros after the end."""
    if length is None:
        return ops.expand_dims(x, 0)
    padding = -length % chunk
    if padding:
        x = ops.pad(x, [(0, padding)] + [(0, 0)] * (len(x.shape) - 1))
    return ops.reshape(x, ((length + padding) // chunk, chunk, -1, x.shape[-1]))


def _over_chunks(body, carry, chunks, outputs, reverse=False):
    """Loops `body(carry, chunk) -> (carry, outputs)` over axis 0 of `chunks`.

    Args:
        body: the function.
        carry: list of tensors.
        chunks: list of tensors with the chunks on axis 0.
        outputs: list of tensors of the shapes of one chunk's outputs.
        reverse: whether to begin with the last chunk.

    Returns:
        (last carry, the carry after each chunk, the outputs of each chunk).
    """
    if static_length(chunks[0], 0) == 1:  # of a length that may be unknown
        carry, outputs = body(carry, [z[0] for z in chunks])
        after = [ops.expand_dims(z, 0) for z in carry]
        return carry, after, [ops.expand_dims(z, 0) for z in outputs]

    def step(state, chunk):  # TensorFlow wants the outputs to be shaped as the carry
        carry, outputs = body(state[: len(state) - len(chunk_outputs)], chunk)
        return [*carry, *outputs], [*carry, *outputs]

    chunk_outputs, count = outputs, len(carry)
    last, after = ops.scan(step, [*carry, *outputs], chunks, reverse=reverse)
    return last[:count], after[:count], after[count:]


def _selective_scan(method, discretization):
    """The function (x, dt, A, B, C, state) -> outputs and last state, joined.

    x and dt are (k, t, b, e), B and C (k, t, b, n) for k chunks of t steps; A is
    (n, e) and the state (b, n, e). The result is (k t + n, b, e), for a custom
    gradient has a single output.
    """

    @ops.custom_gradient
    def run(x, dt, A, B, C, state):
        y, last, after = _outputs_and_states(
            method, discretization, x, dt, A, B, C, state
        )
        before = _shifted(after, state, reverse=False)

        def gradient(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream
            size = B.shape[-1]
            by_y = ops.reshape(upstream[:-size], ops.shape(x))
            by_last = ops.transpose(upstream[-size:], (1, 0, 2))

            def backward(carry, chunk):
                adjoint, by_A = carry
                adjoint, more_by_A, *by_chunk = _chunk_gradients(
                    method, discretization, A, adjoint, *chunk
                )
                return [adjoint, by_A + more_by_A], by_chunk

            like = [ops.zeros_like(z[0]) for z in (x, dt, B, C)]
            chunks = [x, dt, B, C, before, by_y]
            (by_state, by_A), _, (by_x, by_dt, by_B, by_C) = _over_chunks(
                backward, [by_last, ops.zeros_like(A)], chunks, like, reverse=True
            )
            return by_x, by_dt, by_A, by_B, by_C, by_state

        return ops.concatenate([y, ops.transpose(last, (1, 0, 2))], axis=0), gradient

    return run


def _outputs_and_states(method, discretization, x, dt, A, B, C, state):
    """Outputs (k t, b, e), the last state and that after each chunk, (k, b, n, e)."""

    def forward(carry, chunk):
        x, dt, B, C = chunk
        states = _chunk_states(method, discretization, x, dt, A, B, carry[0])[-1]
        return [states[-1]], [ops.sum(states * ops.expand_dims(C, 3), axis=2)]

    (last,), (after,), (y,) = _over_chunks(
        forward, [state], [x, dt, B, C], [ops.zeros_like(x[0])]
    )
    return ops.reshape(y, (-1, *ops.shape(y)[2:])), last, after


def _chunk_states(method, discretization, x, dt, A, B, state):
    """Log-decays, decays and states of a chunk, (t, b, n, e) each."""
    log_decay = ops.expand_dims(dt, 2) * A
    decay = ops.exp(log_decay)
    if discretization == "euler_b":
        inputs = ops.expand_dims(dt * x, 2) * ops.expand_dims(B, 3)
    else:
        inputs = ops.expand_dims(x, 2) * ops.expand_dims(B, 3)
        inputs = inputs * _held_weight(log_decay, decay, A)
    return log_decay, decay, _scan(method, log_decay, decay, inputs, state)


def _chunk_gradients(method, discretization, A, adjoint, x, dt, B, C, state, by_y):
    """Gradients in the state before a chunk, A, x, dt, B and C.

    With λ_t the gradient in h_t, μ_t = a_t λ_t is that in h_{t-1}, so that

        λ_t = μ_{t+1} + by_y_t C_t,    μ_t = a_t (μ_{t+1} + by_y_t C_t)

    and `adjoint` is the μ of the first step after the chunk.
    """
    log_decay, decay, states = _chunk_states(method, discretization, x, dt, A, B, state)
    by_y = ops.expand_dims(by_y, 2)
    by_C = ops.sum(by_y * states, axis=3)
    direct = by_y * ops.expand_dims(C, 3)
    mu = _scan(method, log_decay, decay, decay * direct, adjoint, reverse=True)
    by_states = _shifted(mu, adjoint, reverse=True) + direct
    by_log_decay = mu * _shifted(states, state, reverse=False)
    input_gradients = {"euler_b": _euler_gradients, "zoh": _zoh_gradients}
    by_x, by_dt, by_B, by_A = input_gradients[discretization](
        x, dt, A, B, decay, log_decay, by_states
    )
    by_dt = by_dt + ops.sum(by_log_decay * A, axis=2)
    by_A = by_A + ops.sum(by_log_decay * ops.expand_dims(dt, 2), axis=(0, 1))
    return mu[0], by_A, by_x, by_dt, by_B, by_C


def _scan(method, log_decay, decay, inputs, state, reverse=False):
    if method == "cumsum":
        return cumulative_sums(log_decay, inputs, state, reverse)
    scans = {
        "associative": blocked,
        "chunked": blocked,
        "hillis_steele": doubling,
        "sequential": sequential,
    }
    return scans[method](decay, inputs, state, reverse)


def _held_weight(log_decay, decay, A):
    """(exp(z) - 1) / A with z = dt A, by an identity that keeps small z exact."""
    return ops.tanh(log_decay / 2.0) * (decay + 1.0) / A


def _euler_gradients(x, dt, A, B, decay, log_decay, by_inputs):
    """Gradients of the inputs (dt x) Bᵀ in x, dt, B and, here nothing, A."""
    by_product = ops.sum(by_inputs * ops.expand_dims(B, 3), axis=2)  # (t, b, e)
    by_B = ops.sum(by_inputs * ops.expand_dims(dt * x, 2), axis=3)
    return by_product * dt, by_product * x, by_B, ops.zeros_like(A)


def _zoh_gradients(x, dt, A, B, decay, log_decay, by_inputs):
    """Gradients of the inputs w x Bᵀ, w = (exp(dt A) - 1) / A, in x, dt, B and A."""
    weight = _held_weight(log_decay, decay, A)
    x, B = ops.expand_dims(x, 2), ops.expand_dims(B, 3)
    by_x = ops.sum(by_inputs * weight * B, axis=2)
    by_B = ops.sum(by_inputs * weight * x, axis=3)
    by_weight = by_inputs * x * B
    by_dt = ops.sum(by_weight * decay, axis=2)
    slope = (ops.expand_dims(dt, 2) * decay - weight) / A
    return by_x, by_dt, by_B, ops.sum(by_weight * slope, axis=(0, 1))


def _time_first(x):
    """Swaps the first two axes: batch and time."""
    return ops.swapaxes(x, 0, 1)
