"""Memories that are corrected, not only added to, computed in chunks of time.

    S̄_t = diag(e^{g_t}) S_{t-1}
    S_t = S̄_t + β_t k_t (v_t - S̄_tᵀ k_t)ᵀ,    o_t = S_tᵀ q_t              delta_rule
    S_t = S̄_t + b_t (S_{t-1}ᵀ a_t)ᵀ + k_t v_tᵀ,    o_t = S_tᵀ q_t          dplr

The first is the delta rule of Schlag et al. 2021, arXiv:2102.11174, with the decay per
head of Yang et al. 2024, Gated Delta Networks, arXiv:2412.06464, or per channel of
Kimi Team 2025, Kimi Linear, arXiv:2510.26692. The second, whose transition is diagonal
plus low rank, is that of RWKV-7, Peng et al. 2025, arXiv:2503.14456.

The chunks follow Yang et al. 2024, arXiv:2406.06484. Both rules add b_s u_sᵀ to the
state, where u_t reads the state before step t. With S the state before the chunk and
tildes for decays from the chunk's start or to its end, the u of a chunk solve a
triangular system, and the rest are products of matrices:

    (I + A) U = Y + R̃ S,    O = Q̃ S + P U + O',    S ← diag(e^{G}) S + B̃ᵀ U + S'

A decay between two steps is the exponential of a sum of the log-decays between them:
never a quotient, nor a difference of long sums, so that any decay is exact.
"""

import math

import numpy as np
from keras import backend, ops

from keras_edifice.ops.linear_scan import LONGEST
from keras_edifice.ops.precision import exact_dtype
from keras_edifice.ops.tracing import exporting, static_length

SMALL = 16
"""Size up to which triangular blocks are inverted inside one matrix."""


def delta_rule(
    q,
    k,
    v,
    beta,
    log_decay=None,
    initial_state=None,
    return_state=False,
    chunk_size=64,
):
    """Delta rule over a sequence, without any norm or scale of its own.

    A step with beta = 0 and log_decay = 0 leaves the state as it is: so masked steps
    are taken out.

    Args:
        q: (batch, time, heads, key).
        k: the same shape. With |k| = 1 and 0 <= beta <= 2 the state stays bounded.
        v: (batch, time, heads, value).
        beta: (batch, time, heads), how much of the error is corrected.
        log_decay: (batch, time, heads) or (batch, time, heads, key), not positive;
            None for no decay.
        initial_state: (batch, heads, key, value); zero if None.
        return_state: whether to give the last state as well.
        chunk_size: steps of a chunk, taken up to the next power of two. Where beta is
            near 2 and the keys are nearly equal, rounding grows with it.

    Returns:
        (batch, time, heads, value) in the dtype of v, or that and the last state
        (batch, heads, key, value) in float32 (float64 for float64 values).
    """
    time, keys, dtype = ops.shape(q)[1], q.shape[-1], v.dtype
    length, size, exact = static_length(q), _chunk_size(q, chunk_size), exact_dtype(v)
    q, k, v, beta, log_decay = (
        _in_chunks(x, length, size, exact) for x in (q, k, v, beta, log_decay)
    )
    products, start, end = _decays(log_decay, size)
    (overlap,), (mix,) = products([k, q], [k])
    outputs = _over_chunks(
        system=beta * overlap,
        rows=_scaled(-beta * k, start),
        targets=beta * v,
        reads=_scaled(q, start),
        mix=mix,
        writes=_scaled(k, end),
        decay=_chunk_decay(k, start),
        state=_initial(initial_state, k, v),
    )
    return _result(outputs, time, keys, dtype, return_state)


def delta_rule_step(q, k, v, beta, log_decay, state):
    """One token of `delta_rule`.

    Args:
        q: (batch, heads, key).
        k: the same shape.
        v: (batch, heads, value).
        beta: (batch, heads).
        log_decay: (batch, heads), (batch, heads, key) or None.
        state: (batch, heads, key, value).

    Returns:
        (batch, heads, value) in the dtype of v, and the new state.
    """
    dtype, exact = v.dtype, exact_dtype(v)
    q, k, v, beta, state = (ops.cast(x, exact) for x in (q, k, v, beta, state))
    state = _decayed(state, log_decay)
    error = v - _read(state, k)
    state = state + _outer(ops.expand_dims(beta, 2) * k, error)
    return ops.cast(_read(state, q), dtype), state


def dplr(
    q,
    k,
    v,
    a,
    b,
    log_decay=None,
    initial_state=None,
    return_state=False,
    chunk_size=32,
):
    """Recurrence whose transition is diag(e^g) + b aᵀ, for any a and b.

    A step with k = b = 0 and log_decay = 0 leaves the state as it is: so masked steps
    are taken out.

    Args:
        q: (batch, time, heads, key).
        k: the same shape.
        v: (batch, time, heads, value).
        a: as k, what is read from the state before its decay.
        b: as k, where that is written.
        log_decay: as in `delta_rule`.
        initial_state: (batch, heads, key, value); zero if None.
        return_state: whether to give the last state as well.
        chunk_size: as in `delta_rule`.

    Returns:
        As `delta_rule`.
    """
    time, keys, dtype = ops.shape(q)[1], q.shape[-1], v.dtype
    length, size, exact = static_length(q), _chunk_size(q, chunk_size), exact_dtype(v)
    q, k, v, a, b, log_decay = (
        _in_chunks(x, length, size, exact) for x in (q, k, v, a, b, log_decay)
    )
    products, start, end = _decays(log_decay, size)
    # a_t reads what the steps before t left, decayed up to t - 1.
    (b_to_a, k_to_a), (b_to_q, k_to_q) = products([_earlier(a), q], [b, k])
    before = start if start is None else _later(start, first=1.0)
    outputs = _over_chunks(
        system=-_later(b_to_a),
        rows=_scaled(a, before),
        targets=ops.matmul(_later(k_to_a), v),
        reads=_scaled(q, start),
        mix=b_to_q,
        writes=_scaled(b, end),
        decay=_chunk_decay(k, start),
        state=_initial(initial_state, k, v),
        own=ops.matmul(k_to_q, v),
        added=ops.matmul(_transposed(_scaled(k, end)), v),
    )
    return _result(outputs, time, keys, dtype, return_state)


def dplr_step(q, k, v, a, b, log_decay, state):
    """One token of `dplr`.

    Args:
        q: (batch, heads, key).
        k: the same shape.
        v: (batch, heads, value).
        a: as k.
        b: as k.
        log_decay: (batch, heads), (batch, heads, key) or None.
        state: (batch, heads, key, value).

    Returns:
        (batch, heads, value) in the dtype of v, and the new state.
    """
    dtype, exact = v.dtype, exact_dtype(v)
    q, k, v, a, b, state = (ops.cast(x, exact) for x in (q, k, v, a, b, state))
    removed = _outer(b, _read(state, a))
    state = _decayed(state, log_decay) + removed + _outer(k, v)
    return ops.cast(_read(state, q), dtype), state


def _decayed(state, log_decay):
    if log_decay is None:
        return state
    decay = ops.exp(ops.cast(log_decay, state.dtype))
    while len(decay.shape) < len(state.shape):
        decay = ops.expand_dims(decay, -1)
    return decay * state


def _read(state, key):
    """Sᵀ k: (batch, heads, value)."""
    return ops.sum(state * ops.expand_dims(key, 3), axis=2)


def _outer(key, value):
    return ops.expand_dims(key, 3) * ops.expand_dims(value, 2)


def unit_lower_inverse(T):
    """Inverse of unit lower triangular matrices, differentiable.

        [[A, 0], [L, D]]⁻¹ = [[A⁻¹, 0], [-D⁻¹ L A⁻¹, D⁻¹]]

    Blocks of twice the size are made from smaller ones until the whole is done: as
    exact as forward substitution, but log2(size) rounds of products.

    Args:
        T: (..., size, size). What is on or above the diagonal is not looked at.

    Returns:
        The same shape.
    """
    size, rank = T.shape[-1], len(T.shape)
    padding = _power_of_two(size) - size
    T = _strictly_lower(T)
    if padding:
        T = ops.pad(T, [(0, 0)] * (rank - 2) + [(0, padding)] * 2)
    if rank == 2:
        return _lower_inverse(ops.expand_dims(T, 0))[0, :size, :size]
    return _lower_inverse(T)[..., :size, :size]


@ops.custom_gradient
def _lower_inverse(T):
    """(I + T)⁻¹ for a strictly lower T, (..., n, size, size), of a size 2^r."""
    inverse = _inverse_by_blocks(T)

    def gradient(*args, upstream=None):
        upstream = args[0] if upstream is None else upstream
        transposed = _transposed(inverse)
        return -ops.matmul(ops.matmul(transposed, upstream), transposed)

    return inverse, gradient


def _inverse_by_blocks(T):
    size = T.shape[-1]
    if size <= SMALL:
        return _inverse_by_masks(T)
    half = size // 2
    # Both diagonal blocks at once, for a call costs more than a small product.
    diagonal = [T[..., :half, :half], T[..., half:, half:]]
    inverses = _inverse_by_blocks(ops.concatenate(diagonal, axis=-3))
    count = ops.shape(T)[-3]
    first, second = inverses[..., :count, :, :], inverses[..., count:, :, :]
    corner = -ops.matmul(second, ops.matmul(T[..., half:, :half], first))
    return _assembled(first, corner, second)


def _inverse_by_masks(T):
    """The same rounds on all blocks of one size along the diagonal, by X - X L X."""
    size = T.shape[-1]
    corners = ops.multiply(T, _corners(size, 1))
    inverse = ops.subtract(np.eye(size, dtype="float32"), corners)
    half = 2
    while half < size:
        corners = ops.multiply(T, _corners(size, half))
        inverse = inverse - ops.matmul(inverse, ops.matmul(corners, inverse))
        half *= 2
    return inverse


def _corners(size, half):
    """1 in the lower left blocks of the diagonal blocks of size 2 * half."""
    block = np.arange(size) // half
    row, column = block[:, None], block[None]
    return ((row % 2 == 1) & (column == row - 1)).astype("float32")


def _assembled(first, corner, second):
    """[[first, 0], [corner, second]]."""
    upper = ops.concatenate([first, ops.zeros_like(first)], axis=-1)
    lower = ops.concatenate([corner, second], axis=-1)
    return ops.concatenate([upper, lower], axis=-2)


def _strictly_lower(x):
    size = x.shape[-1]
    return ops.multiply(x, np.tril(np.ones((size, size), "float32"), -1))


def _transposed(x):
    return ops.swapaxes(x, -1, -2)


def _power_of_two(size):
    """The next power of two."""
    return 2 ** math.ceil(math.log2(size))


def _chunk_size(q, chunk_size):
    """Steps of a chunk, a power of two."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, received {chunk_size}")
    length = static_length(q)
    if length is None and backend.backend() == "jax":
        return 1  # a symbolic length, which only exports have, cannot be split
    return _power_of_two(min(chunk_size, length or chunk_size))


def _in_chunks(x, length, size, dtype):
    """(b, t, h[, d]) -> (chunks, b, h, size, d or 1), steps of zeros after the end."""
    if x is None:
        return None
    x = ops.cast(x, dtype)
    if len(x.shape) == 3:
        x = ops.expand_dims(x, 3)
    padding = size - 1 if length is None else -length % size
    if padding:
        x = ops.pad(x, [(0, 0), (0, padding), (0, 0), (0, 0)])
    if length is None and size > 1:
        x = x[:, : ops.shape(x)[1] // size * size]
    return _split(x, size)


def _split(x, size):
    """(b, chunks * size, h, d) -> (chunks, b, h, size, d)."""
    heads, features = x.shape[2:]
    length = static_length(x)
    if size == 1:
        x = ops.expand_dims(x, 2)
    elif length is None:
        x = ops.reshape(x, (ops.shape(x)[0], -1, size, heads, features))
    else:
        x = ops.reshape(x, (-1, length // size, size, heads, features))
    return ops.transpose(x, (1, 0, 3, 2, 4))


def _joined(x):
    """(chunks, b, h, size, d) -> (b, chunks * size, h, d)."""
    count, (heads, size, features) = static_length(x, 0), x.shape[2:]
    x = ops.transpose(x, (1, 0, 3, 2, 4))
    if size == 1:
        return x[:, :, 0]
    if count is None:
        return ops.reshape(x, (ops.shape(x)[0], -1, heads, features))
    return ops.reshape(x, (-1, count * size, heads, features))


def _initial(state, k, v):
    """The state before the first chunk, (b, h, key, value)."""
    empty = _transposed(k[0, :, :, :1]) * ops.zeros_like(v[0, :, :, :1])
    return empty if state is None else empty + ops.cast(state, empty.dtype)


def _result(outputs, time, keys, dtype, return_state):
    """Takes apart the outputs of `_over_chunks`."""
    y = ops.cast(outputs[:, :time], dtype)
    state = ops.swapaxes(outputs[:, -keys:], 1, 2)
    return (y, state) if return_state else y


def _decays(log_decay, size):
    """What the decay does inside chunks, where it is per head, per channel or None.

    Returns:
        The function (rows, columns) -> list for each row of a matrix for each column,
        Σ_c x_tc y_sc e^{g_{s+1,c} + ... + g_{t,c}} where s <= t, else 0; the decay from
        the chunk's start up to each step, and that from after each step to the chunk's
        end, (chunks, b, h, size, key or 1), both None without decay.
    """
    if log_decay is None:
        return _products_by_head(np.tril(np.ones((size, size), "float32"))), None, None
    start = ops.exp(ops.cumsum(log_decay, axis=-2))
    if log_decay.shape[-1] == 1:
        between = _decay_between(log_decay)
        return _products_by_head(between), start, _transposed(between[..., -1:, :])
    rest = ops.flip(ops.cumsum(ops.flip(_earlier(log_decay), -2), axis=-2), -2)
    return _products_by_channel(log_decay), start, ops.exp(rest)


def _decay_between(log_decay):
    """e^{g_{s+1} + ... + g_t} for s <= t, else 0: (..., size, 1) -> (..., size, size).

    Each sum is taken over its own terms. Sums from the chunk's start, subtracted,
    would lose the small decays that come after a large one.
    """
    size = log_decay.shape[-2]
    seen = np.tril(np.ones((size, size), "bool"))
    terms = ops.where(np.tril(seen, -1), log_decay, 0.0)
    return ops.where(seen, ops.exp(ops.cumsum(terms, axis=-2)), 0.0)


def _products_by_head(between):
    def products(rows, columns):
        return [
            [ops.multiply(ops.matmul(x, _transposed(y)), between) for y in columns]
            for x in rows
        ]

    return products


def _products_by_channel(log_decay):
    def products(rows, columns):
        found = _channel_products(ops.stack(rows), ops.stack(columns), log_decay)
        return [[found[i, j] for j in range(len(columns))] for i in range(len(rows))]

    return products


@ops.custom_gradient
def _channel_products(rows, columns, log_decay):
    """The products of `_decays` with a decay for each channel.

    A block of steps t that come after a block of steps s factors at their border m,

        Σ_c (x_tc e^{g_{m,c} + ... + g_{t,c}}) (y_sc e^{g_{s+1,c} + ... + g_{m-1,c}}),

    so that blocks of all sizes 1, 2, 4, ... side by side make up the triangle.

    Args:
        rows: (r, n, b, h, size, key).
        columns: (c, n, b, h, size, key).
        log_decay: (n, b, h, size, key).

    Returns:
        (r, c, n, b, h, size, size).
    """
    found = ops.sum(ops.expand_dims(rows, 1) * columns, axis=-1, keepdims=True)
    found = _blocks(found, 1)  # (r, c, n, b, h * size, 1, 1)
    for half, since, until in _levels(log_decay):
        x = ops.expand_dims(_paired(_blocks(rows, half))[1] * since, 1)
        y = _paired(_blocks(columns, half))[0] * until
        corner = ops.matmul(x, _transposed(y))  # (r, c, n, b, h * pairs, half, half)
        first, second = _paired(found)
        found = _assembled(first, corner, second)

    def gradient(*args, upstream=None):
        upstream = args[0] if upstream is None else upstream
        return _channel_gradients(rows, columns, log_decay, upstream)

    return found, gradient


def _channel_gradients(rows, columns, log_decay, upstream):
    """Gradients of `_channel_products`.

    Each term holds the decays of the steps from s + 1 to t, so that the gradient in
    g_i is the sum of x_t ∂/∂x_t - y_t ∂/∂y_t over the steps t >= i.
    """
    diagonal = ops.multiply(upstream, np.eye(rows.shape[-2], dtype="float32"))
    diagonal = ops.sum(diagonal, axis=-1, keepdims=True)
    by_rows = _blocks(_added_up(diagonal * columns, 1), 1)
    by_columns = _added_up(diagonal * ops.expand_dims(rows, 1), 0)
    by_columns = _blocks(by_columns, 1)
    for half, since, until in _levels(log_decay):
        x = ops.expand_dims(_paired(_blocks(rows, half))[1] * since, 1)
        y = _paired(_blocks(columns, half))[0] * until
        corner = _diagonal_corners(upstream, half)
        by_x = since * _added_up(ops.matmul(corner, y), 1)
        by_y = until * _added_up(ops.matmul(_transposed(corner), x), 0)
        first, second = _paired(by_rows)
        by_rows = ops.concatenate([first, second + by_x], axis=-2)
        first, second = _paired(by_columns)
        by_columns = ops.concatenate([first + by_y, second], axis=-2)
    by_sum = _added_up(rows * by_rows, 0) - _added_up(columns * by_columns, 0)
    by_decay = ops.flip(ops.cumsum(ops.flip(by_sum, -2), axis=-2), -2)
    return by_rows, by_columns, by_decay


def _added_up(x, axis):
    """Sum over a short axis; as a reduction, XLA crashes on it on a processor."""
    first, *others = ops.unstack(x, num=x.shape[axis], axis=axis)
    return sum(others, first)


def _levels(log_decay):
    """Decays around the border of two blocks, for blocks of 1, 2, 4, ... steps.

    Args:
        log_decay: (n, b, h, size, key).

    Returns:
        List of (steps of a block; from the border up to each step of the second block;
        from after each step of the first block to the border), both of the decays
        (n, b, h * pairs, steps, key).
    """
    since = whole = _blocks(log_decay, 1)
    until, half, levels = ops.zeros_like(since), 1, []
    while half < log_decay.shape[-2]:
        first, second = _paired(since)
        to_first, to_second = _paired(until)
        whole_first, whole_second = _paired(whole)
        levels.append((half, ops.exp(second), ops.exp(to_first)))
        since = ops.concatenate([first, whole_first + second], axis=3)
        until = ops.concatenate([to_first + whole_second, to_second], axis=3)
        whole, half = whole_first + whole_second, 2 * half
    return levels


def _blocks(x, steps):
    """(..., h, size, d) -> (..., h * size / steps, steps, d)."""
    heads, size, features = x.shape[-3:]
    lead = ops.shape(x)[:-3]
    return ops.reshape(x, (*lead, heads * size // steps, steps, features))


def _paired(x):
    """The blocks at even places and those at odd ones: (..., count / 2, steps, d)."""
    count, steps, features = x.shape[-3:]
    # Strides of two do the same, but are slow on TensorFlow.
    x = ops.reshape(x, (*ops.shape(x)[:-3], count // 2, 2, steps, features))
    return x[..., 0, :, :], x[..., 1, :, :]


def _diagonal_corners(x, half):
    """The lower left blocks of the diagonal blocks: (..., h * pairs, half, half)."""
    heads, size = x.shape[-3:-1]
    starts = range(0, size, 2 * half)
    corners = [x[..., i + half : i + 2 * half, i : i + half] for i in starts]
    shape = (*ops.shape(x)[:-3], heads * len(starts), half, half)
    return ops.reshape(ops.stack(corners, axis=-3), shape)


def _over_chunks(
    *, system, rows, targets, reads, mix, writes, decay, state, own=None, added=None
):
    """The equations of the module from the matrices of every chunk.

    Args:
        system: A, strictly lower: (chunks, b, h, size, size).
        rows: R̃, (chunks, b, h, size, key).
        targets: Y, (chunks, b, h, size, value).
        reads: Q̃, as rows.
        mix: P, as A, with the diagonal.
        writes: B̃, as rows.
        decay: e^G, (chunks, b, h, key or 1, 1).
        state: S before the first chunk, (b, h, key, value).
        own: O', as targets; none if None.
        added: S', (chunks, b, h, key, value); none if None.

    Returns:
        (b, chunks * size + key, h, value): the outputs O, then the last state.
    """
    further = [] if own is None else [own, added]
    return _chunk_scan(
        system, rows, targets, reads, mix, writes, decay, state, *further
    )


@ops.custom_gradient
def _chunk_scan(
    system, rows, targets, reads, mix, writes, decay, state, own=None, added=None
):
    """`_over_chunks`, with the backward pass by hand."""
    keys = rows.shape[-1]
    inverse = unit_lower_inverse(system)
    solved = ops.matmul(inverse, ops.concatenate([rows, targets], axis=-1))
    rows, targets = solved[..., :keys], solved[..., keys:]
    before, last, u = _recurrence(
        rows, targets, _transposed(writes), decay, added, state
    )
    y = ops.matmul(reads, before) + ops.matmul(mix, u)
    y = y if own is None else y + own

    def gradient(*args, upstream=None):
        upstream = args[0] if upstream is None else upstream
        by_y = _split(upstream[:, :-keys], mix.shape[-1])
        by_last = ops.swapaxes(upstream[:, -keys:], 1, 2)
        by_last = ops.reshape(by_last, ops.shape(state))  # TensorFlow forgot the keys
        *gradients, by_added = _chunk_gradients(
            by_y, by_last, inverse, rows, reads, mix, writes, decay, before, u
        )
        further = [] if own is None else [by_y, by_added]
        return (*gradients, *further)

    outputs = [_joined(y), ops.swapaxes(last, 1, 2)]
    return ops.concatenate(outputs, axis=1), gradient


def _chunk_gradients(
    by_y, by_last, inverse, rows, reads, mix, writes, decay, before, u
):
    """Gradients of `_chunk_scan` in its arguments, without `own`; rows are solved.

    The gradient in S runs through the same recurrence from the end, where the roles of
    what is read and what is written are exchanged.
    """
    after, by_state, by_u = _recurrence(
        writes,
        ops.matmul(_transposed(mix), by_y),
        _transposed(rows),
        decay,
        ops.matmul(_transposed(reads), by_y),
        by_last,
        reverse=True,
    )
    by_targets = ops.matmul(_transposed(inverse), by_u)
    by_decay = ops.sum(before * after, axis=-1, keepdims=True)
    if decay.shape[-2] == 1:
        by_decay = ops.sum(by_decay, axis=-2, keepdims=True)
    before, read = _transposed(before), _transposed(u)
    return (
        -_strictly_lower(ops.matmul(by_targets, read)),
        ops.matmul(by_targets, before),
        by_targets,
        ops.matmul(by_y, before),
        ops.matmul(by_y, read),
        ops.matmul(u, _transposed(after)),
        by_decay,
        by_state,
        after,
    )


def _recurrence(reads, inputs, writes, decay, added, state, reverse=False):
    """u_n = inputs_n + reads_n S_n,  S_{n+1} = decay_n S_n + writes_n u_n + added_n.

    Args:
        reads: (chunks, b, h, size, key).
        inputs: (chunks, b, h, size, value).
        writes: (chunks, b, h, key, size).
        decay: (chunks, b, h, key or 1, 1).
        added: (chunks, b, h, key, value) or None.
        state: (b, h, key, value).
        reverse: whether to begin with the last chunk.

    Returns:
        The S that each chunk begins with, the S after all, and u.
    """
    open_or_onnx = static_length(reads, 0) is None or exporting() == "onnx"
    run = _as_maps if open_or_onnx else _as_loop
    after, u = run(reads, inputs, writes, decay, added, state, reverse)
    if reverse:
        before = ops.concatenate([after[1:], ops.expand_dims(state, 0)], axis=0)
        last = after[0]
    else:
        before = ops.concatenate([ops.expand_dims(state, 0), after[:-1]], axis=0)
        last = after[-1]
    u = inputs + ops.matmul(reads, before) if u is None else u
    return before, last, u


def _as_loop(reads, inputs, writes, decay, added, state, reverse):
    """S after each chunk, and u, one chunk after the other."""

    def step(carry, chunk):  # TensorFlow wants the outputs to be shaped as the carry
        reads, inputs, writes, decay, *added = chunk
        u = inputs + ops.matmul(reads, carry[0])
        state = decay * carry[0] + ops.matmul(writes, u)
        state = state + added[0] if added else state
        return [state, u], [state, u]

    first = [state, ops.zeros_like(inputs[0])]
    chunks = [reads, inputs, writes, decay] + ([] if added is None else [added])
    return ops.scan(step, first, chunks, reverse=reverse)[1]


def _as_maps(reads, inputs, writes, decay, added, state, reverse):
    """S after each chunk, from the map S -> M S + N of each; None for u.

    [M N] is one tensor, (chunks, b, h, key, key + value), because a loop of TensorFlow
    takes one tensor of an unknown length only.
    """
    keys, values = reads.shape[-1], inputs.shape[-1]
    maps = ops.matmul(writes, ops.concatenate([reads, inputs], axis=-1))
    maps = maps + ops.multiply(decay, np.eye(keys, keys + values, dtype="float32"))
    if added is not None:
        maps = maps + ops.pad(added, [(0, 0)] * 4 + [(keys, 0)])
    if exporting() == "onnx":
        return _doubled(maps, state, LONGEST // reads.shape[-2]), None

    def step(state, now):
        state = ops.matmul(now[..., :keys], state) + now[..., keys:]
        return state, state

    return ops.scan(step, state, maps, reverse=reverse)[1], None


def _doubled(maps, state, longest):
    """S after each chunk in log2(chunks) rounds, without a loop: for ONNX.

    After round r each chunk holds the map of the 2^r chunks up to it. As in
    `linear_scan.doubling`, a shift is a lookup by position. Of an unknown number of
    chunks, `longest` are reached.
    """
    keys = state.shape[-2]
    position = ops.cumsum(ops.ones_like(maps[:, 0, 0, 0, 0]), axis=0) - 1.0
    identity = np.eye(keys, maps.shape[-1], dtype="float32")
    count = static_length(maps, 0) or longest
    for r in range(math.ceil(math.log2(count))):
        source = ops.cast(ops.maximum(position - 2**r, 0.0), "int32")
        known = ops.reshape(position >= 2**r, (-1, 1, 1, 1, 1))
        earlier = ops.where(known, ops.take(maps, source, axis=0), identity)
        composed = ops.matmul(maps[..., :keys], earlier)
        inputs = composed[..., keys:] + maps[..., keys:]
        maps = ops.concatenate([composed[..., :keys], inputs], axis=-1)
    return ops.matmul(maps[..., :keys], state) + maps[..., keys:]


def _chunk_decay(k, start):
    """e^G of every chunk, (chunks, b, h, key or 1, 1)."""
    if start is None:
        return ops.ones_like(k[..., :1, :1])
    return _transposed(start[..., -1:, :])


def _scaled(x, factor):
    return x if factor is None else x * factor


def _later(x, first=0.0):
    """The rows of x (axis -2) one place later, the first of them constant."""
    constant = ops.zeros_like(x[..., :1, :]) + first
    if x.shape[-2] == 1:
        return constant
    return ops.concatenate([constant, x[..., :-1, :]], axis=-2)


def _earlier(x):
    """The rows of x (axis -2) one place earlier, the last of them zero."""
    constant = ops.zeros_like(x[..., :1, :])
    if x.shape[-2] == 1:
        return constant
    return ops.concatenate([x[..., 1:, :], constant], axis=-2)
