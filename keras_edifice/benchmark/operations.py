"""The operations over time that `keras-edifice bench ops` measures, and how.

Each case is a function (draw, length) -> (function of tensors, its arrays), for the
sizes that `draw` has. A case whose cost must grow in proportion to the length is
declared as `linear`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np

from keras_edifice.backends.peers import PEERS
from keras_edifice.backends.timing import forward_and_backward
from keras_edifice.benchmark.measure import in_turn, keep_freed_memory, seconds
from keras_edifice.benchmark.rows import OURS, row

LENGTHS = (512, 1024, 2048, 4096)
COMPARED_LENGTH = 1024
"""Where the independent implementations run too."""
GROWTH = 2.3
"""Cost of twice the length, at most, of an operation that is linear in it."""
PART = "forward and backward"
"""What is measured of an operation."""


@dataclass(frozen=True)
class Operation:
    """A case: its name, whether its cost is linear in the length, and its maker."""

    name: str
    linear: bool
    make: Callable


_operations: dict[str, Operation] = {}


def operation(name, linear=True):
    """Declares a case."""

    def register(make):
        _operations[name] = Operation(name, linear, make)
        return make

    return register


def operations(names=None) -> list[Operation]:
    """The cases in the order of the file.

    Raises:
        ValueError: one of `names` is no case.
    """
    for name in names or []:
        if name not in _operations:
            raise ValueError(
                f"unknown operation {name!r}; they are {', '.join(_operations)}"
            )
    return [o for o in _operations.values() if not names or o.name in names]


class Draw:
    """Random arrays of the sizes at hand, float32.

    Attributes:
        batch: examples.
        width: features of a step.
        heads: the width is divided among so many.
    """

    def __init__(self, batch=4, width=256, heads=4, seed=0):
        if width % heads:
            raise ValueError(
                f"width must be a multiple of the {heads} heads, received {width}"
            )
        self.batch, self.width, self.heads = batch, width, heads
        self._rng = np.random.default_rng(seed)

    def normal(self, *shape):
        """Standard normal, (batch, *shape)."""
        return self._rng.normal(size=(self.batch, *shape)).astype("float32")

    def uniform(self, low, high, *shape):
        """(batch, *shape)."""
        drawn = self._rng.uniform(low, high, size=(self.batch, *shape))
        return drawn.astype("float32")

    def per_head(self, length, count=1):
        """`count` arrays (batch, length, heads, width / heads)."""
        shape = (length, self.heads, self.width // self.heads)
        return [self.normal(*shape) for _ in range(count)]

    def unit_per_head(self, length):
        """The same, one array of vectors of length one: keys of the delta rule."""
        (x,) = self.per_head(length)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)


@operation("diagonal scan")
def _diagonal_scan(draw, length):
    from keras_edifice.ops.linear_scan import linear_scan

    shape = (length, draw.width)
    return linear_scan, [draw.uniform(0.5, 1.0, *shape), draw.normal(*shape)]


@operation("selective scan")
def _selective_scan(draw, length):
    from keras_edifice.ops.linear_scan import selective_scan

    shape, states = (length, draw.width), (length, 16)
    A = -np.tile(np.arange(1.0, 17.0, dtype="float32"), (draw.width, 1))
    dt = draw.uniform(0.001, 0.1, *shape)
    arrays = [draw.normal(*shape), dt, A, draw.normal(*states), draw.normal(*states)]
    return (lambda *x: selective_scan(*x)[0]), arrays


@operation("complex scan")
def _complex_scan(draw, length):
    from keras_edifice.ops.complex_scan import complex_linear_scan

    shape = (length, draw.width)
    radius, angle = draw.uniform(0.5, 1.0, *shape), draw.uniform(0.0, 3.0, *shape)
    decay = [radius * np.cos(angle), radius * np.sin(angle)]

    def scan(a, b, c, d):
        re, im = complex_linear_scan((a, b), (c, d))
        return re + im

    return scan, [*decay, draw.normal(*shape), draw.normal(*shape)]


@operation("linear attention")
def _linear_attention(draw, length):
    from keras_edifice.ops.linear_attention import linear_attention

    decay = np.log(draw.uniform(0.9, 1.0, length, draw.heads))
    return linear_attention, [*draw.per_head(length, 3), decay]


@operation("gated linear attention")
def _gated_linear_attention(draw, length):
    from keras_edifice.ops.linear_attention import linear_attention

    q, k, v = draw.per_head(length, 3)
    return linear_attention, [q, k, v, np.log(draw.uniform(0.9, 1.0, *q.shape[1:]))]


@operation("stabilized linear attention")
def _stabilized_linear_attention(draw, length):
    from keras_edifice.ops.linear_attention import stabilized_linear_attention

    forget = np.log(draw.uniform(0.9, 1.0, length, draw.heads))
    gates = [draw.normal(length, draw.heads), forget]
    return stabilized_linear_attention, [*draw.per_head(length, 3), *gates]


@operation("delta rule")
def _delta_rule(draw, length):
    from keras_edifice.ops.delta_rule import delta_rule

    (q, v), k = draw.per_head(length, 2), draw.unit_per_head(length)
    return delta_rule, [q, k, v, draw.uniform(0.1, 1.0, length, draw.heads)]


@operation("gated delta rule")
def _gated_delta_rule(draw, length):
    function, arrays = _delta_rule(draw, length)
    return function, [*arrays, np.log(draw.uniform(0.9, 1.0, length, draw.heads))]


@operation("diagonal plus low rank")
def _dplr(draw, length):
    from keras_edifice.ops.delta_rule import dplr

    (q, k, v), a = draw.per_head(length, 3), draw.unit_per_head(length)
    share = draw.uniform(0.1, 1.0, *a.shape[1:])
    decay = np.log(draw.uniform(0.6, 1.0, *a.shape[1:]))
    return dplr, [q, k, v, -a, a * share, decay]


@operation("long convolution")
def _long_conv(draw, length):
    from keras_edifice.ops.long_conv import long_conv

    kernel = draw.normal(length, draw.width)[0]
    return long_conv, [draw.normal(length, draw.width), kernel]


@operation("test-time training")
def _ttt(draw, length):
    from keras_edifice.ops.fast_weights import ttt_scan

    size = draw.width // draw.heads
    weights = 0.02 * draw.normal(draw.heads, size, size)[0]
    biases, ones = np.zeros((2, draw.heads, size), "float32")
    token_rate = (1.0 / np.arange(1.0, 17.0) / size).astype("float32")
    rate = draw.uniform(0.1, 1.0, length, draw.heads)

    def scan(q, k, v, rate, token_rate, weights, biases, gamma, beta):
        return ttt_scan(q, k, v, rate, token_rate, [weights], [biases], (gamma, beta))

    arrays = [rate, token_rate, weights, biases, ones + 1.0, ones]
    return scan, [*draw.per_head(length, 3), *arrays]


@operation("neural memory")
def _titans(draw, length):
    from keras_edifice.ops.fast_weights import titans_scan

    size = draw.width // draw.heads
    weights = 0.1 * draw.normal(draw.heads, size, size)[0]
    (q, v), k = draw.per_head(length, 2), draw.unit_per_head(length)
    bounds = ((0.001, 0.01), (0.0, 0.1), (0.1, 0.9))  # step size, forgetting, momentum
    gates = [draw.uniform(*pair, length, draw.heads) for pair in bounds]

    def scan(q, k, v, theta, alpha, eta, weights):
        return titans_scan(q, k, v, theta, alpha, eta, [weights])

    return scan, [q, k, v, *gates, weights]


@operation("blockwise attention", linear=False)
def _blockwise_attention(draw, length):
    from keras_edifice.ops.attention import blockwise_sdpa

    def attend(q, k, v):
        return blockwise_sdpa(q, k, v, causal=True)

    return attend, draw.per_head(length, 3)


def measure(
    names=None, lengths=LENGTHS, draw=None, peers=False, progress=print, least=0.5
):
    """Measures on the active backend, each operation at all lengths in turn.

    Args:
        names: of operations; None for all.
        lengths: of the sequences.
        draw: the sizes.
        peers: whether the independent implementations run too, where the backend is
            the one they are written for; `COMPARED_LENGTH` must be among the lengths.
        progress: called with a line for each measurement.
        least: seconds that are spent on each measurement at least.

    Returns:
        List of `Row`.
    """
    keep_freed_memory()
    draw, backend = draw or Draw(), keras.backend.backend()
    rows = []
    for case in operations(names):
        made = {length: case.make(draw, length) for length in lengths}
        runs = {n: forward_and_backward(*made[n]) for n in lengths}
        times = in_turn([runs[n].call for n in lengths], least, pause=0.0)
        times = dict(zip(lengths, times, strict=True))
        label = OURS.format(backend)
        for length, run in runs.items():
            peak, half = run.peak_bytes(), times.get(length / 2)
            rows.append(
                row(case.name, PART, label, length, times[length], peak, half=half)
            )
            progress(rows[-1].line())
        if not (peers and backend == "torch"):
            continue
        for label, peer in PEERS.get(case.name, {}).items():
            run = forward_and_backward(peer, made[COMPARED_LENGTH][1])
            spent = seconds(run.call, least)
            rows.append(
                row(case.name, PART, label, COMPARED_LENGTH, spent, run.peak_bytes())
            )
            progress(rows[-1].line())
    return rows
