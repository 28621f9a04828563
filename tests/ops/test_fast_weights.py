import functools
import math

import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.exporting import export
from keras_edifice.ops import fast_weights as module
from keras_edifice.ops.fast_weights import (
    titans_scan,
    titans_step,
    ttt_initial_state,
    ttt_scan,
    ttt_step,
)
from keras_edifice.ops.tracing import export_scope
from tests.support.applied import gradients_in_all
from tests.support.close import assert_close, to_numpy
from tests.support.compiled import compiled
from tests.support.numerical import numerical_gradient

rng = np.random.default_rng(0)


# The equations, token by token, one head at a time. No gradient is derived: each is
# taken numerically from the loss, by a step along the imaginary axis.
STEP = 1e-30


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_exact(x):
    y = x / math.sqrt(2)
    slope = 2 / math.sqrt(math.pi) * np.exp(-(y.real**2))
    return 0.5 * x * (1 + np.vectorize(math.erf)(y.real) + 1j * slope * y.imag)


def layer_norm(z, epsilon):
    z = z - z.mean()
    return z / np.sqrt((z * z).mean() + epsilon)


def perceptron(x, matrices, biases, gelu):
    for i, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
        x = (gelu(x) if i else x) @ matrix + bias
    return x


def ttt_output(x, parameters, depth, norm):
    biases = parameters[depth:] or [0.0] * depth
    z = perceptron(x, parameters[:depth], biases, gelu_tanh)
    return z if norm is None else x + layer_norm(z, 1e-6) * norm[0] + norm[1]


def titans_output(x, parameters, depth):
    z = perceptron(x, parameters[:depth], [0.0] * depth, gelu_exact)
    if len(parameters) == depth:
        return z
    return x + layer_norm(z, 1e-5) * (1 + parameters[depth])


def gradient_of(loss, parameters):
    """Of loss(parameters) in each of them; no difference is taken, so no digit lost."""
    found = [np.zeros_like(x) for x in parameters]
    for i, x in enumerate(parameters):
        for index in np.ndindex(x.shape):
            moved = x.astype("complex128")
            moved[index] += 1j * STEP
            value = loss([*parameters[:i], moved, *parameters[i + 1 :]])
            found[i][index] = value.imag / STEP
    return found


def ttt_head(q, k, v, rate, token_rate, parameters, depth, norm):
    outputs, start, position = [], parameters, 0
    total = [np.zeros_like(x) for x in parameters]
    for q_t, k_t, v_t, rate_t in zip(q, k, v, rate, strict=True):

        def loss(parameters, k_t=k_t, v_t=v_t):
            return 0.5 * ((ttt_output(k_t, parameters, depth, norm) - v_t) ** 2).sum()

        found = gradient_of(loss, start)
        total = [a + rate_t * g for a, g in zip(total, found, strict=True)]
        now = [x - token_rate[position] * a for x, a in zip(start, total, strict=True)]
        outputs.append(ttt_output(q_t, now, depth, norm).real)
        position += 1
        if position == len(token_rate):
            start, position = now, 0
            total = [np.zeros_like(x) for x in parameters]
    return np.stack(outputs)


def titans_head(q, k, v, theta, alpha, eta, parameters, depth, chunk_size):
    outputs, now = [], parameters
    surprise = [np.zeros_like(x) for x in parameters]
    for t, (q_t, k_t, v_t) in enumerate(zip(q, k, v, strict=True)):
        start = now if t % chunk_size == 0 else start  # noqa: F821, set at t = 0

        def loss(parameters, k_t=k_t, v_t=v_t):
            return ((titans_output(k_t, parameters, depth) - v_t) ** 2).sum()

        found = gradient_of(loss, start)
        pairs = zip(surprise, found, strict=True)
        surprise = [eta[t] * s - theta[t] * g for s, g in pairs]
        now = [(1 - alpha[t]) * x + s for x, s in zip(now, surprise, strict=True)]
        outputs.append(titans_output(q_t, now, depth).real)
    return np.stack(outputs)


def of_heads(function, sequences, parameters):
    """(batch, time, heads, ...) from a function of one head's sequences."""
    sequences = [np.asarray(x, "float64") for x in sequences]
    parameters = [np.asarray(x, "float64") for x in parameters]
    batch, _, heads = sequences[0].shape[:3]
    rows = [
        [
            function(*(x[i, :, j] for x in sequences), [x[j] for x in parameters], j)
            for j in range(heads)
        ]
        for i in range(batch)
    ]
    return np.stack([np.stack(row, axis=1) for row in rows])


def ttt_reference(q, k, v, rate, token_rate, weights, biases=None, norm=None):
    def head(q, k, v, rate, parameters, j):
        own = None if norm is None else [np.asarray(x[j], "float64") for x in norm]
        steps = np.asarray(token_rate, "float64")
        return ttt_head(q, k, v, rate, steps, parameters, len(weights), own)

    return of_heads(head, [q, k, v, rate], [*weights, *(biases or [])])


def titans_reference(q, k, v, theta, alpha, eta, weights, gain=None, chunk_size=16):
    def head(q, k, v, theta, alpha, eta, parameters, _):
        depth = len(weights)
        return titans_head(q, k, v, theta, alpha, eta, parameters, depth, chunk_size)

    parameters = [*weights, *([] if gain is None else [gain])]
    return of_heads(head, [q, k, v, theta, alpha, eta], parameters)


def normal(*shape, scale=1.0):
    return (scale * rng.normal(size=shape)).astype("float32")


def unit(*shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype("float32")


def uniform(*shape, low=0.0, high=1.0):
    return rng.uniform(low, high, size=shape).astype("float32")


def matrices(depth, heads, features):
    sizes = [features, *[features + 2] * (depth - 1), features]
    pairs = zip(sizes, sizes[1:], strict=False)
    return [normal(heads, i, o, scale=0.8) for i, o in pairs]


def ttt_arguments(length, depth=2, chunk=3, batch=2, heads=2, features=4):
    q, k, v = normal(3, batch, length, heads, features)
    rate = uniform(batch, length, heads, high=0.2)
    token_rate = (1 / np.arange(1, chunk + 1)).astype("float32")
    weights = matrices(depth, heads, features)
    biases = [normal(heads, x.shape[-1], scale=0.3) for x in weights]
    norm = 1 + normal(heads, features, scale=0.3), normal(heads, features, scale=0.3)
    return q, k, v, rate, token_rate, weights, biases, norm


def titans_arguments(length, depth=2, gained=True, batch=2, heads=2, features=4):
    q, k = unit(2, batch, length, heads, features)
    v = normal(batch, length, heads, features)
    theta = uniform(batch, length, heads, high=0.1)
    alpha = uniform(batch, length, heads, high=0.1)
    eta = uniform(batch, length, heads)
    gain = normal(heads, features, scale=0.3) if gained else None
    return q, k, v, theta, alpha, eta, matrices(depth, heads, features), gain


def tensors(arguments):
    def convert(x):
        return None if x is None else ops.convert_to_tensor(x)

    return keras.tree.map_structure(convert, arguments)


def run(function, arguments, **options):
    """The function of arrays, compiled."""
    return compiled(functools.partial(function, **options))(*tensors(arguments))


def at(place, arguments):
    """The arguments with their sequences at a place: a slice, or one token."""
    return [
        x[:, place] if hasattr(x, "shape") and len(x.shape) > 2 else x
        for x in arguments
    ]


@pytest.mark.parametrize(
    ("depth", "length", "chunk"), [(1, 1, 3), (1, 7, 3), (2, 8, 3), (2, 4, 1)]
)
def test_ttt_is_gradient_descent_in_mini_batches(depth, length, chunk):
    arguments = ttt_arguments(length, depth, chunk)
    assert_close(run(ttt_scan, arguments), ttt_reference(*arguments))


@pytest.mark.parametrize(
    ("depth", "gained", "length", "chunk"),
    [(1, False, 7, 3), (2, True, 8, 4), (3, True, 1, 16)],
)
def test_titans_is_descent_with_momentum_and_forgetting(depth, gained, length, chunk):
    arguments = titans_arguments(length, depth, gained)
    alpha, eta = arguments[4:6]
    alpha[0, 1:2], alpha[:, 2:3], alpha[1, 5:6] = 0.0, 0.0, 1.0  # saturated gates
    eta[0, 1:2], eta[1, 2:4] = 0.0, 1.0
    actual = run(titans_scan, arguments, chunk_size=chunk)
    assert_close(actual, titans_reference(*arguments, chunk))


def delta_rule(q, k, v, beta, weights):
    """W_t = W_{t-1} + β_t k_tᵀ (v_t - k_t W_{t-1}), read by q_t; in float64."""
    q, k, v, beta = (np.asarray(x, "float64") for x in (q, k, v, beta))
    state, outputs = np.repeat(weights[None].astype("float64"), len(q), axis=0), []
    for t in range(q.shape[1]):
        error = v[:, t] - np.einsum("bhk,bhkv->bhv", k[:, t], state)
        update = np.einsum("bhk,bhv->bhkv", k[:, t], error)
        state = state + beta[:, t, :, None, None] * update
        outputs.append(np.einsum("bhk,bhkv->bhv", q[:, t], state))
    return np.stack(outputs, axis=1)


def test_without_norm_and_bias_ttt_token_by_token_is_the_delta_rule():
    q, k, v, rate, _, weights, _, _ = ttt_arguments(7, depth=1)
    arguments = q, k, v, rate, np.ones(1, "float32"), weights
    assert_close(run(ttt_scan, arguments), delta_rule(q, k, v, rate, weights[0]))


def test_without_gates_titans_token_by_token_is_the_delta_rule():
    q, k, v, beta, none, _, weights, _ = titans_arguments(7, 1, gained=False)
    beta, none = 10.0 * beta, 0.0 * none
    y = run(titans_scan, (q, k, v, beta / 2, none, none, weights), chunk_size=1)
    assert_close(y, delta_rule(q, k, v, beta, weights[0]))


def test_without_steps_ttt_is_a_fixed_model_of_the_queries():
    q, k, v, rate, token_rate, weights, biases, norm = ttt_arguments(7)
    y = run(ttt_scan, (q, k, v, 0.0 * rate, token_rate, weights, biases, norm))
    for index in np.ndindex(q.shape[:3]):
        j = index[2]
        parameters = [x[j].astype("float64") for x in [*weights, *biases]]
        expected = ttt_output(q[index], parameters, 2, [x[j] for x in norm])
        assert_close(y[index], expected)


TTT = dict(
    arguments=ttt_arguments,
    scan=ttt_scan,
    step=lambda x, state: ttt_step(*x[:5], state, x[7]),
    reference=ttt_reference,
)
TITANS = dict(
    arguments=titans_arguments,
    scan=functools.partial(titans_scan, chunk_size=3),
    step=lambda x, state: titans_step(*x[:6], state, chunk_size=3),
    reference=functools.partial(titans_reference, chunk_size=3),
)
both = pytest.mark.parametrize("of", [TTT, TITANS], ids=["ttt", "titans"])


@both
def test_a_sequence_may_be_cut_inside_a_chunk_and_go_on_in_steps(of):
    arguments = of["arguments"](11)
    expected = of["reference"](*arguments)
    first, state = run(of["scan"], at(slice(0, 4), arguments), return_state=True)
    assert_close(first, expected[:, :4])
    rest = compiled(lambda x, s: of["scan"](*x, initial_state=s, return_state=True))
    second, last = rest(tensors(at(slice(4, 11), arguments)), state)
    assert_close(second, expected[:, 4:])
    step, outputs = compiled(of["step"]), []
    for t in range(4, 11):
        output, state = step(tensors(at(t, arguments)), state)
        outputs.append(output)
    assert_close(ops.stack(outputs, axis=1), expected[:, 4:])
    for a, b in zip(keras.tree.flatten(last), keras.tree.flatten(state), strict=True):
        assert_close(a, b)


def test_examples_may_be_at_different_places_of_their_mini_batches():
    arguments, step = ttt_arguments(9), compiled(TTT["step"])
    expected = ttt_reference(*arguments)
    start = ttt_initial_state(*tensors(arguments[5:7]), 2)
    _, state = step(tensors(at(0, arguments)), start)
    _, later = step(tensors(at(1, arguments)), state)
    pairs = zip(keras.tree.flatten(state), keras.tree.flatten(later), strict=True)
    mixed = [ops.stack([a[0], b[1]]) for a, b in pairs]
    mixed = keras.tree.pack_sequence_as(state, mixed)
    shifted = [x.copy() if i < 4 else x for i, x in enumerate(arguments)]
    for x in shifted[:4]:
        x[1, :-1] = x[1, 1:]
    shifted = tensors(at(slice(1, 8), shifted))
    outputs = compiled(lambda x, s: ttt_scan(*x, initial_state=s))(shifted, mixed)
    assert_close(outputs, np.stack([expected[0, 1:8], expected[1, 2:9]]))


def test_forgetting_all_leaves_what_the_last_step_wrote():
    arguments = titans_arguments(9, gained=False)
    theta, alpha, eta, weights = arguments[3:7]
    theta[:, 2], alpha[:, 2], eta[:, 2] = 0.0, 1.0, 0.0  # the end of the first chunk
    scan = functools.partial(titans_scan, chunk_size=3)
    fresh = at(slice(3, 9), arguments)
    fresh[6] = [0.0 * x for x in weights]
    assert_close(run(scan, arguments)[:, 3:], run(scan, fresh), 1e-6)


@pytest.mark.parametrize(
    ("of", "cut"), [(TTT, 2), (TITANS, None)], ids=["ttt in two", "titans"]
)
def test_gradients_go_through_the_steps_of_the_memory(of, cut, monkeypatch):
    if cut is None:
        monkeypatch.setattr(module, "ONE_LEVEL", 1)
    arguments = of["arguments"](7, batch=1, heads=1)
    cotangent = normal(1, 7, 1, 4)

    def in_two(*arguments):
        if cut is None:
            return of["scan"](*arguments)
        y, state = of["scan"](*at(slice(0, cut), arguments), return_state=True)
        rest = of["scan"](*at(slice(cut, None), arguments), initial_state=state)
        return ops.concatenate([y, rest], axis=1)

    def applied(*flat):
        return in_two(*keras.tree.pack_sequence_as(arguments, flat))

    found = gradients_in_all(applied, keras.tree.flatten(arguments), cotangent)
    flat = keras.tree.flatten(arguments)
    for i, gradient in enumerate(found):
        direction = rng.normal(size=flat[i].shape)

        def value(s, i=i, direction=direction):
            moved = [*flat[:i], flat[i] + s * direction, *flat[i + 1 :]]
            y = of["reference"](*keras.tree.pack_sequence_as(arguments, moved))
            return (y * cotangent).sum()

        expected = numerical_gradient(value, np.zeros(()))
        found_along, size = (gradient * direction).sum(), np.linalg.norm(gradient)
        assert_close(found_along / size, expected / size, 1e-4)


def memory_of_titans(q, k, v, theta, alpha, eta, weight, chunk_size):
    """Depth 1 without norm, whose gradient is 2 kᵀ (k W - v); a loop in float64."""
    q, k, v, theta, alpha, eta = (
        np.asarray(x[0, :, 0], "float64") for x in (q, k, v, theta, alpha, eta)
    )
    now, surprise, outputs = weight[0].astype("float64"), 0.0, []
    for t in range(len(q)):
        start = now if t % chunk_size == 0 else start  # noqa: F821, set at t = 0
        gradient = 2 * np.outer(k[t], k[t] @ start - v[t])
        surprise = eta[t] * surprise - theta[t] * gradient
        now = (1 - alpha[t]) * now + surprise
        outputs.append(q[t] @ now)
    return np.stack(outputs)[None, :, None]


def test_4096_steps_of_titans_stay_near_the_recurrence():
    arguments = titans_arguments(4096, 1, False, batch=1, heads=1, features=2)[:7]
    arguments[3][:] *= 0.1  # 32 steps from the same weights are stable if short
    scan = functools.partial(titans_scan, chunk_size=32)
    expected = memory_of_titans(*arguments[:6], arguments[6][0], 32)
    assert_close(run(scan, arguments), expected)


def test_half_precision_is_computed_in_float32():
    arguments = titans_arguments(7)
    half = [ops.cast(x, "bfloat16") for x in tensors(arguments[:3])]
    rounded = [to_numpy(ops.cast(x, "float32")) for x in half]
    y, state = run(TITANS["scan"], [*half, *arguments[3:]], return_state=True)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    flat = keras.tree.flatten(state)
    assert {keras.backend.standardize_dtype(x.dtype) for x in flat} == {"float32"}
    expected = TITANS["reference"](*rounded, *arguments[3:])
    # bfloat16 keeps 8 bits, of each output and of none of the sums.
    assert_close(ops.cast(y, "float32"), expected, 1e-2)


@keras.saving.register_keras_serializable("tests")
class FastWeights(keras.layers.Layer):
    """Some of the operations, two heads of eight: (b, t, 54) -> (b, t, 16)."""

    def __init__(self, names, chunk_size, **kwargs):
        super().__init__(**kwargs)
        self.names, self.chunk_size = names, chunk_size

    def build(self, *_):
        def weight(name, *shape):
            return self.add_weight(shape, "glorot_normal", name=name)

        if "ttt" in self.names:
            self.matrix, self.bias = weight("matrix", 2, 8, 8), weight("bias", 2, 8)
            self.norm = [weight("gamma", 2, 8), weight("beta", 2, 8)]
            self.token_rate = weight("token_rate", self.chunk_size, 1)
        if "titans" in self.names:
            self.matrices = [weight("first", 2, 8, 6), weight("second", 2, 6, 8)]
            self.gain = weight("gain", 2, 8)

    def call(self, x):
        x, y = ops.stack([x[..., :27], x[..., 27:]], axis=2), 0.0
        q, k, v = (x[..., i : i + 8] for i in (0, 8, 16))
        theta, alpha, eta = (ops.sigmoid(x[..., i]) for i in (24, 25, 26))
        theta, alpha = 0.1 * theta / self.chunk_size, 0.1 * alpha / self.chunk_size
        if "ttt" in self.names:
            rates = theta, self.token_rate[:, 0]
            y = y + ttt_scan(q, k, v, *rates, [self.matrix], [self.bias], self.norm)
        if "titans" in self.names:
            rates = theta, alpha, eta
            memory = self.matrices, self.gain, self.chunk_size
            y = y + titans_scan(q, k, v, *rates, *memory)
        return ops.concatenate([y[:, :, 0], y[:, :, 1]], axis=-1)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:2], 16)


def layer_model(names, length=None, chunk_size=3):
    inputs = keras.Input((length, 54), name="inputs")
    outputs = FastWeights(names, chunk_size)(inputs)
    return keras.Model(inputs, outputs, name="fast_weights")


def assert_all_learn(model, lengths, **options):
    """Fits a batch of each length; the generator hides them from TensorFlow."""
    model.compile("sgd", "mse", **options)
    before = model.get_weights()
    batches = [(normal(1, n, 54, scale=0.3), normal(1, n, 16)) for n in lengths]
    model.fit(
        (x for x in batches), steps_per_epoch=len(batches), shuffle=False, verbose=0
    )
    for old, new in zip(before, model.get_weights(), strict=True):
        assert np.isfinite(new).all()
        assert (old != new).any()


def test_4096_steps_train_with_few_states_kept(monkeypatch):
    counts, loop = [], module._loop

    def counted(step, state, chunks, *rest, **options):
        counts.append(chunks[0].shape[0])
        return loop(step, state, chunks, *rest, **options)

    monkeypatch.setattr(module, "_loop", counted)
    assert_all_learn(layer_model(["ttt"], 4096, chunk_size=64), [4096])
    assert set(counts) == {8}  # of 64 mini-batches


def test_unknown_length_trains_compiled():
    compiles = keras.backend.backend() == "tensorflow"  # on PyTorch in a minute
    model = layer_model(["titans"])
    assert_all_learn(model, [7, 4], jit_compile=True if compiles else "auto")


@both
def test_what_is_written_to_onnx_gives_the_same_numbers(of, monkeypatch):
    arguments = of["arguments"](7)
    monkeypatch.setattr(module, "_loop", None)  # no loop in the traced graph
    with export_scope("onnx"):
        assert_close(run(of["scan"], arguments), of["reference"](*arguments))


# PyTorch can write a fixed length only, and slowly: one chunk.
LENGTH = None if module.COMPILES_LOOPS else 2


@pytest.mark.parametrize(
    ("format", "length"), [("onnx", LENGTH), ("saved_model", None)]
)
def test_export_gives_the_numbers_of_the_model(format, length, tmp_path):
    path = tmp_path / ("model.onnx" if format == "onnx" else "model")
    assert export(layer_model(["ttt", "titans"], length), path, format) <= 1e-4


def test_export_of_an_unknown_length_from_pytorch_says_what_to_do(monkeypatch):
    monkeypatch.setattr(module, "COMPILES_LOOPS", False)
    monkeypatch.setattr(module, "static_length", lambda *_: None)
    with export_scope("onnx"), pytest.raises(ValueError, match="fixed length only"):
        ttt_scan(*tensors(ttt_arguments(4)))
