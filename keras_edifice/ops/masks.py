"""Which key j a query i may look at: True = visible, conditions joined by "and".

    causal              j <= i            window w      i - w < j <= i
    block_causal n      j/n <= i/n        chunk n       j/n = i/n      (whole quotients)
    segments            s_j = s_i         dilation n    i - j is a multiple of n

A prefix p shows the keys j < p in spite of the positions; padding and segments hide
them all the same. Positions are float32, exact up to 16 million.
"""

from keras import backend, ops

from keras_edifice.ops.positions import positions as positions_along
from keras_edifice.ops.tracing import static_length


def make_mask(
    q_len,
    k_len=None,
    *,
    causal=False,
    window=None,
    q_offset=0,
    padding=None,
    block_causal=None,
    chunk=None,
    dilation=None,
    prefix=None,
    segment_ids=None,
    key_segment_ids=None,
):
    """Visible keys of each query, computed from positions at any length.

    Args:
        q_len: number of queries, or a tensor whose axis 1 they are; that way the
            length may be unknown.
        k_len: the same for keys; that of the queries if None.
        causal: hide keys after the query.
        window: visible keys including the query's own, back in time; without `causal`
            as many on the other side.
        q_offset: position of the first query among the keys, number or (batch,): the
            length of a cache.
        padding: (batch, keys), True for real keys.
        block_causal: length of blocks; keys of later blocks are hidden.
        chunk: length of chunks; keys of other chunks are hidden.
        dilation: distance of visible keys from each other.
        prefix: keys that every query sees, number or (batch,).
        segment_ids: (batch, queries), whole numbers; other segments are hidden.
        key_segment_ids: (batch, keys); those of the queries if None.

    Returns:
        Boolean, broadcastable to (batch, 1, queries, keys); None if nothing is hidden.
    """
    k_len = q_len if k_len is None else k_len
    mask = visible(
        positions(q_len, q_offset),
        positions(k_len),
        causal=causal,
        window=window,
        block_causal=block_causal,
        chunk=chunk,
        dilation=dilation,
        prefix=prefix,
    )
    if segment_ids is not None:
        keys = segment_ids if key_segment_ids is None else key_segment_ids
        mask = both(mask, ops.equal(_column(segment_ids), _row(keys)))
    return mask if padding is None else both(mask, rank_4(padding))


def visible(
    q_positions,
    k_positions,
    *,
    causal=False,
    window=None,
    block_causal=None,
    chunk=None,
    dilation=None,
    prefix=None,
):
    """The part of `make_mask` that depends on positions alone.

    Args:
        q_positions: (queries,) or (batch, queries), of `positions`.
        k_positions: (keys,) or (batch, keys).
        causal: and the others as in `make_mask`.
        window: see there.
        block_causal: see there.
        chunk: see there.
        dilation: see there.
        prefix: see there.

    Returns:
        Boolean, broadcastable to (batch, 1, queries, keys); None if nothing is hidden.
    """
    i, j = _column(q_positions), _row(k_positions)
    mask = None
    if causal:
        mask = both(mask, i >= j)
    if window is not None:
        mask = both(mask, i - j < window)
        mask = mask if causal else both(mask, j - i < window)
    if block_causal is not None:
        mask = both(mask, ops.floor(i / block_causal) >= ops.floor(j / block_causal))
    if chunk is not None:
        mask = both(mask, ops.equal(ops.floor(i / chunk), ops.floor(j / chunk)))
    if dilation is not None:
        steps = (i - j) / dilation
        mask = both(mask, ops.equal(ops.floor(steps), steps))
    if prefix is not None and mask is not None:
        prefix = ops.cast(prefix, "float32")
        mask = ops.logical_or(mask, j < ops.reshape(prefix, (-1, 1, 1, 1)))
    return mask


def positions(length, offset=0):
    """offset, offset + 1, ... in float32: (length,), or (batch, length).

    Args:
        length: a number, or a tensor whose axis 1 has that many entries.
        offset: a number, a tensor of one, or one for each row: (batch,).
    """
    count = length if isinstance(length, int) else static_length(length)
    if count is None:
        steps = positions_along(length)
    else:
        steps = ops.arange(0, count, dtype="float32")
    if isinstance(offset, int | float):
        return steps + float(offset)
    offset = ops.cast(offset, "float32")
    return steps + (ops.expand_dims(offset, -1) if len(offset.shape) else offset)


def both(first, second):
    """True where both are; None hides nothing."""
    if first is None or second is None:
        return second if first is None else first
    return ops.logical_and(first, second)


def rank_4(mask):
    """A mask of keys (b, s), or of queries and keys (b, t, s), as (b, 1, t or 1, s).

    Raises:
        ValueError: it has another rank than 2, 3 or 4.
    """
    rank = len(mask.shape)
    if rank not in (2, 3, 4):
        raise ValueError(
            "mask must be (batch, keys), (batch, queries, keys) or (batch, heads, "
            f"queries, keys), received the shape {tuple(mask.shape)}; add or drop axes"
        )
    mask = ops.cast(mask, "bool")
    for _ in range(4 - rank):
        mask = ops.expand_dims(mask, 1)
    return mask


def additive(mask, dtype="float32"):
    """Zero where True, else the negative number of `hidden`. The mask's shape."""
    zero = ops.zeros((), dtype=dtype)
    return ops.where(mask, zero, ops.cast(hidden(dtype), dtype))


def hidden(dtype="float32"):
    """A score whose exponential is zero beside any real one, finite when doubled."""
    return -3e4 if backend.standardize_dtype(dtype) == "float16" else -1e30


def _column(x):
    """(t,) or (b, t) -> (1 or b, 1, t, 1)."""
    return ops.expand_dims(_batched(x), (1, 3))


def _row(x):
    """(s,) or (b, s) -> (1 or b, 1, 1, s)."""
    return ops.expand_dims(_batched(x), (1, 2))


def _batched(x):
    x = ops.convert_to_tensor(x)
    return x if len(x.shape) == 2 else ops.expand_dims(x, 0)
