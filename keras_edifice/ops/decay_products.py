"""The decay between any two steps of a chunk, exact for decays of any size.

    D_ij = e^{g_{j+1} + ... + g_i} for j <= i, else 0

A quotient of two products from the chunk's start would overflow where decays are
strong, and a difference of two sums of g loses the digits of the weak ones after a
strong one. So D is a product over blocks of 1, 2, 4 ... steps: at the level where the
blocks of i and j are neighbours, it is the decay from the border between them to i,
times the decay from j to the border.

Axes: c steps of a chunk, d channels with a decay each. A decay of zero is g = -inf.
"""

import math

import numpy as np
from keras import backend, ops

from keras_edifice.ops.linear_scan import LONGEST
from keras_edifice.ops.positions import positions
from keras_edifice.ops.tracing import exporting, static_length

LOWEST = -104.0
"""The exponential of this is zero in float32."""


def channel_products(log_decay):
    """The products of a chunk, (..., c, d); c is a power of two, or unknown.

    Returns:
        An object with `before`, the decays from the chunk's start up to each step, and
        `after`, those of the steps after it, both in the shape of log_decay;
        `scores(q, k)`, Σ_d q_id k_jd D_ijd, (..., c, d) -> (..., c, c); and, unless
        `by_positions`, `scores_gradient(q, k, by_scores)`, the gradients in q and k.
    """
    return (_OpenProducts if by_positions(log_decay, -2) else _Products)(log_decay)


def head_products(log_decay):
    """The products of a chunk with one channel, (..., c, 1).

    Returns:
        An object with `before` and `after`, and `weights()`, which is D, (..., c, c).
    """
    return (_OpenSums if by_positions(log_decay, -2) else _Products)(log_decay)


def by_positions(x, axis):
    """Whether the steps of an axis stay in one block, compared pair by pair.

    So it is where their number is unknown, and in ONNX files from JAX and PyTorch,
    whose exporters refuse to join the open batch with other axes.
    """
    if exporting() == "onnx" and backend.backend() != "tensorflow":
        return True
    return static_length(x, axis) is None


def causal(x):
    """(c, c), whether the second step is not after the first; x is (..., c, d)."""
    steps = static_length(x, -2)
    if steps is None:
        return _compared(ops.greater_equal, _positions(x))
    return ops.convert_to_tensor(np.tril(np.ones((steps, steps), dtype="bool")))


def turned(x):
    """The transposed matrices."""
    return ops.swapaxes(x, -1, -2)


class _Products:
    """Of a known length. The blocks of all chunks are on axis 0, their steps on axis 1.

    A level has `before` of each second block and `after` of each first one.
    """

    def __init__(self, log_decay):
        size, width = log_decay.shape[-2:]
        before = ops.reshape(ops.exp(log_decay), (-1, 1, width))
        after, self.levels = ops.ones_like(before), []
        while before.shape[1] < size:
            (first, second), (rest, last) = _neighbours(before), _neighbours(after)
            self.levels.append((second, rest))
            before = ops.concatenate([first, second * first[:, -1:]], axis=1)
            after = ops.concatenate([rest * second[:, -1:], last], axis=1)
        self.before = ops.reshape(before, ops.shape(log_decay))
        self.after = ops.reshape(after, ops.shape(log_decay))

    def weights(self):
        shape = (*ops.shape(self.before)[:-1], self.before.shape[-2])
        ones = ops.reshape(ops.ones_like(self.before), (-1, 1, 1))
        return ops.reshape(_triangle(ones, self.levels), shape)

    def scores(self, q, k):
        shape = (*ops.shape(q)[:-1], q.shape[-2])
        scores = ops.reshape(ops.sum(q * k, axis=-1), (-1, 1, 1))
        return ops.reshape(_triangle(scores, self._decayed(q, k)), shape)

    def scores_gradient(self, q, k, by_scores):
        """Gradients in q and k, from the whole chunk down to single steps."""
        size = q.shape[-2]
        by_scores = ops.reshape(by_scores, (-1, size, size))
        by_q, by_k = ops.zeros_like(q), ops.zeros_like(k)
        pairs = reversed([*zip(self.levels, self._decayed(q, k), strict=True)])
        for (before, after), (q_second, k_first) in pairs:
            size = size // 2
            below = by_scores[:, size:, :size]
            by_second = ops.matmul(below, k_first) * before
            by_first = ops.matmul(turned(below), q_second) * after
            nothing = ops.zeros_like(by_first)
            by_q = by_q + _interleaved(nothing, by_second, ops.shape(q))
            by_k = by_k + _interleaved(by_first, nothing, ops.shape(k))
            halves = [by_scores[:, :size, :size], by_scores[:, size:, size:]]
            by_scores = ops.reshape(ops.stack(halves, axis=1), (-1, size, size))
        by_scores = ops.reshape(by_scores, (*ops.shape(q)[:-1], 1))
        return by_q + by_scores * k, by_k + by_scores * q

    def _decayed(self, q, k):
        """Each second block's q and each first one's k, from the border between."""
        for before, after in self.levels:
            size = before.shape[1]
            q_second = _neighbours(ops.reshape(q, (-1, size, q.shape[-1])))[1]
            k_first = _neighbours(ops.reshape(k, (-1, size, k.shape[-1])))[0]
            yield q_second * before, k_first * after


def _triangle(diagonal, levels):
    """Whole chunks, (m, c, c), from single steps and each level's pair (rows, columns).

    The second block of a pair meets the first one in rows times columns.
    """
    blocks = diagonal
    for rows, columns in levels:
        (first, second), columns = _neighbours(blocks), turned(columns)
        outer = rows.shape[-1] == 1
        below = rows * columns if outer else ops.matmul(rows, columns)
        above = ops.concatenate([first, ops.zeros_like(below)], axis=2)
        below = ops.concatenate([below, second], axis=2)
        blocks = ops.concatenate([above, below], axis=1)
    return blocks


def _neighbours(blocks):
    """(2 m, steps, d) -> the first and the second of each pair, (m, steps, d)."""
    pairs = ops.reshape(blocks, (-1, 2, *blocks.shape[1:]))
    return pairs[:, 0], pairs[:, 1]


def _interleaved(first, second, shape):
    """The inverse of `_neighbours`, in a shape of as many numbers."""
    return ops.reshape(ops.stack([first, second], axis=1), shape)


class _OpenProducts:
    """By the positions of the steps; up to `LONGEST` if their number is unknown.

    The time is not reshaped: the sums of g within a block are looked up at its last
    step, and a level is masked where the blocks of two steps are not neighbours.
    """

    def __init__(self, log_decay):
        position = _positions(log_decay)
        before, after = log_decay, ops.zeros_like(log_decay)
        self.same, self.levels = _compared(ops.equal, position), []
        for r in range(math.ceil(math.log2(static_length(log_decay, -2) or LONGEST))):
            block = ops.floor(position / 2.0**r)
            pair = ops.floor(block / 2.0)
            second = ops.expand_dims(block > 2.0 * pair, 1)
            crossed = ops.logical_and(second, ops.logical_not(turned(second)))
            crossed = ops.logical_and(crossed, _compared(ops.equal, pair))
            self.levels.append((crossed, ops.exp(before), ops.exp(after)))
            earlier = _looked_up(before, block * 2.0**r - 1.0, position)
            later = _looked_up(before, (block + 2.0) * 2.0**r - 1.0, position)
            exists = ops.expand_dims((block + 1.0) * 2.0**r <= position[-1], 1)
            exists = ops.logical_and(exists, ops.logical_not(second))
            before = before + ops.where(second, earlier, 0.0)
            after = after + ops.where(exists, later, 0.0)
        self.before, self.after = ops.exp(before), ops.exp(after)

    def scores(self, q, k):
        scores = ops.where(self.same, ops.matmul(q, turned(k)), 0.0)
        for crossed, before, after in self.levels:
            level = ops.matmul(q * before, turned(k * after))
            scores = scores + ops.where(crossed, level, 0.0)
        return scores


class _OpenSums:
    """By positions, for a single channel: few operations for an exporter.

    The sums of g have three parts, multiples of 1 and of 1/256 and a small rest. The
    first two are exact, and so are their differences.
    """

    def __init__(self, log_decay):
        rest, self.sums = ops.maximum(log_decay, LOWEST), []
        for grid in (1.0, 1 / 256):
            part = ops.floor(rest / grid + 0.5) * grid
            self.sums.append(ops.cumsum(part, axis=len(part.shape) - 2))
            rest = rest - part
        self.sums.append(ops.cumsum(rest, axis=len(rest.shape) - 2))
        self.before = ops.exp(sum(self.sums))
        self.after = ops.exp(sum(x[..., -1:, :] - x for x in self.sums))
        self.known = causal(log_decay)

    def weights(self):
        between = sum(x - turned(x) for x in self.sums)
        return ops.exp(ops.where(self.known, between, -1e30))


def _positions(x):
    return positions(x, len(x.shape) - 2)


def _compared(relation, position):
    """`relation` of every step, by rows, with every step, by columns."""
    return relation(ops.expand_dims(position, 1), ops.expand_dims(position, 0))


def _looked_up(x, position, known):
    """The steps of axis -2 at positions, the nearest known where there is none."""
    axis = len(x.shape) - 2  # a negative one does not export from PyTorch
    position = ops.cast(ops.minimum(ops.maximum(position, 0.0), known[-1]), "int32")
    return ops.moveaxis(ops.take(ops.moveaxis(x, axis, 0), position, axis=0), 0, axis)
