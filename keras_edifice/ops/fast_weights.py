"""Memories whose weights learn by gradient descent while a sequence is read.

    TTT:     W_t = W - τ_t Σ_{s<=t} η_s g_s,    y_t = q_t + LN(z(q_t; W_t))
    Titans:  S_t = η_t S_{t-1} - θ_t g_t,    W_t = (1 - α_t) W_{t-1} + S_t

Here g_s is the gradient of the loss of token s, its key against its value, at the
weights with which its chunk (mini-batch) began. Sun et al. 2024, Learning to (Learn at
Test Time), arXiv:2407.04620; Behrouz et al. 2025, Titans, arXiv:2501.00663.

Both are one operation. Inside a chunk every W_t is a combination of W and S at the
chunk's start and of the gradients g_s; one table holds its coefficients c. And the
gradient of a matrix is an outer product g_s = x_sᵀ e_s of what came into the layer and
of the error that came back, so that a query x is answered without making W_t:

    x W_t = c_W x W + c_S x S - Σ_s c_s (x·x_s) e_s                   (the dual form)

Only the chunks follow one another. The backward pass computes all that is inside a
chunk again, and keeps the states between chunks in two levels: as many as the root of
their number.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from keras import backend, ops, tree

from keras_edifice.backends.traits import COMPILES_LOOPS, EXPORTS_ERF
from keras_edifice.ops.gelu import gelu
from keras_edifice.ops.gradients import vjp
from keras_edifice.ops.linear_scan import linear_scan
from keras_edifice.ops.step_scan import step_scan
from keras_edifice.ops.tracing import exporting, static_length

ONE_LEVEL = 8
"""Number of chunks up to which the states between all of them are kept."""


def ttt_scan(
    q,
    k,
    v,
    rate,
    token_rate,
    weights,
    biases=None,
    norm=None,
    initial_state=None,
    return_state=False,
):
    """Test-time training: TTT-Linear with one matrix, TTT-MLP with two.

    The model z(x) = x W1 + b1, or GELU_tanh(x W1 + b1) W2 + b2, is trained so that
    x + LN(z(x)) gives v from k, by the loss ½‖k + LN(z(k)) - v‖². When a mini-batch
    ends, the next one begins with the weights of its last token.

    To ONNX an unknown length is written as a loop over tokens, from TensorFlow and
    JAX; PyTorch cannot.

    Args:
        q: (batch, time, heads, features), queries.
        k: the same shape, keys.
        v: the same shape, values.
        rate: (batch, time, heads), the factor of the step size η_ts that belongs to
            the token s that is learned.
        token_rate: (chunk,), the factor that belongs to the place t of the query in
            its mini-batch. As many as a mini-batch has tokens.
        weights: list of (heads, in, out), the initial matrices.
        biases: list of (heads, out), the initial biases; None for a model without.
        norm: (γ, β) of the layer norm, (heads, features) each. With None both the norm
            and the input added to it are left out: z(k) is to give v.
        initial_state: from `ttt_initial_state` or an earlier call, whose sequence goes
            on here; it replaces the initial weights.
        return_state: whether to give the state after the last token as well.

    Returns:
        (batch, time, heads, features) in the dtype of q, or that and the state.

    Raises:
        ValueError: PyTorch exports an unknown length.
    """
    state = initial_state
    if state is None:
        state = ttt_initial_state(weights, biases, ops.shape(q)[0])
    rule = _TTT(state, token_rate, norm)
    return _scan(rule, [q, k, v, rate], state, initial_state is None, return_state)


def ttt_step(q, k, v, rate, token_rate, state, norm=None):
    """One token of `ttt_scan`.

    Args:
        q: (batch, heads, features).
        k: the same shape.
        v: the same shape.
        rate: (batch, heads).
        token_rate: (chunk,).
        state: from `ttt_initial_state`, `ttt_scan` or the step before.
        norm: as in `ttt_scan`.

    Returns:
        (batch, heads, features) and the new state.
    """
    return _step(_TTT(state, token_rate, norm), [q, k, v, rate], state)


def ttt_initial_state(weights, biases, batch_size):
    """The state before the first token, of the arguments of `ttt_scan`.

    Returns:
        (parameters at the start of the mini-batch, Σ -rate_s g_s in it so far, number
        of its tokens so far). Parameters are a pair of lists, (batch, heads, in, out)
        for matrices and (batch, heads, 1, out) for biases; the number is (batch,).
    """
    start = _per_example(weights, biases or [], batch_size)
    return start, _zeros(start), ops.zeros((batch_size,), dtype="float32")


def titans_scan(
    q,
    k,
    v,
    theta,
    alpha,
    eta,
    weights,
    gain=None,
    chunk_size=16,
    initial_state=None,
    return_state=False,
):
    """Neural long-term memory: gradient descent with momentum and forgetting.

    The memory M is a perceptron of bias-free matrices with GELU between them, trained
    by the loss ‖M(k) - v‖², the sum over the features. With a gain γ it is
    x + LN(M(x)) (1 + γ), and γ is learned and forgotten as the matrices are.

    To ONNX an unknown length is written as a loop over tokens, from TensorFlow and
    JAX; PyTorch cannot.

    Args:
        q: (batch, time, heads, features), queries.
        k: the same shape, keys.
        v: the same shape, values.
        theta: (batch, time, heads), step sizes θ.
        alpha: the same shape, forgetting α, from 0 to 1 (forget all).
        eta: the same shape, momentum η, from 0 (none) to 1.
        weights: list of (heads, in, out), the initial matrices.
        gain: (heads, features), the initial γ; None for no norm and no residual.
        chunk_size: tokens whose gradients are taken at the same weights.
        initial_state: from `titans_initial_state` or an earlier call, whose sequence
            goes on here; it replaces the initial weights. Where its last part, the
            place in the chunk, is None, a chunk begins.
        return_state: whether to give the state after the last token as well.

    Returns:
        (batch, time, heads, features) in the dtype of q, or that and the state.

    Raises:
        ValueError: PyTorch exports an unknown length.
    """
    state = initial_state
    if state is None:
        state = titans_initial_state(weights, gain, ops.shape(q)[0])
    rule, inputs = _Titans(state, chunk_size), [q, k, v, theta, alpha, eta]
    return _scan(rule, inputs, state, initial_state is None, return_state)


def titans_step(q, k, v, theta, alpha, eta, state, chunk_size=16):
    """One token of `titans_scan`.

    Args:
        q: (batch, heads, features).
        k: the same shape.
        v: the same shape.
        theta: (batch, heads).
        alpha: the same shape.
        eta: the same shape.
        state: from `titans_initial_state`, `titans_scan` or the step before.
        chunk_size: as in `titans_scan`.

    Returns:
        (batch, heads, features) and the new state.
    """
    return _step(_Titans(state, chunk_size), [q, k, v, theta, alpha, eta], state)


def titans_initial_state(weights, gain, batch_size):
    """The state before the first token, of the arguments of `titans_scan`.

    Returns:
        (W, S, W at the start of the chunk, number of tokens in the chunk so far). The
        first three are a pair of lists, (batch, heads, in, out) for the matrices and,
        if there is a gain, (batch, heads, 1, features); the number is (batch,).
    """
    start = _per_example(weights, [] if gain is None else [gain], batch_size)
    return start, _zeros(start), start, ops.zeros((batch_size,), dtype="float32")


def _per_example(matrices, vectors, batch_size):
    """The pair of lists for each example; vectors become (batch, heads, 1, size)."""

    def broadcast(x):  # times one, as a custom gradient refuses variables
        x = ops.cast(x, "float32") * 1.0
        return ops.broadcast_to(x, (batch_size, *x.shape))

    vectors = [ops.expand_dims(x, 1) for x in vectors]
    return tree.map_structure(broadcast, (list(matrices), vectors))


def _zeros(parameters):
    return tree.map_structure(ops.zeros_like, parameters)


@dataclass(frozen=True)
class _Memory:
    """The model that learns. Its parameters are matrices, then vectors.

    Attributes:
        depth: number of matrices, with a GELU between them.
        biased: whether the vectors are biases, one of each matrix.
        gained: whether the one vector is γ, the gain of the norm less one.
        normed: whether the output is x + LN(z(x)), else z(x).
        gelu: function giving the value and the slope.
        epsilon: of the norm.
    """

    depth: int
    biased: bool
    gained: bool
    normed: bool
    gelu: Callable
    epsilon: float


class _TTT:
    """How TTT combines. A state has the parts W and S = -Σ rate_s g_s.

    Attributes:
        parts: how many of them a sequence of its own needs, and any other. Of the
            first, each chunk begins with S = 0.
    """

    parts = 1, 2

    def __init__(self, state, token_rate, norm):
        matrices, biases = state[0]
        self.memory = _Memory(
            len(matrices), bool(biases), False, norm is not None, _gelu_tanh, 1e-6
        )
        self.token_rate = ops.cast(token_rate, "float32")
        self.chunk_size = token_rate.shape[0]
        self.norm = [
            ops.expand_dims(ops.cast(x, "float32") * 1.0, 1) for x in norm or []
        ]  # (h, 1, d) each

    def table(self, rates, valid, complete):
        """Coefficients (n, b, h, c + 2, c + 2); see `_chunk`.

        Args:
            rates: list of rates (n, b, h, c).
            valid: (n, b or 1, 1, c), zero where there is no token.
            complete: (n, b or 1, 1, 1), zero if the mini-batch goes on.
        """
        return _ttt_table(rates[0] * valid, self.token_rate, complete)

    def token_table(self, rates, position, complete):
        """The same of chunks of one token: rates [(1, b, h, 1)]."""
        place = ops.arange(0, self.chunk_size, dtype="float32")
        here = ops.cast(place == ops.expand_dims(position, 1), "float32")
        token_rate = ops.sum(here * self.token_rate, axis=1)
        return _ttt_table(rates[0], ops.reshape(token_rate, (-1, 1, 1)), complete)


def _ttt_table(rate, token_rate, complete):
    """W_t = W + τ_t S - τ_t Σ rate_s g_s, and what the next mini-batch begins with."""
    size, one = rate.shape[-1], ops.ones_like(rate[..., :1])
    token_rate = ops.ones_like(rate) * token_rate
    until = ops.convert_to_tensor(np.tri(size, dtype="float32"))
    gradients = ops.expand_dims(token_rate, -1) * ops.expand_dims(rate, -2) * until
    starts = ops.stack([ops.ones_like(rate), token_rate], axis=-1)
    tokens = ops.concatenate([starts, gradients], axis=-1)
    last, goes_on = complete * token_rate[..., -1:], one - complete
    weights = ops.concatenate([one, last, last * rate], axis=-1)
    sums = ops.concatenate([0.0 * one, goes_on, goes_on * rate], axis=-1)
    return ops.concatenate([tokens, ops.stack([weights, sums], axis=-2)], axis=-2)


class _Titans:
    """How Titans combines. A state has the parts W, S and W at the chunk's start.

    Attributes:
        parts: how many of them a sequence of its own needs, and any other. Of the
            first, each chunk begins with the W at its start.
    """

    parts = 2, 3

    def __init__(self, state, chunk_size):
        matrices, gain = state[0]
        learned = bool(gain)
        self.memory = _Memory(len(matrices), False, learned, learned, _gelu_exact, 1e-5)
        self.chunk_size, self.norm = chunk_size, []

    def table(self, rates, valid, complete):
        """Coefficients (n, b, h, c + 2, c + 2); arguments as those of `_TTT.table`.

        Two scans sum the products of decays, as ratios of products would not hold
        where α is one or η is zero.
        """
        theta, alpha, eta = rates
        size, valid = theta.shape[-1], ops.ones_like(theta) * valid
        theta = 2.0 * theta * valid  # ∂‖M(k) - v‖² / ∂M = 2 (M(k) - v)
        keep = 1.0 - alpha * valid
        eta = 1.0 - (1.0 - eta) * valid
        theta, keep, eta, valid = (
            ops.expand_dims(ops.transpose(x, (0, 3, 1, 2)), -1)
            for x in (theta, keep, eta, valid)
        )  # (n, c, b, h, 1)
        own = np.eye(size, dtype="float32").reshape(size, 1, 1, size)
        theta = theta * ops.convert_to_tensor(own)
        zero = ops.zeros_like(keep)
        # S_t from [S, g_1 ... g_c], then W_t from [W, S, g_1 ... g_c].
        momentum = _from_first(eta, ops.concatenate([zero, theta], axis=-1))
        added = ops.concatenate([zero, momentum * valid], axis=-1)
        weights = _from_first(keep, added)
        last = ops.concatenate([zero[:, -1:], momentum[:, -1:]], axis=-1)
        table = ops.concatenate([weights, weights[:, -1:], last], axis=1)
        return ops.transpose(table, (0, 2, 3, 1, 4))

    def token_table(self, rates, position, complete):
        """The same of chunks of one token: rates [(1, b, h, 1)]."""
        return self.table(rates, 1.0, complete)


def _from_first(decay, inputs):
    """x_t = decay_t x_{t-1} + inputs_t over axis 1, from x_0 = [1, 0 ... 0]."""
    zero = ops.zeros_like(inputs[:, 0])
    start = ops.concatenate([zero[..., :1] + 1.0, zero[..., 1:]], axis=-1)
    return linear_scan(decay * ops.ones_like(inputs), inputs, start)


def _gelu_tanh(x):
    """Value and slope of x (1 + tanh u) / 2, u = √(2/π) (x + 0.044715 x³)."""
    root, square = math.sqrt(2.0 / math.pi), x * x
    tanh = ops.tanh(root * x * (1.0 + 0.044715 * square))
    half = 0.5 * (1.0 + tanh)
    inner = root * (1.0 + 3.0 * 0.044715 * square)
    return x * half, half + 0.5 * x * (1.0 - tanh * tanh) * inner


def _gelu_exact(x):
    """Value and slope of x Φ(x), with the normal distribution function Φ."""
    density = ops.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    if EXPORTS_ERF or not exporting():
        below = 0.5 * (1.0 + ops.erf(x * math.sqrt(0.5)))
        return x * below, below + x * density
    value, tiny = gelu(x), ops.abs(x) < 1e-6
    below = ops.where(tiny, 0.5, value / ops.where(tiny, 1.0, x))
    return value, below + x * density


def _chunk(memory, parts, state, chunk, norm):
    """One chunk: reads all its queries and learns all its keys.

    Args:
        memory: the model.
        parts: number of groups of parameters in the state: W, then S (if missing,
            zero), then the weights at which gradients are taken (if missing, W).
        state: list of parameters, group after group.
        chunk: list of q, k and what z(k) is to give, (b, h, c, d) each; of the table
            (b, h, c + 2, c + 2), whose row t < c holds the coefficients of W, S and
            g_0 ... g_{c-1} in W_t, and whose last two rows hold those in the next W
            and S; and of (b or 1, 1, 1, 1), one if the chunk is complete.
        norm: list of γ and β that do not learn, or empty.

    Returns:
        (the next state, the outputs (b, h, c, d)).
    """
    q, k, target, table, complete = chunk
    count = len(state) // parts
    weights = state[:count]
    steps = state[count : 2 * count] or [None] * count
    anchors = state[2 * count :] or weights
    factors = _gradients(memory, anchors, k, target, norm)
    outputs = _read(memory, weights, steps, factors, q, table[:, :, :-2], norm)

    def combined(row):
        every = zip(weights, steps, factors, strict=True)
        return [_combined(row, *x) for x in every]

    new = combined(table[:, :, -2:-1])
    after = list(new)
    if parts > 1:
        after += combined(table[:, :, -1:])
    if parts > 2:
        after += [a + complete * (w - a) for w, a in zip(new, anchors, strict=True)]
    return after, outputs


def _gradients(memory, weights, k, target, norm):
    """Gradients of the loss ½‖z(k) - target‖² of each token, by backpropagation.

    Returns:
        list of (x, e) for each matrix, with the gradient x_sᵀ e_s of token s, and
        (None, g) for each vector.
    """
    depth, x, slopes = memory.depth, [k], []
    for layer in range(depth):
        z = ops.matmul(x[-1], weights[layer])
        if memory.biased:
            z = z + weights[depth + layer]
        if layer < depth - 1:
            value, slope = memory.gelu(z)
            x.append(value)
            slopes.append(slope)
    vectors, error = [], z - target
    if memory.normed:
        normal, scale = _standardized(z, memory.epsilon)
        gain, bias = (1.0 + weights[-1], 0.0) if memory.gained else norm
        error = normal * gain + bias - target
        if memory.gained:
            vectors = [(None, error * normal)]
        error = _through_norm(error * gain, normal, scale)
    errors = [error]
    for layer in range(depth - 1, 0, -1):
        error = ops.matmul(error, _transposed(weights[layer])) * slopes[layer - 1]
        errors.insert(0, error)
    if memory.biased:
        vectors = [(None, error) for error in errors]
    return [*zip(x, errors, strict=True), *vectors]


def _read(memory, weights, steps, factors, q, rows, norm):
    """Outputs of the queries, each at its own weights: rows (b, h, c, c + 2)."""
    depth, x = memory.depth, q
    for layer in range(depth):
        keys, errors = factors[layer]
        near = ops.matmul(x, _transposed(keys))  # (b, h, c, c)
        z = rows[..., :1] * ops.matmul(x, weights[layer])
        if steps[layer] is not None:
            z = z + rows[..., 1:2] * ops.matmul(x, steps[layer])
        if memory.biased:  # a bias is the matrix of an input that is always one
            near = near + 1.0
            z = z + _from_start(rows, weights[depth + layer], steps[depth + layer])
        z = z - ops.matmul(rows[..., 2:] * near, errors)
        x = memory.gelu(z)[0] if layer < depth - 1 else z
    if not memory.normed:
        return x
    gain, bias = norm or (None, 0.0)
    if memory.gained:
        gain = 1.0 + _combined(rows, weights[-1], steps[-1], factors[-1])
    return q + _standardized(x, memory.epsilon)[0] * gain + bias


def _combined(row, weight, step, factor):
    """c_W W + c_S S - Σ c_s g_s: of a matrix for one row, of a vector for any."""
    x, errors = factor
    value, coefficients = _from_start(row, weight, step), row[..., 2:]
    if x is not None:
        coefficients = _transposed(x) * coefficients
    return value - ops.matmul(coefficients, errors)


def _from_start(row, weight, step):
    """c_W W + c_S S."""
    value = row[..., :1] * weight
    return value if step is None else value + row[..., 1:2] * step


def _standardized(z, epsilon):
    """The norm (z - mean) / deviation, and one over the deviation."""
    z = z - ops.mean(z, axis=-1, keepdims=True)
    scale = ops.rsqrt(ops.mean(z * z, axis=-1, keepdims=True) + epsilon)
    return z * scale, scale


def _through_norm(error, normal, scale):
    """The gradient before a norm, from that after it."""
    mean = ops.mean(error, axis=-1, keepdims=True)
    along = ops.mean(error * normal, axis=-1, keepdims=True)
    return (error - mean - normal * along) * scale


def _transposed(x):
    return ops.swapaxes(x, -1, -2)


def _step(rule, inputs, state):
    """One token, as a chunk of one."""
    *parts, position = state
    q, k, v, *rates = [ops.expand_dims(ops.cast(x, "float32"), 2) for x in inputs]
    complete = ops.cast(position == rule.chunk_size - 1.0, "float32")
    complete = ops.reshape(complete, (-1, 1, 1))
    rates = [ops.expand_dims(x, 0) for x in rates]
    table = rule.token_table(rates, position, complete)[0]
    target = v - k if rule.memory.normed else v
    chunk = [q, k, target, table, ops.expand_dims(complete, -1)]
    new, y = _chunk(rule.memory, len(parts), tree.flatten(parts), chunk, rule.norm)
    position = (position + 1.0) * (1.0 - complete[:, 0, 0])
    state = *tree.pack_sequence_as(parts, new), position
    return ops.cast(y[:, :, 0], inputs[0].dtype), state


def _scan(rule, inputs, state, fresh, return_state):
    """A sequence; `fresh` says that the state is that before the first token."""
    dtype = inputs[0].dtype
    inputs = [ops.cast(x, "float32") for x in inputs]
    if _goes_by_token(inputs[0]):
        y, state = _by_token(rule, inputs, state)
    else:
        parts = rule.parts[0 if fresh and not return_state else 1]
        y, state = _by_chunk(rule, inputs, state, parts, fresh)
    y = ops.cast(y, dtype)
    return (y, state) if return_state else y


def _by_chunk(rule, inputs, state, parts, fresh):
    """The sequence as a loop over chunks, with the first parts of the state."""
    cut = _Cut(inputs[0], rule.chunk_size, None if fresh else state[-1])
    q, k, v, *rates = [cut.split(x) for x in inputs]
    table = rule.table(rates, cut.valid, cut.complete)
    target = v - k if rule.memory.normed else v
    chunks = [q, k, target, table, ops.expand_dims(cut.complete, -1)]

    def step(state, chunk, norm):
        return _chunk(rule.memory, parts, state, chunk, norm)

    before = state[:parts]
    after, y = _over_chunks(step, tree.flatten(before), chunks, rule.norm, cut.groups)
    return cut.join(y), (*tree.pack_sequence_as(before, after), cut.position)


def _groups(count):
    """About √count groups, if possible so many that they divide it without padding."""
    root = math.isqrt(count - 1) + 1
    return next((n for n in range(root, 2 * root) if count % n == 0), root)


class _Cut:
    """How a sequence is cut into chunks, the first of which may be under way.

    Attributes:
        groups: number of groups of chunks whose states are kept together.
        valid: (chunks, b or 1, 1, c), one for the places that have a token.
        complete: (chunks, b or 1, 1, 1), one for the chunks that end.
        position: (b,), number of tokens in the chunk that is under way at the end.
    """

    def __init__(self, x, size, position):
        length = static_length(x)
        start = ops.zeros_like(x[:, 0, 0, 0]) if position is None else position
        self.shifted = position is not None or length is None
        self.size, self.length = size, length or ops.shape(x)[1]
        reach = self.length + (size - 1 if self.shifted else 0)
        self.count, self.groups = (reach + size - 1) // size, 1
        if length and self.count > ONE_LEVEL and exporting() != "onnx":
            self.groups = _groups(self.count)
            self.count = -(-self.count // self.groups) * self.groups
        place = ops.arange(0, self.count * size, dtype="int32")
        place = ops.expand_dims(ops.cast(place, "float32"), 0)
        if self.shifted:
            place = place - ops.expand_dims(start, 1)
        self.place, end = place, ops.cast(self.length, "float32")  # (b or 1, t)
        self.shift = ops.expand_dims(start, 1)
        valid = ops.cast(ops.logical_and(place >= 0.0, place < end), "float32")
        self.valid = self._chunked(ops.expand_dims(valid, 2))
        last = self._chunked(ops.expand_dims(place, 2))[..., -1:]
        self.complete = ops.cast(last < end, "float32")
        self.position = start + end - size * ops.floor((start + end) / size)

    def split(self, x):
        """(b, t, h, ...) -> (chunks, b, h, c, ...)."""
        if self.shifted:
            end = ops.cast(self.length - 1, "float32")
            return self._chunked(_taken(x, ops.clip(self.place, 0.0, end)))
        padding = self.count * self.size - self.length
        if padding:
            x = ops.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (len(x.shape) - 2))
        return self._chunked(x)

    def _chunked(self, x):
        x = ops.reshape(x, (-1, self.count, self.size, *x.shape[2:]))
        return ops.transpose(x, (1, 0, 3, 2, 4)[: len(x.shape)])

    def join(self, y):
        """(b, chunks, h, c, d) -> (b, t, h, d)."""
        y = ops.transpose(y, (0, 1, 3, 2, 4))
        y = ops.reshape(y, (-1, self.count * self.size, *y.shape[3:]))
        if not self.shifted:
            return y[:, : self.length]
        place = ops.arange(0, self.length, dtype="int32")
        return _taken(y, ops.expand_dims(ops.cast(place, "float32"), 0) + self.shift)


def _taken(x, places):
    """The entries of x (b, t, ...) at the places (b, n) of each example."""
    places = ops.cast(places, "int32")
    for _ in x.shape[2:]:
        places = ops.expand_dims(places, -1)
    return ops.take_along_axis(x, places, axis=1)


def _goes_by_token(q):
    """Whether a loop over chunks would not export."""
    if static_length(q) is not None or not exporting():
        return False
    if not COMPILES_LOOPS:
        raise ValueError(
            "PyTorch exports a memory that learns for a fixed length only, received "
            "an unknown one; fix it, or export from TensorFlow or JAX"
        )
    return exporting() == "onnx" or backend.backend() == "jax"


def _by_token(rule, inputs, state):
    """The sequence as a loop over tokens, in a form that exports at any length."""
    inputs = [x if len(x.shape) == 4 else ops.expand_dims(x, 3) for x in inputs]
    heads, ends = inputs[0].shape[2], np.cumsum([x.shape[3] for x in inputs]).tolist()
    shapes = [x.shape[1:] for x in tree.flatten(state)]

    def unflattened(leaves):
        pairs = zip(leaves, shapes, strict=True)
        leaves = [ops.reshape(x, (-1, *shape)) for x, shape in pairs]
        return tree.pack_sequence_as(state, leaves)

    def token(x, leaves):
        x = ops.reshape(x, (-1, heads, ends[-1]))
        q, k, v, *rates = (
            x[..., i:j] for i, j in zip([0, *ends[:-1]], ends, strict=True)
        )
        rates = [x[..., 0] for x in rates]
        y, new = _step(rule, [q, k, v, *rates], unflattened(leaves))
        return ops.reshape(y, (-1, heads * y.shape[2])), _flattened(tree.flatten(new))

    x = ops.concatenate(inputs, axis=3)
    x = ops.reshape(x, (*ops.shape(x)[:2], heads * ends[-1]))
    y, leaves = step_scan(token, x, _flattened(tree.flatten(state)))
    y = ops.reshape(y, (*ops.shape(y)[:2], heads, inputs[2].shape[3]))
    return y, unflattened(leaves)


def _flattened(leaves):
    """(b, ...) -> (b, size) each."""
    return [ops.reshape(x, (-1, math.prod(x.shape[1:]))) for x in leaves]


def _over_chunks(step, state, chunks, shared, groups):
    """Runs step(state, chunk, shared) -> (state, output) over axis 0 of `chunks`.

    Args:
        step: the function, its outputs shaped as its third input, chunks[2][i].
        state: list of tensors.
        chunks: list of tensors.
        shared: list of tensors.
        groups: number of groups of chunks; the backward pass keeps the states at the
            start of each group, and then those at the start of each chunk of a group.

    Returns:
        (the last state, the outputs, (b, chunks, ...)).
    """
    if exporting() == "onnx":
        outputs = []
        for i in range(chunks[0].shape[0]):
            state, y = step(state, [z[i] for z in chunks], shared)
            outputs.append(y)
        return state, ops.stack(outputs, axis=1)
    if groups == 1:
        return _recomputed(step, state, chunks, shared, ops.zeros_like(chunks[2][0]))

    def group(state, chunks, shared):
        like = ops.zeros_like(chunks[2][0])
        return _recomputed(step, state, chunks, shared, like)

    count = chunks[0].shape[0]
    chunks = [
        ops.reshape(z, (groups, count // groups, *ops.shape(z)[1:])) for z in chunks
    ]
    like = ops.zeros_like(ops.swapaxes(chunks[2][0], 0, 1))
    last, y = _recomputed(group, state, chunks, shared, like)
    return last, ops.reshape(y, (-1, count, *y.shape[3:]))


def _recomputed(step, state, chunks, shared, like):
    """`_over_chunks` of which the backward pass keeps the states alone."""
    counts = len(state), len(state) + len(chunks)
    count = static_length(chunks[0], 0)

    def parted(flat):
        return flat[: counts[0]], flat[counts[0] : counts[1]], flat[counts[1] :]

    @ops.custom_gradient
    def run(*arguments):
        state, chunks, shared = parted(arguments)

        def forward(state, chunk):
            new, y = step(state, chunk, shared)
            return new, [*state, y]

        last, (*before, y) = _loop(forward, state, chunks, [*state, like])

        def gradient(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream
            by_last, by_y = _unpacked(upstream, state, count, like)
            by_y = ops.swapaxes(by_y, 0, 1)

            def backward(carry, chunk):
                adjoint, by_shared = carry[: counts[0]], carry[counts[0] :]
                *flat, by_y = chunk
                cotangents = [*adjoint, by_y]

                def value(*flat):
                    new, y = step(*parted(flat))
                    pairs = zip([*new, y], cotangents, strict=True)
                    return sum(ops.sum(a * b) for a, b in pairs)

                one = ops.ones((), dtype="float32")
                found = vjp(value, [*flat, *shared], one)[1]
                adjoint, by_chunk, more = parted(found)
                more = [a + b for a, b in zip(by_shared, more, strict=True)]
                return [*adjoint, *more], by_chunk

            carry = [*by_last, *(ops.zeros_like(x) for x in shared)]
            inputs = [*before, *chunks, by_y]
            extra = [ops.zeros_like(x[0]) for x in chunks]
            carry, by_chunks = _loop(backward, carry, inputs, extra, reverse=True)
            by_state, by_shared = carry[: counts[0]], carry[counts[0] :]
            return (*by_state, *by_chunks, *by_shared)

        return _packed(last, y), gradient

    packed = run(*state, *chunks, *shared)
    return _unpacked(packed, state, count, like)


def _loop(step, state, chunks, extra, reverse=False):
    """Loops step(state, chunk) -> (state, outputs) over axis 0 of `chunks`.

    Args:
        step: the function.
        state: list of tensors.
        chunks: list of tensors.
        extra: list of tensors of the shapes of the outputs.
        reverse: whether to begin with the last chunk.

    Returns:
        (the last state, the outputs, those of each chunk on axis 0).
    """
    if not COMPILES_LOOPS:
        order = range(chunks[0].shape[0])[:: -1 if reverse else 1]
        outputs = [None] * len(order)
        for i in order:
            state, outputs[i] = step(state, [z[i] for z in chunks])
        return state, [ops.stack(z) for z in zip(*outputs, strict=True)]

    count = len(state)

    def body(carry, i):  # by number: TensorFlow cannot scan two of unknown length
        after, outputs = step(carry[:count], [z[i] for z in chunks])
        return [*after, *outputs], [*after, *outputs]  # and wants both to be alike

    numbers = ops.arange(0, ops.shape(chunks[0])[0], dtype="int32")
    carry, outputs = ops.scan(body, [*state, *extra], numbers, reverse=reverse)
    return carry[:count], outputs[count:]


def _packed(state, y):
    """One tensor (b, size), for a custom gradient has a single output."""
    y = ops.swapaxes(y, 0, 1)
    y = ops.reshape(y, (ops.shape(y)[0], -1))
    return ops.concatenate([*_flattened(state), y], axis=1)


def _unpacked(packed, state, count, like):
    """Tensors of the shapes of the state, and outputs (b, count, ...)."""
    parts, start = [], 0
    for x in state:
        end = start + math.prod(x.shape[1:])
        parts.append(ops.reshape(packed[:, start:end], (-1, *x.shape[1:])))
        start = end
    sizes = (-1, count) if count else (ops.shape(packed)[0], -1)
    return parts, ops.reshape(packed[:, start:], (*sizes, *like.shape[1:]))
