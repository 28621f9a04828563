"""Softmax attention.

    s_ij = cap(scale q_i·k_j) + b_ij    where query i sees key j, else nothing
    o_i  = Σ_j e^{s_ij} v_j / (Σ_j e^{s_ij} + e^{sink})

with cap(s) = c tanh(s/c) and the sink only where asked for. A query that sees no key
gives zero. Vaswani et al. 2017, Attention Is All You Need, arXiv:1706.03762; heads in
groups that share keys and values: Ainslie et al. 2023, arXiv:2305.13245.

`blockwise_sdpa` takes the same sum block by block of queries and keys, with a running
maximum m and normaliser l (Milakov & Gimelshein 2018, arXiv:1805.02867), and computes
each block again in the backward pass (Rabe & Staats 2021, arXiv:2112.05682; Dao et
al. 2022, arXiv:2205.14135). So its memory grows with the length, not with its square.
"""

import keras
import numpy as np
from keras import backend, ops

from keras_edifice.backends import fused_layers
from keras_edifice.backends.running_torch import runs_now
from keras_edifice.ops.masks import (
    additive,
    both,
    hidden,
    make_mask,
    positions,
    rank_4,
    visible,
)
from keras_edifice.ops.precision import exact_dtype
from keras_edifice.ops.tracing import exporting, static_length

BLOCK_SIZE = 256
"""Queries and keys of a block: enough for a matrix product, few for a cache."""

TINY = 1e-30
"""Keeps the normaliser of a query that sees nothing away from zero."""


def sdpa(
    q,
    k,
    v,
    *,
    bias=None,
    mask=None,
    causal=False,
    window=None,
    q_offset=0,
    scale=None,
    logit_soft_cap=None,
    slopes=None,
    sinks=None,
    dropout=0.0,
    seed=None,
    return_weights=False,
    block_size=None,
):
    """Scaled dot-product attention, softmax in float32.

    Args:
        q: (batch, queries, heads, size).
        k: (batch, keys, kv_heads, size); head h uses that of h // (heads / kv_heads).
        v: (batch, keys, kv_heads, value_size).
        bias: added to the scores, broadcastable to (batch, heads, queries, keys).
        mask: True where a key is seen: (batch, keys), (batch, queries, keys), or
            broadcastable to (batch, heads, queries, keys).
        causal: whether later keys are hidden.
        window: number of visible keys, the query's own included; as in `make_mask`.
        q_offset: position of the first query among the keys, number or (batch,).
        scale: of the scores; 1/√size if None.
        logit_soft_cap: c above, before bias and mask; None for none.
        slopes: (heads,), the m of ALiBi: m |i - j| is taken from each score.
        sinks: (heads,), a score beside those of the keys that has no value.
        dropout: rate on the weights; pass zero outside training.
        seed: of the dropout, a `SeedGenerator`.
        return_weights: whether to give the weights too, before dropout.
        block_size: compute by `blockwise_sdpa`; None for all scores at once.

    Returns:
        (batch, queries, heads, value_size) in q's dtype, or that and the weights,
        (batch, heads, queries, keys) in float32 (float64 for float64 inputs).

    Raises:
        ValueError: kv_heads does not divide heads, the mask is of another rank, or
            `block_size` came with `dropout` or `return_weights`.
    """
    visibility = dict(causal=causal, window=window, q_offset=q_offset)
    extras = dict(logit_soft_cap=logit_soft_cap, sinks=sinks)
    weighted = bool(dropout) or return_weights
    if block_size is not None:
        if weighted:
            raise ValueError(
                "attention in blocks has no weights to drop or to return, received "
                f"dropout={dropout} and return_weights={return_weights}; "
                "pass block_size=None"
            )
        options = dict(bias=bias, mask=mask, scale=scale, slopes=slopes, **extras)
        return blockwise_sdpa(q, k, v, block_size=block_size, **options, **visibility)
    q, k, v, scale = _checked(q, k, v, scale)
    fused = _has_kernel(q, bias, slopes, **extras) and not weighted
    if fused and mask is bias is slopes is None and _plainly_causal(q, k, **visibility):
        return _fused(q, k, v, scale, causal=causal)
    mask = None if mask is None else rank_4(mask)
    mask = both(make_mask(q, k, **visibility), mask)
    bias = _biases(q, k, bias, slopes, q_offset)
    if fused:
        return _fused(q, k, v, scale, bias, mask)
    y, weights = _plain(q, k, v, scale, bias, mask, dropout, seed, **extras)
    return (y, weights) if return_weights else y


def _checked(q, k, v, scale):
    """Tensors, and the scale as a number."""
    q, k, v = (ops.convert_to_tensor(x) for x in (q, k, v))
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            "the heads of q must be a multiple of those of k, received "
            f"{q.shape[2]} and {k.shape[2]}; change one of them"
        )
    return q, k, v, q.shape[-1] ** -0.5 if scale is None else scale


def _biases(q, k, bias, slopes, q_offset):
    """`bias` and that of ALiBi in one, None if there is neither."""
    if slopes is None:
        return bias
    i, j = positions(q, q_offset), positions(k)
    distance = ops.abs(ops.expand_dims(i, -1) - j)  # (t, s) or (b, t, s)
    slopes = ops.reshape(ops.cast(slopes, "float32"), (-1, 1, 1))
    alibi = -slopes * ops.expand_dims(distance, -3)
    return alibi if bias is None else alibi + ops.cast(bias, "float32")


def _plain(q, k, v, scale, bias, mask, dropout, seed, logit_soft_cap, sinks):
    """The equations of the module. Gives the output and the weights."""
    dtype, exact = q.dtype, exact_dtype(q)
    q, k, v = (_heads_first(ops.cast(x, exact)) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    open_length = static_length(q, 2) is None or static_length(k, 2) is None
    if groups > 1 and (exporting() or open_length):
        k, v = (ops.repeat(x, groups, axis=1) for x in (k, v))
    scores = _grouped_product(q * scale, ops.swapaxes(k, 2, 3))
    if logit_soft_cap is not None:
        scores = logit_soft_cap * ops.tanh(scores / logit_soft_cap)
    if bias is not None:
        scores = scores + ops.cast(bias, exact)
    if mask is not None:
        scores = ops.where(mask, scores, hidden(exact))
    weights = _softmax(scores, sinks)
    dropped = keras.random.dropout(weights, dropout, seed=seed) if dropout else weights
    y = _zero_unless_seen(_grouped_product(dropped, v), mask)
    weights = _zero_unless_seen(weights, mask)
    return ops.cast(ops.transpose(y, (0, 2, 1, 3)), dtype), weights


def _heads_first(x):
    """(b, t, h, d) -> (b, h, t, d)."""
    if x.shape[2] == 1:  # tf2onnx writes wrong sizes for a transposition of one head
        return ops.expand_dims(x[:, :, 0], 1)
    return ops.transpose(x, (0, 2, 1, 3))


def _softmax(scores, sinks):
    """Over the last axis, with the sink of each head in the sum."""
    if sinks is None:
        # Keras warns of the softmax of one number, which is right here.
        one = static_length(scores, -1) == 1
        return ops.ones_like(scores) if one else ops.softmax(scores, axis=-1)
    sinks = ops.reshape(ops.cast(sinks, scores.dtype), (1, -1, 1, 1))
    column = ops.zeros_like(scores[..., :1]) + sinks
    return ops.softmax(ops.concatenate([scores, column], axis=-1), axis=-1)[..., :-1]


def _zero_unless_seen(y, mask):
    """(b, h, t, ...) with zeros for the queries that see no key."""
    if mask is None:
        return y
    seen = ops.sum(ops.cast(mask, "float32"), axis=-1, keepdims=True) > 0.0
    return ops.where(seen, y, ops.zeros_like(y))


def _folded(x, groups):
    """(b, h, t, ...) -> (b, h / groups, groups t, ...): heads that share their keys."""
    if groups == 1:
        return x
    heads, length, size = x.shape[1:]
    return ops.reshape(x, (-1, heads // groups, groups * length, size))


def _unfolded(x, groups):
    """Undoes `_folded`."""
    if groups == 1:
        return x
    heads, length, size = x.shape[1:]
    return ops.reshape(x, (-1, heads * groups, length // groups, size))


def _has_kernel(q, bias, slopes, logit_soft_cap, sinks):
    """Whether the backend has a kernel for this that is faster than the equations."""
    if exporting() or static_length(q) is None:
        return False
    if logit_soft_cap is not None or sinks is not None:
        return False
    if backend.backend() == "jax":  # its kernel takes half precision, on a GPU
        gpu = any(x.startswith("gpu") for x in keras.distribution.list_devices())
        half = backend.standardize_dtype(q.dtype) in ("float16", "bfloat16")
        return gpu and half and bias is None and slopes is None
    return backend.backend() == "torch"


def _plainly_causal(q, k, causal, window, q_offset):
    """Whether a kernel knows by itself which keys are seen, from a flag at most."""
    if not causal:
        return window is None
    start = isinstance(q_offset, int) and q_offset == 0
    return start and window is None and q.shape[1] == k.shape[1]


def _fused(q, k, v, scale, bias=None, mask=None, causal=False):
    """The backend's kernel, for which heads and sizes are made equal."""
    values, size = v.shape[-1], max(q.shape[-1], v.shape[-1])
    q, k, v = (_widened(x, size) for x in (q, k, v))
    if backend.backend() == "torch":  # grouped heads would keep it from its kernel
        groups = q.shape[2] // k.shape[2]
        k, v = (ops.repeat(x, groups, axis=2) if groups > 1 else x for x in (k, v))
    if bias is not None:
        bias = ops.cast(bias, q.dtype)
        if mask is not None:
            bias = bias + additive(mask, q.dtype)
    if runs_now(q) and (mask is None or bias is not None):
        y = fused_layers.attention(q, k, v, scale, bias, causal)
    else:
        options = dict(mask=mask) if bias is None else dict(bias=bias)
        y = ops.dot_product_attention(q, k, v, scale=scale, is_causal=causal, **options)
    y = y[..., :values]
    if mask is None:
        return y
    y = _zero_unless_seen(ops.transpose(y, (0, 2, 1, 3)), mask)
    return ops.transpose(y, (0, 2, 1, 3))


def _widened(x, size):
    """Zeros after the features, up to `size`."""
    missing = size - x.shape[-1]
    return ops.pad(x, [(0, 0)] * 3 + [(0, missing)]) if missing else x


def blockwise_sdpa(
    q,
    k,
    v,
    *,
    bias=None,
    mask=None,
    causal=False,
    window=None,
    q_offset=0,
    scale=None,
    logit_soft_cap=None,
    slopes=None,
    sinks=None,
    block_size=BLOCK_SIZE,
):
    """`sdpa` in memory that grows linearly with the length, to the same numbers.

    Blocks of which no key is visible are left out where `q_offset` is a number. The
    arguments are those of `sdpa`; `bias` and a mask with queries are as large as they
    are. ONNX has no loop that every exporter writes: there all scores exist at once.

    Args:
        q: (batch, queries, heads, size).
        k: (batch, keys, kv_heads, size).
        v: (batch, keys, kv_heads, value_size).
        bias: see `sdpa`, and so the following.
        mask: see `sdpa`.
        causal: see `sdpa`.
        window: see `sdpa`.
        q_offset: see `sdpa`.
        scale: see `sdpa`.
        logit_soft_cap: see `sdpa`.
        slopes: see `sdpa`.
        sinks: see `sdpa`.
        block_size: queries and keys of a block; any, the length needs not be a
            multiple.

    Returns:
        (batch, queries, heads, value_size) in q's dtype.

    Raises:
        ValueError: kv_heads does not divide heads, or the mask is of another rank.
    """
    q, k, v, scale = _checked(q, k, v, scale)
    visibility = dict(causal=causal, window=window, q_offset=q_offset)
    extras = dict(logit_soft_cap=logit_soft_cap, sinks=sinks)
    mask = None if mask is None else rank_4(mask)
    open_length = static_length(q) is None or static_length(k) is None
    if exporting() == "onnx" or (open_length and backend.backend() != "tensorflow"):
        options = dict(bias=bias, mask=mask, scale=scale, slopes=slopes, **extras)
        return sdpa(q, k, v, **options, **visibility)
    if bias is slopes is None and _has_kernel(q, bias, slopes, **extras):
        by_keys = mask is None or (not causal and mask.shape[2] == 1)
        if by_keys and _plainly_causal(q, k, **visibility):  # the kernel has blocks
            return _fused(q, k, v, scale, None, mask, causal)
    dtype, exact = q.dtype, exact_dtype(q)
    q, k, v = (ops.transpose(ops.cast(x, exact), (0, 2, 1, 3)) for x in (q, k, v))
    learned = []
    if bias is not None:
        learned += [ops.cast(bias, exact) + ops.zeros_like(k[:1, :1, :, 0])]
    if sinks is not None:
        learned += [ops.cast(sinks, exact) * 1.0]
    if mask is not None:
        mask = ops.logical_and(mask, ops.ones_like(k[:1, :1, :, 0], dtype="bool"))
    blocks = _Blocks(q, k, block_size, mask, slopes, logit_soft_cap, **visibility)
    run = _in_blocks(blocks, bias is not None, sinks is not None)
    y = run(q * scale, k, v, *learned)
    return ops.cast(ops.transpose(y, (0, 2, 1, 3)), dtype)


def _in_blocks(blocks, biased, sunk):
    """The function (q, k, v[, bias][, sinks]) -> output, heads on axis 1 throughout.

    With p_ij = e^{s_ij - L_i} of the saved L_i = m_i + log l_i, the backward pass is

        ∂v_j = Σ_i p_ij ∂o_i,    ∂s_ij = p_ij (∂o_i·v_j - ∂o_i·o_i)

    and the chain rule through s_ij.
    """

    @ops.custom_gradient
    def run(q, k, v, *learned):
        q, k, v = blocks.of_queries(q), blocks.of_keys(k), blocks.of_keys(v)
        bias = _Pairs(learned[0], blocks) if biased else None
        sinks = ops.reshape(learned[-1], (-1, 1, 1)) if sunk else None
        y, total = _forward(blocks, q, k, v, bias, sinks)

        def gradient(*args, upstream=None):
            upstream = blocks.of_queries(args[0] if upstream is None else upstream)
            aligned = ops.sum(upstream * y, axis=-1, keepdims=True)
            by_q, by_k, by_v, *by_bias = _backward(
                blocks, q, k, v, bias, total, upstream, aligned
            )
            found = [_joined(by_q, 2, blocks.q_length)]
            found += [_joined(x, 2, blocks.k_length) for x in (by_k, by_v)]
            found += [bias.joined(x) for x in by_bias]
            if sunk:  # its value is zero: ∂s = p (0 - ∂o·o)
                by_sinks = -ops.exp(sinks - total) * aligned
                found += [ops.sum(by_sinks, axis=(0, 1, 3, 4))]
            return tuple(found)

        return _joined(y, 2, blocks.q_length), gradient

    return run


def _forward(blocks, q, k, v, bias, sinks):
    """Outputs and log-normalisers of the queries, (blocks, b, h, block, ...)."""
    row = ops.zeros_like(q[..., :1])
    # The maximum begins above a hidden score, whose exponential is zero then.
    m = row + (hidden() / 10.0 if sinks is None else sinks)
    normaliser = row if sinks is None else row + 1.0
    y = row + ops.zeros((v.shape[-1],), dtype=v.dtype)

    def body(i, j, carry):
        m, normaliser, y = carry
        s, _ = blocks.scores(q[i], k[j], bias, i, j)
        top = ops.maximum(m[i], ops.max(s, axis=-1, keepdims=True))
        p, kept = ops.exp(s - top), ops.exp(m[i] - top)
        more = ops.sum(p, axis=-1, keepdims=True)
        return [
            _put(m, i, top),
            _put(normaliser, i, kept * normaliser[i] + more),
            _put(y, i, kept * y[i] + _grouped_product(p, v[j])),
        ]

    m, normaliser, y = blocks.over_pairs(body, [m, normaliser, y])
    normaliser = ops.maximum(normaliser, TINY)
    return y / normaliser, m + ops.log(normaliser)


def _backward(blocks, q, k, v, bias, total, upstream, aligned):
    """Gradients in the blocks of q, k, v and, if there is one, of the bias."""

    def body(i, j, carry):
        by_q, by_k, by_v, *by_bias = carry
        s, slope = blocks.scores(q[i], k[j], bias, i, j)
        p = ops.exp(s - total[i])
        by_p = _grouped_product(upstream[i], ops.swapaxes(v[j], 2, 3))
        by_s = p * (by_p - aligned[i])
        if by_bias:
            n, more = bias.index(i, j), bias.summed(by_s)
            by_bias = [_put(by_bias[0], n, by_bias[0][n] + more)]
        by_s = by_s if slope is None else by_s * slope
        groups = blocks.groups
        return [
            _put(by_q, i, by_q[i] + _grouped_product(by_s, k[j])),
            _put(by_k, j, by_k[j] + _product_of_groups(by_s, q[i], groups)),
            _put(by_v, j, by_v[j] + _product_of_groups(p, upstream[i], groups)),
            *by_bias,
        ]

    like = [q, k, v] if bias is None else [q, k, v, bias.blocks]
    return blocks.over_pairs(body, [ops.zeros_like(x) for x in like])


class _Blocks:
    """How queries and keys are cut, and the scores of a block with another."""

    def __init__(self, q, k, size, mask, slopes, cap, causal, window, q_offset):
        lengths = static_length(q, 2), static_length(k, 2)
        self.q_length, self.k_length = ops.shape(q)[2], ops.shape(k)[2]
        self.size = size if None in lengths else min(size, max(lengths))
        self.q_count, self.k_count = (
            (length + self.size - 1) // self.size
            for length in (self.q_length, self.k_length)
        )
        self.groups = q.shape[1] // k.shape[1]
        self.padded = lengths[1] is None or lengths[1] % self.size > 0
        self.visibility = dict(causal=causal, window=window)
        self.q_offset, self.cap = q_offset, cap
        self.slopes = None
        if slopes is not None:
            self.slopes = ops.reshape(ops.cast(slopes, q.dtype), (-1, 1, 1))
        self.mask = None if mask is None else _Pairs(mask, self)

    def of_queries(self, x):
        """(b, h, t, ...) -> (blocks, b, h, block, ...)."""
        return _cut(x, 2, self.size, self.q_count)

    def of_keys(self, x):
        return _cut(x, 2, self.size, self.k_count)

    def scores(self, q, k, bias, i, j):
        """(b, h, block, block), and the slope of the soft cap there, None for one."""
        s, slope = _grouped_product(q, ops.swapaxes(k, 2, 3)), None
        if self.cap is not None:
            slope = ops.tanh(s / self.cap)
            s, slope = self.cap * slope, 1.0 - ops.square(slope)
        if bias is not None:
            s = s + bias.of(i, j)
        query, key = self._positions(i, self.q_offset), self._positions(j)
        if self.slopes is not None:
            distance = ops.abs(ops.expand_dims(query, -1) - key)
            s = s - self.slopes * ops.expand_dims(distance, -3)
        mask = visible(query, key, **self.visibility)
        if self.padded:
            mask = both(mask, key < ops.cast(self.k_length, "float32"))
        if self.mask is not None:
            mask = both(mask, self.mask.of(i, j))
        return (s if mask is None else ops.where(mask, s, hidden(s.dtype))), slope

    def _positions(self, block, offset=0):
        start = ops.cast(ops.convert_to_tensor(block), "float32") * self.size
        return positions(self.size, offset) + start

    def over_pairs(self, body, carry):
        """Runs `body(i, j, carry)` over the pairs of blocks that are not all hidden.

        On JAX and TensorFlow a compiled loop, on PyTorch a loop over lists.
        """
        pairs = self._visible_pairs()
        if backend.backend() == "torch":
            carry = [list(ops.unstack(x)) for x in carry]
            for i, j in zip(*pairs, strict=True):
                carry = body(int(i), int(j), carry)
            return [ops.stack(x) for x in carry]
        if pairs is None:
            count = self.q_count * self.k_count

            def pair(n):
                return n // self.k_count, n % self.k_count
        else:
            count, (first, second) = len(pairs[0]), map(ops.convert_to_tensor, pairs)

            def pair(n):
                return first[n], second[n]

        return ops.fori_loop(0, count, lambda n, carry: body(*pair(n), carry), carry)

    def _visible_pairs(self):
        """Their indices, two arrays; None where the lengths are unknown."""
        if not (isinstance(self.q_count, int) and isinstance(self.k_count, int)):
            return None
        i, j = np.indices((self.q_count, self.k_count), dtype="int32")
        if not isinstance(self.q_offset, int):
            return i.ravel(), j.ravel()
        query, key = i * self.size + self.q_offset, j * self.size
        causal, window = self.visibility["causal"], self.visibility["window"]
        seen = np.ones(i.shape, "bool")
        if causal:
            seen &= key < query + self.size
        if window is not None:
            seen &= query - (key + self.size - 1) < window
            seen &= causal or key - (query + self.size - 1) < window
        seen[0, 0] = True  # compiled loops want one
        return i[seen], j[seen]


class _Pairs:
    """A tensor (b or 1, h or 1, t or 1, s) cut along both lengths."""

    def __init__(self, x, blocks):
        self.q_length, self.k_length = blocks.q_length, blocks.k_length
        self.k_count, self.shared = blocks.k_count, x.shape[2] == 1
        self.spread = [axis for axis in range(3) if x.shape[axis] == 1]
        x = _cut(x, 3, blocks.size, blocks.k_count)
        if not self.shared:  # (pairs of blocks, b, h, block, block)
            x = _cut(x, 3, blocks.size, blocks.q_count)
            x = ops.reshape(x, (-1, *ops.shape(x)[2:]))
        self.blocks = x

    def index(self, i, j):
        """Where the block of queries i and keys j lies."""
        return j if self.shared else i * self.k_count + j

    def of(self, i, j):
        return self.blocks[self.index(i, j)]

    def summed(self, by_block):
        """The gradient of a block, summed over the axes along which it was spread."""
        return ops.sum(by_block, axis=self.spread, keepdims=True)

    def joined(self, blocks):
        """The whole tensor again."""
        if not self.shared:
            blocks = ops.reshape(blocks, (-1, self.k_count, *ops.shape(blocks)[1:]))
            blocks = _joined(blocks, 3, self.q_length)
        return _joined(blocks, 3, self.k_length)


def _cut(x, axis, size, count):
    """(..., n, ...) -> (count, ..., size, ...): an axis in blocks, zeros at the end."""
    x = ops.moveaxis(x, axis, 0)
    length = static_length(x, 0)
    padding = size if length is None else count * size - length
    if padding:
        x = ops.pad(x, [(0, padding)] + [(0, 0)] * (len(x.shape) - 1))[: count * size]
    x = ops.reshape(x, (count, size, *ops.shape(x)[1:]))
    return ops.moveaxis(x, 1, axis + 1)


def _joined(x, axis, length):
    """Undoes `_cut`."""
    x = ops.moveaxis(x, axis + 1, 1)
    x = ops.reshape(x, (-1, *ops.shape(x)[2:]))[:length]
    return ops.moveaxis(x, 0, axis)


def _grouped_product(x, y):
    """(b, h, t, n) times (b, h / groups, n, m) of the head's group -> (b, h, t, m)."""
    groups = x.shape[1] // y.shape[1]
    return _unfolded(ops.matmul(_folded(x, groups), y), groups)


def _product_of_groups(x, y, groups):
    """Σ over the heads of a group of xᵀ y -> (b, h / groups, ...)."""
    return ops.matmul(ops.swapaxes(_folded(x, groups), 2, 3), _folded(y, groups))


def _put(blocks, index, block):
    """The blocks with one of them replaced."""
    if backend.backend() == "torch":  # a list, changed in place
        blocks[index] = block
        return blocks
    return ops.scatter_update(
        blocks, ops.reshape(index, (1, 1)), ops.expand_dims(block, 0)
    )
