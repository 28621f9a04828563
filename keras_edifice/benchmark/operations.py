"""The operations over time that `keras-edifice bench ops` measures, and how.

Each case is a function (draw, length) -> (function of tensors, its arrays), for the
sizes that `draw` has. A case whose cost must grow in proportion to the length is
declared as `linear`.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import keras
import numpy as np

from keras_edifice.backends.peers import PEERS
from keras_edifice.backends.timing import forward_and_backward
from keras_edifice.benchmark.measure import keep_freed_memory, seconds

LENGTHS = (512, 1024, 2048, 4096)
COMPARED_LENGTH = 1024
"""Where the independent implementations run too."""
GROWTH = 2.3
"""Cost of twice the length, at most, of an operation that is linear in it."""


@dataclass(frozen=True)
class Operation:
    """A case: its name, whether its cost is linear in the length, and its maker."""

    name: str
    linear: bool
    make: Callable


@dataclass(frozen=True)
class Row:
    """One measurement: forward and backward together.

    `milliseconds` is the median of the calls, `fastest` and `slowest` their range;
    `megabytes` the peak beyond the arguments, None where the backend does not tell.
    """

    operation: str
    implementation: str
    length: int
    milliseconds: float
    fastest: float
    slowest: float
    megabytes: float | None


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
    """Measures on the active backend.

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
        for length in lengths:
            function, arrays = case.make(draw, length)
            run = forward_and_backward(function, arrays)
            rows.append(
                _row(case.name, f"keras_edifice, {backend}", length, run, least)
            )
            progress(_line(rows[-1]))
            if not (peers and backend == "torch" and length == COMPARED_LENGTH):
                continue
            for label, peer in PEERS.get(case.name, {}).items():
                run = forward_and_backward(peer, arrays)
                rows.append(_row(case.name, label, length, run, least))
                progress(_line(rows[-1]))
    return rows


def _row(operation, implementation, length, run, least):
    times = [1000.0 * x for x in seconds(run.call, least)]
    peak = run.peak_bytes()
    megabytes = None if peak is None else peak / 2**20
    return Row(operation, implementation, length, *times, megabytes)


def _line(row):
    memory = "" if row.megabytes is None else f", {row.megabytes:.0f} MB"
    return (
        f"{row.operation}, length {row.length}: {row.implementation} "
        f"{row.milliseconds:.1f} ms{memory}"
    )


def measure_on(backend, arguments):
    """The rows of `keras-edifice bench ops` in a process under a backend.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, "-m", "keras_edifice", "bench", "ops", "--json"]
    command += ["--backend", backend, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"the measurements on {backend} ended with an error")
    return [Row(**row) for row in json.loads(done.stdout)]


def growth(rows) -> dict[tuple, dict[str, float]]:
    """(operation, implementation) -> the largest growth with twice the length.

    The values are those of "time" and, where it is known, of "memory".
    """
    found = {}
    for row in rows:
        key = row.operation, row.implementation
        for other in rows:
            if (other.operation, other.implementation) != key:
                continue
            if other.length != 2 * row.length:
                continue
            factors = found.setdefault(key, {})
            pairs = {"time": (row.fastest, other.fastest)}  # the least disturbed
            if row.megabytes and other.megabytes is not None:
                pairs["memory"] = (row.megabytes, other.megabytes)
            for name, (before, after) in pairs.items():
                factors[name] = max(factors.get(name, 0.0), after / before)
    return found


def to_json(rows) -> str:
    """The rows as JSON."""
    return json.dumps([asdict(row) for row in rows], indent=2)
