"""Linear attention: recurrences whose state is a matrix, computed in chunks of time.

    S_t = diag(e^{g_t}) S_{t-1} + k_t v_tᵀ,    o_t = S_tᵀ q_t        linear_attention
    o_t / (z_tᵀ q_t + ε),    z_t = diag(e^{g_t}) z_{t-1} + k_t       normalized
    o_t / max(|n_tᵀ q_t|, e^{-m_t}), gates given as logarithms       stabilized

In a chunk of C steps, with S the state before it and G the sums of g since its start,

    O = (Q ⊙ e^G) S + P V,    P_ij = Σ_c q_ic k_jc e^{G_ic - G_jc} for j <= i, else 0
    S ← diag(e^{G_C}) S + (K ⊙ e^{G_C - G})ᵀ V

Yang et al. 2023, Gated Linear Attention, arXiv:2312.06635. Time and memory are linear
in the length: the states of the chunks' starts are kept, the backward pass, written by
hand, computes the rest again.

The decays e^{G_i - G_j} are products, never quotients nor exponentials of positive
numbers (`decay_products.py`), so that decays of any size are exact, zero included.

Axes: n chunks, b batch, g groups of heads, r heads of a group, c steps of a chunk,
k key, w the values of a group's heads side by side.
"""

import math

import numpy as np
from keras import backend, ops

from keras_edifice.ops.decay_products import (
    LOWEST,
    by_positions,
    causal,
    channel_products,
    head_products,
    turned,
)
from keras_edifice.ops.linear_scan import LONGEST, blocked, linear_scan_step
from keras_edifice.ops.positions import positions
from keras_edifice.ops.precision import exact_dtype
from keras_edifice.ops.tracing import exporting, static_length


def linear_attention(
    q,
    k,
    v,
    log_decay=None,
    bonus=None,
    initial_state=None,
    return_state=False,
    chunk_size=None,
):
    """o_t = S_tᵀ q_t with S_t = diag(e^{g_t}) S_{t-1} + k_t v_tᵀ, differentiable.

    With a bonus u, o_t = (S_{t-1} + diag(u) k_t v_tᵀ)ᵀ q_t, as in RWKV-5 and 6 (Peng
    et al. 2024, arXiv:2404.05892, eq. 19). q is not scaled. A step with k = 0 and
    log-decay 0 leaves the state as it is: so masked steps are taken out.

    Fewer heads serve consecutive heads of the others; the state has the most. Those of
    q and k, such as the groups of Mamba-2, are not repeated in memory, unless the decay
    differs between the channels of all heads; those of k or v alone are.

    Args:
        q: (batch, time, heads, key).
        k: the same shape.
        v: (batch, time, heads, value).
        log_decay: g, not positive. None for none; (heads,) for constants;
            (batch, time, heads); (batch, time, heads, key). Batch and time may be 1,
            for constants of each channel.
        bonus: (heads, key), the heads those of q and k.
        initial_state: (batch, heads, key, value); zero if None.
        return_state: whether to give the state after the last step as well.
        chunk_size: steps of a chunk, rounded up to a power of two; None for as many as
            are fast for the size of the keys.

    Returns:
        (batch, time, heads, value) in the dtype of v, or that and the state in float32
        (float64 for a float64 v).

    Raises:
        ValueError: the numbers of heads, or the rank of the decay, do not fit.
    """
    dtype, exact = v.dtype, exact_dtype(v)
    q, k, v = (ops.cast(x, exact) for x in (q, k, v))
    q, k, v, log_decay = _matched(q, k, v, _decay_of_steps(log_decay, exact))
    state = _initial_state(q[:, 0], v[:, 0], initial_state)
    if bonus is None:
        outputs, state = _attend(q, k, v, log_decay, state, chunk_size)
    else:
        bonus = ops.cast(bonus, exact)
        outputs, state = _attend_before(q, k, v, log_decay, bonus, state, chunk_size)
    outputs = ops.cast(outputs, dtype)
    return (outputs, state) if return_state else outputs


def linear_attention_step(q, k, v, log_decay, state, bonus=None):
    """One step of `linear_attention`.

    Args:
        q: (batch, heads, key).
        k: the same shape.
        v: (batch, heads, value).
        log_decay: None, (heads,), (batch, heads) or (batch, heads, key).
        state: (batch, heads, key, value).
        bonus: (heads, key) or None.

    Returns:
        (batch, heads, value) in the dtype of v, and the new state.
    """
    dtype, exact = v.dtype, exact_dtype(v)
    q, k, v, state = (ops.cast(x, exact) for x in (q, k, v, state))
    if log_decay is not None and len(log_decay.shape) > 1:
        log_decay = ops.expand_dims(log_decay, 1)
    steps = [ops.expand_dims(x, 1) for x in (q, k, v)]
    *steps, log_decay = _matched(*steps, _decay_of_steps(log_decay, exact))
    heads = steps[2].shape[2]
    q, k, v = (_repeated(x, heads)[:, 0] for x in steps)
    after = _stepped(k, v, log_decay, state)
    read = after
    if bonus is not None:
        bonus = ops.expand_dims(_repeated(ops.cast(bonus, exact), heads, 0), -1)
        read = state + bonus * _outer(k, v)
    return ops.cast(_read(read, q), dtype), after


def normalized_linear_attention(
    q,
    k,
    v,
    log_decay=None,
    eps=1e-6,
    causal=True,
    initial_state=None,
    return_state=False,
    chunk_size=None,
):
    """`linear_attention` over the sum of its weights, q_t · z_t + eps.

    Katharopoulos et al. 2020, arXiv:2006.16236, eq. 18-20, where q and k are features
    that are not negative. A step with k = 0 and log-decay 0 changes nothing.

    Args:
        q: as in `linear_attention`, and so are k, v, log_decay and chunk_size.
        k: keys.
        v: values.
        log_decay: g or None.
        eps: added to the sum of the weights.
        causal: whether a step sees those up to itself; else all, without decay.
        initial_state: (S, z), (batch, heads, key, value) and (batch, heads, key).
        return_state: whether to give the last (S, z) as well.
        chunk_size: as in `linear_attention`.

    Returns:
        (batch, time, heads, value) in the dtype of v, or that and (S, z).

    Raises:
        ValueError: a decay without `causal`; else as `linear_attention`.
    """
    dtype, v = v.dtype, _with_ones(v)
    if initial_state is not None:
        initial_state = _joined(*initial_state)
    if causal:
        outputs, state = linear_attention(
            q, k, v, log_decay, None, initial_state, True, chunk_size
        )
    elif log_decay is None:
        outputs, state = _attend_to_all(q, k, v, initial_state)
    else:
        raise ValueError("expected no log_decay with causal=False, received one")
    outputs = ops.cast(outputs[..., :-1] / (outputs[..., -1:] + eps), dtype)
    return (outputs, _parted(state)) if return_state else outputs


def normalized_linear_attention_step(q, k, v, log_decay, state, eps=1e-6):
    """One step of `normalized_linear_attention`; the state is (S, z)."""
    dtype, v = v.dtype, _with_ones(v)
    outputs, state = linear_attention_step(q, k, v, log_decay, _joined(*state))
    outputs = ops.cast(outputs[..., :-1] / (outputs[..., -1:] + eps), dtype)
    return outputs, _parted(state)


def stabilized_linear_attention(
    q,
    k,
    v,
    log_input,
    log_forget,
    eps=1e-6,
    initial_state=None,
    return_state=False,
    chunk_size=None,
):
    """The matrix memory of xLSTM, Beck et al. 2024, arXiv:2405.04517, eq. 19-27.

        m_t = max(f_t + m_{t-1}, i_t)
        S_t = e^{f_t + m_{t-1} - m_t} S_{t-1} + e^{i_t - m_t} k_t v_tᵀ,  n_t likewise
        o_t = S_tᵀ q_t / (max(|n_t · q_t|, e^{-m_t}) + eps)

    m needs the gates only, so it is computed first, and the rest is `linear_attention`
    with the log-decay f_t + m_{t-1} - m_t. m scales S, n and e^{-m} alike and cancels:
    no gradient passes through it. k is not scaled. A step with log_input -inf and
    log_forget 0 changes nothing.

    Args:
        q: (batch, time, heads, key).
        k: the same shape.
        v: (batch, time, heads, value).
        log_input: i, (batch, time, heads), of any size.
        log_forget: f, the same shape, not positive.
        eps: added to the denominator.
        initial_state: (S, n, m), (batch, heads, key, value), (batch, heads, key) and
            (batch, heads); zeros if None.
        return_state: whether to give the last (S, n, m) as well.
        chunk_size: as in `linear_attention`.

    Returns:
        (batch, time, heads, value) in the dtype of v, or that and (S, n, m).
    """
    dtype, v = v.dtype, _with_ones(v)
    log_input, log_forget = (ops.cast(x, v.dtype) for x in (log_input, log_forget))
    state, start = None, ops.zeros_like(log_input[:, 0])
    if initial_state is not None:
        state, start = _joined(*initial_state[:2]), ops.cast(initial_state[2], v.dtype)
    before, m = _running_maximum(log_input, log_forget, start)
    v = v * ops.expand_dims(ops.exp(log_input - m), -1)
    decay = log_forget + before - m
    outputs, state = linear_attention(q, k, v, decay, None, state, True, chunk_size)
    outputs = ops.cast(_bounded(outputs, m, eps), dtype)
    return (outputs, (*_parted(state), m[:, -1])) if return_state else outputs


def stabilized_linear_attention_step(q, k, v, log_input, log_forget, state, eps=1e-6):
    """One step of `stabilized_linear_attention`; the state is (S, n, m)."""
    dtype, v = v.dtype, _with_ones(v)
    log_input, log_forget = (ops.cast(x, v.dtype) for x in (log_input, log_forget))
    before = ops.cast(state[2], v.dtype)
    m = ops.stop_gradient(_next_maximum(log_forget, before, log_input))
    v = v * ops.expand_dims(ops.exp(log_input - m), -1)
    decay = log_forget + before - m
    outputs, state = linear_attention_step(q, k, v, decay, _joined(*state[:2]))
    return ops.cast(_bounded(outputs, m, eps), dtype), (*_parted(state), m)


def _with_ones(v):
    """Values in the precision of the state, and ones, whose output sums the weights."""
    v = ops.cast(v, exact_dtype(v))
    return ops.concatenate([v, ops.ones_like(v[..., :1])], axis=-1)


def _joined(S, z):
    return ops.concatenate([S, ops.expand_dims(ops.cast(z, S.dtype), -1)], axis=-1)


def _parted(state):
    return state[..., :-1], state[..., -1]


def _bounded(outputs, m, eps):
    """The outputs over max(|their last column|, e^{-m}) + eps."""
    floor = ops.expand_dims(ops.exp(-ops.maximum(m, -80.0)), -1)  # float32 has e^88
    return outputs[..., :-1] / (ops.maximum(ops.abs(outputs[..., -1:]), floor) + eps)


def _attend_to_all(q, k, v, state):
    """Every step reads the state after the last one."""
    q, k = (ops.cast(x, v.dtype) for x in (q, k))
    q, k, v, _ = _matched(q, k, v, None)
    q, k = (_repeated(x, v.shape[2]) for x in (q, k))
    after = ops.einsum("bthk,bthv->bhkv", k, v)
    if state is not None:
        after = after + ops.cast(state, v.dtype)
    return ops.einsum("bthk,bhkv->bthv", q, after), after


def _next_maximum(log_forget, m, log_input):
    """max(f + m, i), finite also where both gates are closed."""
    return ops.maximum(ops.maximum(log_forget + m, log_input), -1e30)


def _running_maximum(log_input, log_forget, start):
    """All m_{t-1} and all m_t = max(f_t + m_{t-1}, i_t), (batch, time, heads).

    By doubling: after round r each step holds the f and i of the 2^r steps up to it
    taken as one. Only m_0 passes a gradient on.
    """
    f, m = (ops.swapaxes(x, 0, 1) for x in (log_forget, log_input))
    start = ops.expand_dims(start, 0)
    first = ops.reshape(positions(m, 0) < 1.0, (-1, 1, 1))
    m = ops.where(first, _next_maximum(f, start, m), m)
    for r in range(math.ceil(math.log2(static_length(m, 0) or LONGEST))):
        m = _next_maximum(f, _delayed(m, 2**r, -math.inf), m)
        f = f + _delayed(f, 2**r, 0.0)
    m = ops.stop_gradient(m)
    before = ops.where(first, start, _delayed(m, 1, 0.0))
    return ops.swapaxes(before, 0, 1), ops.swapaxes(m, 0, 1)


def _delayed(x, steps, first):
    """Axis 0 so many steps later, and `first` before."""
    if static_length(x, 0) is not None:
        return ops.pad(x[:-steps], [(steps, 0), (0, 0), (0, 0)], constant_values=first)
    source = positions(x, 0) - steps
    earlier = ops.take(x, ops.cast(ops.maximum(source, 0.0), "int32"), axis=0)
    return ops.where(ops.reshape(source >= 0.0, (-1, 1, 1)), earlier, first)


def _decay_of_steps(log_decay, dtype):
    """(batch or 1, time or 1, heads, key or 1), or None."""
    if log_decay is None:
        return None
    log_decay, rank = ops.cast(log_decay, dtype), len(log_decay.shape)
    if rank == 1:
        return ops.reshape(log_decay, (1, 1, -1, 1))
    if rank == 3:
        return ops.expand_dims(log_decay, -1)
    if rank != 4:
        raise ValueError(
            "expected log_decay (heads,), (batch, time, heads) or (batch, time, heads, "
            f"key), received the shape {tuple(log_decay.shape)}"
        )
    return log_decay


def _matched(q, k, v, log_decay):
    """Repeats heads on axis 2 as far as the chunks need it.

    Afterwards v has all heads, q and k the same number, and log_decay either as many
    as v (a decay for each head) or as q (a decay for each channel).
    """
    channels = log_decay is not None and log_decay.shape[3] > 1
    counts = [x.shape[2] for x in (q, k, v)]
    counts += [] if log_decay is None else [log_decay.shape[2]]
    heads = max(counts)
    if any(heads % count for count in counts):
        raise ValueError(
            "expected numbers of heads that divide the largest, received "
            f"{counts} for q, k, v and log_decay; make them multiples of one another"
        )
    fewer = max(counts[:2] + (counts[3:] if channels else []))
    q, k, v = _repeated(q, fewer), _repeated(k, fewer), _repeated(v, heads)
    if log_decay is not None:
        log_decay = _repeated(log_decay, fewer if channels else heads)
    return q, k, v, log_decay


def _repeated(x, heads, axis=2):
    """Each head as many times in a row as makes `heads`."""
    count = x.shape[axis]
    return x if count == heads else ops.repeat(x, heads // count, axis=axis)


def _initial_state(k, v, state):
    """`state`, or zeros of (batch, heads, key, value), from k and v of one step."""
    if state is not None:
        return ops.cast(state, v.dtype)
    return _outer(ops.zeros_like(_repeated(k, v.shape[1], 1)), ops.zeros_like(v))


def _outer(k, v):
    return ops.expand_dims(k, -1) * ops.expand_dims(v, -2)


def _read(state, q):
    return ops.sum(ops.expand_dims(q, -1) * state, axis=-2)


def _stepped(k, v, log_decay, state):
    """The next state; log_decay is (batch, 1, heads, key or 1) or None."""
    if log_decay is None:
        return state + _outer(k, v)
    decay = _repeated(ops.exp(log_decay[:, 0]), v.shape[1], 1)
    return linear_scan_step(ops.expand_dims(decay, -1), _outer(k, v), state)


def _attend_before(q, k, v, log_decay, bonus, state, chunk_size):
    """Each step reads the state before it and, by the bonus, its own k vᵀ.

    The state before a step is that after it if k, v and g come one step later.
    """
    if log_decay is not None:
        log_decay = log_decay * ops.ones_like(v[:1, :, :1, :1])

    def later(x):
        return ops.concatenate([ops.zeros_like(x[:, :1]), x[:, :-1]], axis=1)

    delayed = None if log_decay is None else later(log_decay)
    outputs, state = _attend(q, later(k), later(v), delayed, state, chunk_size)
    own = ops.sum(q * bonus * k, axis=-1, keepdims=True)
    outputs = outputs + _repeated(own, v.shape[2]) * v
    log_decay = None if log_decay is None else log_decay[:, -1:]
    return outputs, _stepped(
        _repeated(k[:, -1], v.shape[2], 1), v[:, -1], log_decay, state
    )


def _attend(q, k, v, log_decay, state, chunk_size):
    """Outputs and last state, of matched heads in the precision of the state."""
    heads, values = v.shape[2:]
    one_chunk = by_positions(q, 1) and not _loops_over_open_lengths()
    if one_chunk:  # to put heads side by side would need a reshape of the time
        q, k = _repeated(q, heads), _repeated(k, heads)
        log_decay = None if log_decay is None else _repeated(log_decay, heads)
    groups = q.shape[2]
    kind, shared, decays = _NoDecay, 1, []
    if log_decay is not None and log_decay.shape[3] > 1:
        kind, decays = _ChannelDecay, [log_decay * ops.ones_like(q)]
    elif log_decay is not None:
        kind, shared = _HeadDecay, heads // groups
        decays = [_side_by_side(log_decay, groups)]
    v, state = _side_by_side(v, groups), _states_side_by_side(state, groups)
    if one_chunk:
        outputs, state = _attend_as_one_chunk(kind, shared, q, k, v, state, decays)
    else:
        run = _chunkwise(kind, shared)
        outputs, state = _attend_in_chunks(run, q, k, v, state, decays, chunk_size)
    if heads != groups:
        outputs = ops.reshape(outputs, (*ops.shape(outputs)[:2], heads, values))
    return outputs, _states_by_head(state, heads)


def _side_by_side(x, groups):
    """(batch, time, heads, values) -> (batch, time, groups, w)."""
    if x.shape[2] == groups:
        return x
    width = x.shape[2] // groups * x.shape[3]
    return ops.reshape(x, (*ops.shape(x)[:2], groups, width))


def _states_side_by_side(state, groups):
    """(batch, heads, key, value) -> (batch, groups, key, w)."""
    heads, key, value = state.shape[1:]
    if heads == groups:
        return state
    state = ops.reshape(state, (-1, groups, heads // groups, key, value))
    state = ops.transpose(state, (0, 1, 3, 2, 4))
    return ops.reshape(state, (-1, groups, key, heads // groups * value))


def _states_by_head(state, heads):
    """(batch, groups, key, w) -> (batch, heads, key, value)."""
    groups, key, width = state.shape[1:]
    if heads == groups:
        return state
    value = width * groups // heads
    state = ops.reshape(state, (-1, groups, key, heads // groups, value))
    state = ops.transpose(state, (0, 1, 3, 2, 4))
    return ops.reshape(state, (-1, heads, key, value))


def _loops_over_open_lengths():
    """As TensorFlow and JAX do; `fit` needs it. An ONNX file has no such loop."""
    return backend.backend() != "torch" and exporting() != "onnx"


def _attend_as_one_chunk(kind, heads, q, k, v, state, decays):
    """For exporters: scores of every pair of steps, without a reshape of the time."""
    time = ops.ones_like(v[:1, :, :1, :1])
    decays = [_heads_first(g * time) for g in decays]
    q, k, v = (_heads_first(x) for x in (q, k, v))
    outputs, _, last = _forward(kind(heads, v, *decays), heads, q, k, v, state)
    return ops.swapaxes(outputs[0], 1, 2), last


def _heads_first(x):
    """(b, t, g, d) -> (1, b, g, t, d)."""
    return ops.expand_dims(ops.swapaxes(x, 1, 2), 0)


def _attend_in_chunks(run, q, k, v, state, decays, chunk_size):
    """Pads the time to chunks, which `run` takes; a padded step changes nothing."""
    length, key = static_length(v), q.shape[3]
    chunk_size = chunk_size or (32 if key <= 32 else 64)
    size = 2 ** math.ceil(math.log2(min(chunk_size, length or chunk_size)))
    steps = ops.shape(v)[1] if length is None else length
    count = (steps + size - 1) // size
    if length is None or count * size > length:  # constants end with the sequence
        decays = [g * ops.ones_like(v[:1, :, :1, :1]) for g in decays]
    q, k, v, *decays = (_in_chunks(x, count, size) for x in (q, k, v, *decays))
    joined = run(q, k, v, state, *decays)
    last = ops.swapaxes(joined[:, -key:], 1, 2)
    # TensorFlow forgets the number of keys where that of the steps is unknown.
    return joined[:, :steps], ops.reshape(last, (-1, *state.shape[1:]))


def _in_chunks(x, count, size):
    """(b, t, g, d) -> (n, b, g, c, d), zeros after the end.

    A constant, of one step only, becomes one chunk for all.
    """
    steps = static_length(x)
    if steps == 1 and (count, size) != (1, 1):
        x = ops.expand_dims(ops.transpose(x, (1, 0, 2, 3)), 3)
        return x * ops.ones((size, 1), dtype=x.dtype)
    if steps is None:
        x = ops.pad(x, [(0, 0), (0, size - 1), (0, 0), (0, 0)])[:, : count * size]
    elif steps < count * size:
        x = ops.pad(x, [(0, 0), (0, count * size - steps), (0, 0), (0, 0)])
    x = ops.reshape(x, (ops.shape(x)[0], count, size, *x.shape[2:]))
    x = ops.transpose(x, (1, 0, 3, 2, 4))
    # PyTorch would copy the chunks again for each product; this lays them out once.
    return ops.reshape(ops.reshape(x, (-1, *x.shape[3:])), ops.shape(x))


def _chunkwise(kind, heads):
    """The function (q, k, v, state, log-decays) of chunks -> outputs and last state.

    They are joined in time, (b, n c + k, g, w), for a custom gradient has one output.
    """

    @ops.custom_gradient
    def run(q, k, v, state, *decays):
        decay = kind(heads, v, *decays)
        outputs, before, last = _forward(decay, heads, q, k, v, state)
        read = outputs if kind is _HeadDecay else None  # others need not keep it

        def gradient(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream
            by_outputs = _in_chunks(
                upstream[:, : -q.shape[4]], ops.shape(v)[0], v.shape[3]
            )
            by_last = ops.swapaxes(upstream[:, -q.shape[4] :], 1, 2)
            decay = kind(heads, v, *decays)
            by_q, by_k, by_v, by_state, after = _backward(
                decay, heads, q, k, v, before, by_outputs, by_last
            )
            if not decays:
                return by_q, by_k, by_v, by_state
            ends = ops.concatenate([before[1:], ops.expand_dims(last, 0)], axis=0)
            within = decay.sum_gradient(q, by_q, k, by_k, read, by_outputs, v, by_v)
            by_decay = _suffix_sums(within) + decay.total_gradient(ends * after)
            by_decay = _summed_like(by_decay, decays[0])
            # Rounding would else be multiplied by the infinite slope of g = ln 0.
            by_decay = ops.where(decays[0] < LOWEST, 0.0, by_decay)
            return by_q, by_k, by_v, by_state, by_decay

        batch, count, size = ops.shape(v)[1], ops.shape(v)[0], v.shape[3]
        in_time = ops.transpose(outputs, (1, 0, 3, 2, 4))
        in_time = ops.reshape(in_time, (batch, count * size, v.shape[2], v.shape[4]))
        return ops.concatenate([in_time, ops.swapaxes(last, 1, 2)], axis=1), gradient

    return run


def _forward(decay, heads, q, k, v, state):
    """Outputs of each chunk, the states before each, and the last one."""
    written = ops.matmul(turned(_times(k, decay.keys)), _times(v, decay.values))
    before, last = _carried(decay.total, written, state)
    read = _times(ops.matmul(_times(q, decay.queries), before), decay.outputs)
    mixed = ops.matmul(decay.scores(q, k), _by_head(v, heads))
    return read + _merged(mixed), before, last


def _backward(decay, heads, q, k, v, before, by_outputs, by_last):
    """Gradients in q, k, v, the first state, and the states after each chunk."""
    by_read = _times(by_outputs, decay.outputs)
    by_before = ops.matmul(turned(_times(q, decay.queries)), by_read)
    after, by_state = _carried(decay.total, by_before, by_last, reverse=True)
    by_mixed = _by_head(by_outputs, heads)
    by_scores = ops.matmul(by_mixed, turned(_by_head(v, heads)))
    by_q, by_k = decay.scores_gradient(q, k, by_scores)
    by_q = by_q + _times(ops.matmul(by_read, turned(before)), decay.queries)
    by_written = ops.matmul(_times(v, decay.values), turned(after))
    by_k = by_k + _times(by_written, decay.keys)
    by_v = _merged(ops.matmul(turned(decay.scores(q, k)), by_mixed))
    by_written = ops.matmul(_times(k, decay.keys), after)
    by_v = by_v + _times(by_written, decay.values)
    return by_q, by_k, by_v, by_state, after


def _carried(total, written, state, reverse=False):
    """The states S before each chunk of S ← total ⊙ S + written, and the last one.

    Args:
        total: broadcasts to `written`, or None for ones.
        written: (n, b, g, k, w).
        state: (b, g, k, w).
        reverse: whether to begin with the last chunk.
    """
    total = ops.ones_like(written[:1, :1, :1, :1, :1]) if total is None else total
    total = total + ops.zeros_like(written[:, :1, :1, :1, :1])
    count = static_length(written, 0)
    if count == 1:
        return ops.expand_dims(state, 0), total[0] * state + written[0]
    if exporting() == "onnx":
        after = blocked(total + ops.zeros_like(written), written, state, reverse)
        kept = [after[1:], state[None]] if reverse else [state[None], after[:-1]]
        return ops.concatenate(kept, axis=0), after[0 if reverse else -1]
    if count is None:  # TensorFlow then loops over a single tensor only
        pairs = ops.stack([total + ops.zeros_like(written), written], axis=1)
        last, before = ops.scan(
            lambda S, pair: (pair[0] * S + pair[1], S), state, pairs, reverse=reverse
        )
        return before, last
    last, before = ops.scan(
        lambda S, now: (now[0] * S + now[1], S),
        state,
        (total, written),
        reverse=reverse,
    )
    return before, last


class _NoDecay:
    """Factors of a chunk's tensors, None for one.

    `queries` and `outputs` belong to reading the state before the chunk, `keys` and
    `values` to writing into the one after it, `total` to the state itself.
    """

    queries = keys = outputs = values = total = None

    def __init__(self, heads, v):
        self.weights = ops.cast(causal(v), v.dtype)

    def scores(self, q, k):
        """P of the module's equations, (n, b, g, r, c, c)."""
        return ops.expand_dims(ops.matmul(q, turned(k)), 3) * self.weights

    def scores_gradient(self, q, k, by_scores):
        """Gradients in q and k."""
        by_products = ops.sum(by_scores * self.weights, axis=3)
        return ops.matmul(by_products, k), ops.matmul(turned(by_products), q)


class _HeadDecay(_NoDecay):
    """The same of a log-decay (n, b, g, c, r); n and b may be 1.

    It acts on v and the outputs, so that the heads of a group share q and k.
    """

    def __init__(self, heads, v, log_decay):
        products = head_products(ops.expand_dims(ops.swapaxes(log_decay, 3, 4), -1))
        self.weights = products.weights()  # (n, b, g, r, c, c)
        self.size = v.shape[4] // heads
        self.heads = heads
        self.outputs = self._wide(ops.swapaxes(products.before[..., 0], 3, 4))
        self.values = self._wide(ops.swapaxes(products.after[..., 0], 3, 4))
        self.total = self._wide(ops.exp(ops.sum(log_decay, axis=3, keepdims=True)))

    def _wide(self, x):
        """(..., r) -> (..., w), or as it is if that is the same."""
        return x if self.heads == 1 else ops.repeat(x, self.size, axis=-1)

    def _narrow(self, x):
        """(..., w) -> (..., r), sums over the values of a head."""
        if self.heads == 1:
            return ops.sum(x, axis=-1, keepdims=True)
        parts = (*ops.shape(x)[:-1], self.heads, self.size)
        return ops.sum(ops.reshape(x, parts), axis=-1)

    def sum_gradient(self, q, by_q, k, by_k, outputs, by_outputs, v, by_v):
        """Gradient in G: it raises what step t reads and lowers what it writes."""
        return self._narrow(outputs * by_outputs - v * by_v)

    def total_gradient(self, product):
        """Gradient in G at a chunk's end, from the state there times its gradient."""
        return self._narrow(ops.sum(product, axis=3, keepdims=True))


class _ChannelDecay(_NoDecay):
    """The same of a log-decay (n, b, g, c, k). It acts on q and k."""

    def __init__(self, heads, v, log_decay):
        self.products = channel_products(log_decay)
        self.queries, self.keys = self.products.before, self.products.after
        self.total = turned(ops.exp(ops.sum(log_decay, axis=3, keepdims=True)))

    def scores(self, q, k):
        return ops.expand_dims(self.products.scores(q, k), 3)

    def scores_gradient(self, q, k, by_scores):
        return self.products.scores_gradient(q, k, by_scores[:, :, :, 0])

    def sum_gradient(self, q, by_q, k, by_k, outputs, by_outputs, v, by_v):
        return q * by_q - k * by_k

    def total_gradient(self, product):
        return ops.expand_dims(ops.sum(product, axis=4), 3)


def _suffix_sums(x):
    """Sums over each step and those after it, on axis -2."""
    # `cumsum` takes ten times as long on TensorFlow.
    steps = x.shape[-2]
    later = np.triu(np.ones((steps, steps)))
    return ops.matmul(ops.convert_to_tensor(later, dtype=x.dtype), x)


def _summed_like(x, like):
    """Sums over the axes of chunks and of the batch where `like` has size 1."""
    axes = [axis for axis in (0, 1) if like.shape[axis] == 1]
    return ops.sum(x, axis=axes, keepdims=True) if axes else x


def _by_head(x, heads):
    """(..., c, w) -> (..., r, c, values of a head)."""
    if heads == 1:
        return ops.expand_dims(x, -3)
    shape = (*ops.shape(x)[:-1], heads, x.shape[-1] // heads)
    return ops.swapaxes(ops.reshape(x, shape), -3, -2)


def _merged(x):
    """The inverse of `_by_head`."""
    if x.shape[-3] == 1:
        return ops.squeeze(x, -3)
    x = ops.swapaxes(x, -3, -2)
    return ops.reshape(x, (*ops.shape(x)[:-2], x.shape[-2] * x.shape[-1]))


def _times(x, factor):
    return x if factor is None else x * factor
