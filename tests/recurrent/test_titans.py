import math

import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.recurrent.titans import (
    MemoryAsContext,
    MemoryAsGate,
    MemoryAsLayer,
    NeuralMemory,
)
from tests.support.close import assert_close, difference, to_numpy
from tests.support.compiled import compiled
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake
from tests.support.streaming import stream

rng = np.random.default_rng(0)
STEP = 1e-30
MEMORY = dict(num_heads=2, memory_size=4, expansion=1.5, chunk_size=2)
WIRINGS = ["mac", "mag", "mal", "lmm"]
every_wiring = pytest.mark.parametrize("wiring", WIRINGS)


def silu(x):
    return x * sigmoid(x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu(x):
    y = x / math.sqrt(2)
    slope = 2 / math.sqrt(math.pi) * np.exp(-(y.real**2))
    return 0.5 * x * (1 + np.vectorize(math.erf)(y.real) + 1j * slope * y.imag)


def rms_norm(x, scale, epsilon=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale


def layer_norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)


def convolved(x, kernel):
    padded = np.pad(x, [(0, 0), (len(kernel) - 1, 0), (0, 0)])
    return sum(w * padded[:, j : j + x.shape[1]] for j, w in enumerate(kernel))


class Memory:
    """One memory of one example. Its gradients are taken along the imaginary axis."""

    def __init__(self, w, head, chunk_size):
        names = [n for n in ("M1", "M2", "M3", "gain") if n in w]
        self.now = [w[n][head] for n in names]
        self.surprise = [np.zeros_like(p) for p in self.now]
        self.gained, self.count, self.chunk_size = "gain" in w, 0, chunk_size

    def output(self, x, parameters):
        z, matrices = x, parameters[: len(parameters) - self.gained]
        for i, matrix in enumerate(matrices):
            z = (gelu(z) if i else z) @ matrix
        return x + layer_norm(z) * (1 + parameters[-1]) if self.gained else z

    def gradient(self, k, v):
        found = [np.zeros_like(p) for p in self.start]
        for i, p in enumerate(self.start):
            for index in np.ndindex(p.shape):
                moved = p.astype("complex128")
                moved[index] += 1j * STEP
                y = self.output(k, [*self.start[:i], moved, *self.start[i + 1 :]])
                found[i][index] = ((y - v) ** 2).sum().imag / STEP
        return found

    def learn(self, k, v, theta, alpha, eta):
        if self.count % self.chunk_size == 0:
            self.start = self.now
        pairs = zip(self.surprise, self.gradient(k, v), strict=True)
        self.surprise = [eta * s - theta * g for s, g in pairs]
        pairs = zip(self.now, self.surprise, strict=True)
        self.now = [(1 - alpha) * p + s for p, s in pairs]
        self.count += 1

    def read(self, q):
        return self.output(q, self.now).real


class Memories:
    """Those of all examples and heads, with the weights of a `NeuralMemory`."""

    def __init__(self, w, batch, heads=2, chunk_size=2, max_lr=1e-2):
        self.w, self.heads, self.max_lr = w, heads, max_lr
        self.all = [
            [Memory(w, j, chunk_size) for j in range(heads)] for _ in range(batch)
        ]

    def streams(self, x):
        found = []
        for name in "qkv":
            z = silu(x @ self.w[f"{name}_proj/kernel"])
            if f"{name}_conv/kernel" in self.w:
                z = convolved(z, self.w[f"{name}_conv/kernel"])
            z = z.reshape(*x.shape[:2], self.heads, -1)
            if name != "v":
                z = z / np.sqrt((z**2).sum(-1, keepdims=True) + 1e-6)
            found.append(z)
        return found

    def rates(self, x):
        found = []
        for name in ("theta", "alpha", "eta"):
            rate = np.zeros((*x.shape[:2], self.heads))
            if f"{name}_kernel" in self.w:
                rate = sigmoid(x @ self.w[f"{name}_kernel"] + self.w[f"{name}_bias"])
            found.append(self.max_lr * rate if name == "theta" else rate)
        return found

    def recall(self, q):
        y = np.zeros_like(q)
        for i, t, j in np.ndindex(q.shape[:3]):
            y[i, t, j] = self.all[i][j].read(q[i, t, j])
        return y.reshape(*q.shape[:2], -1) @ self.w["o_proj/kernel"]

    def __call__(self, x, first=0):
        """What is read while x is learned from the token `first` on."""
        q, k, v = self.streams(x)
        rates, outputs = self.rates(x), []
        for t in range(first, x.shape[1]):
            for i, j in np.ndindex(len(x), self.heads):
                own = (rate[i, t, j] for rate in rates)
                self.all[i][j].learn(k[i, t, j], v[i, t, j], *own)
            outputs.append(self.recall(q[:, t : t + 1]))
        return np.concatenate(outputs, axis=1)


def attention(x, keys, seen, w, heads=2):
    """Of the tokens x to others; seen is (tokens, keys)."""
    q, k, v = (
        (z @ w[f"attention/{n}/kernel"]).reshape(*z.shape[:2], heads, -1)
        for n, z in (("q", x), ("k", keys), ("v", keys))
    )
    scores = np.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
    weights = np.where(seen, np.exp(scores), 0)
    weights = weights / weights.sum(-1, keepdims=True)
    y = np.einsum("bhts,bshk->bthk", weights, v).reshape(x.shape)
    return y @ w["attention/out/kernel"]


def product(y, read, w):
    gate = sigmoid(rms_norm(read, w["memory_norm/gamma"]))
    return rms_norm(y, w["attention_norm/gamma"]) * gate


def below(w, prefix):
    return {n.removeprefix(prefix): v for n, v in w.items() if n.startswith(prefix)}


def window(length, size):
    distance = np.arange(length)[:, None] - np.arange(length)
    return (distance >= 0) & (distance < size)


def learned(w, name, x):
    return np.repeat(w[name][None], len(x), axis=0)


def mac(x, w, segment_size=4, **options):
    memory, parts = Memories(below(w, "memory/"), len(x), **options), []
    persistent = learned(w, "attention/persistent", x)
    query, ys = memory.streams(x)[0], x[:, :0]
    for start in range(0, x.shape[1], segment_size):
        s = x[:, start : start + segment_size]
        h = memory.recall(query[:, start : start + segment_size])
        own = window(s.shape[1], segment_size)
        everywhere = np.ones((s.shape[1], persistent.shape[1]), "bool")
        seen = np.concatenate([everywhere, own, own], axis=1)
        y = attention(s, np.concatenate([persistent, h, s], axis=1), seen, w)
        ys = np.concatenate([ys, y], axis=1)
        parts.append(product(y, memory(ys, first=start), w))
    return np.concatenate(parts, axis=1)


def mag(x, w, **options):
    persistent = learned(w, "attention/persistent", x)
    count, both = persistent.shape[1], np.concatenate([persistent, x], axis=1)
    read = Memories(below(w, "memory/"), len(x), **options)(both)[:, count:]
    seen = np.ones((x.shape[1], count), "bool")
    seen = np.concatenate([seen, window(x.shape[1], 3)], axis=1)
    return product(attention(x, both, seen, w), read, w)


def mal(x, w, **options):
    persistent = learned(w, "persistent", x)
    both = np.concatenate([persistent, x], axis=1)
    y = Memories(below(w, "memory/"), len(x), **options)(both)
    return attention(y, y, window(y.shape[1], 3), w)[:, persistent.shape[1] :]


def lmm(x, w, **options):
    return Memories(w, len(x), **options)(x)


MIXERS = dict(mac=mac, mag=mag, mal=mal, lmm=lmm)


def feed_forward(x, w):
    return (silu(x @ w["gate/kernel"]) * (x @ w["up/kernel"])) @ w["down/kernel"]


def named_weights(layer):
    """The weights of a layer by their names below it, in float64."""
    return {v.path.removeprefix(f"{layer.path}/"): to_numpy(v) for v in layer.weights}


def reference(x, weights, wiring, **options):
    """The whole model on (batch, time, features), from its weights."""
    x = np.asarray(x, "float64") @ weights["embed"]["kernel"]

    def branch(name, function):
        return function(rms_norm(x, weights[f"{name}_norm"]["gamma"]), weights[name])

    for i in range(2):
        x = x + branch(f"titans_{i}", lambda x, w: MIXERS[wiring](x, w, **options))
        x = x + branch(f"ffn_{i}", feed_forward)
    return rms_norm(x, weights["final_norm"]["gamma"])


def model(wiring, **options):
    tiny = keras_edifice.info("titans").tiny
    sizes = dict(num_layers=2, chunk_size=2, attention_window=3, window_size=None)
    sizes |= dict(memory_residual_norm=True, return_sequences=True)
    keras.utils.set_random_seed(0)
    options = {**tiny, **sizes, "variant": wiring, **options}
    return shake(keras_edifice.build("titans", **options))


def layer(wiring, **options):
    keras.utils.set_random_seed(0)
    options = {"memory": {**MEMORY, **options.pop("memory", {})}, **options}
    if wiring == "lmm":
        built = NeuralMemory(**options.pop("memory"), **options)
    elif wiring == "mac":
        built = MemoryAsContext(2, 4, 2, **options)
    else:
        built = {"mag": MemoryAsGate, "mal": MemoryAsLayer}[wiring](2, 3, 2, **options)
    built.build((None, None, 4))
    return shake(built)


def run(layer, x, **options):
    """The call of a layer with options that are no arrays to be traced."""
    return compiled(lambda x: layer(x, **options))(ops.convert_to_tensor(x))


def predict(model, x):
    return model.predict(x, verbose=0)


def inputs(length=11, features=3, batch=2):
    return rng.normal(size=(batch, length, features)).astype("float32")


@pytest.mark.parametrize(
    ("wiring", "options", "in_reference"),
    [
        ("mac", {}, {}),
        ("mag", dict(memory_depth=1, use_forgetting=False), {}),
        ("mal", dict(memory_residual_norm=False, conv_size=0), {}),
        (
            "lmm",
            dict(memory_depth=3, use_momentum=False, chunk_size=3, max_lr=0.1),
            dict(chunk_size=3, max_lr=0.1),
        ),
    ],
    ids=WIRINGS,
)
def test_output_is_the_equation(wiring, options, in_reference):
    built, x = model(wiring, **options), inputs(7)
    weights = {layer.name: named_weights(layer) for layer in built.layers}
    expected = reference(x, weights, wiring, **in_reference)
    assert_close(predict(built, x), expected, 1e-4)


@every_wiring
def test_gradient_is_that_of_the_equation(wiring):
    rng = np.random.default_rng(1)
    built = layer(wiring, memory=dict(max_lr=0.05))
    x, r = rng.normal(size=(2, 1, 5, 4)).astype("float32")
    by_weight, by_input = gradients(
        Plain(built), x, lambda y: ops.sum(ops.multiply(y, ops.convert_to_tensor(r)))
    )
    weights, found = named_weights(built), {"x": by_input}
    for variable, gradient in zip(built.trainable_variables, by_weight, strict=True):
        assert np.abs(gradient).max() > 0, f"{variable.path} does not learn"
        found[variable.path.removeprefix(f"{built.path}/")] = gradient
    start = "" if wiring == "lmm" else "memory/"
    for name in ("x", f"{start}M1", f"{start}theta_kernel", f"{start}k_conv/kernel"):
        kept = x if name == "x" else weights[name]
        direction = rng.normal(size=kept.shape)

        def value(s, name=name, kept=kept, direction=direction):
            changed = {"x": x, **weights, name: kept + s * direction}
            y = MIXERS[wiring](changed["x"], changed, max_lr=0.05)
            return (y * r).sum()

        size = max(np.linalg.norm(found[name]), 1e-2)
        expected = numerical_gradient(value, np.zeros(())) / size
        assert_close((found[name] * direction).sum() / size, expected, 1e-4)


class Plain:
    """A layer whose call takes no `training`."""

    def __init__(self, layer):
        self.layer = layer
        self.trainable_variables = layer.trainable_variables
        self.non_trainable_variables = layer.non_trainable_variables

    def __call__(self, x, training=False):
        return self.layer(x)


def test_initial_weights_are_those_of_the_paper():
    keras.utils.set_random_seed(0)
    built = MemoryAsGate(4, memory=dict(memory_size=16))
    built.build((None, None, 64))
    weights = named_weights(built)
    starts = {"theta": 0.0, "alpha": -3.0, "eta": 0.0}
    for name, start in starts.items():
        bias = weights[f"memory/{name}_bias"]
        assert_close(bias, np.full((4,), start), 0)
    assert_close(weights["memory/gain"], np.zeros((4, 16)), 0)
    for matrix, shape in (("M1", (4, 16, 64)), ("M2", (4, 64, 16))):
        value = weights[f"memory/{matrix}"]
        assert value.shape == shape
        bound = (6 / 80) ** 0.5  # Glorot's
        assert 0.98 * bound < np.abs(value).max() <= bound
    assert weights["attention/persistent"].shape == (4, 64)
    assert abs(weights["attention/persistent"].std() - 0.02) < 0.003


@every_wiring
def test_token_by_token_is_the_whole_sequence(wiring):
    x, whole = inputs(), model(wiring)
    assert_close(stream(whole, x), predict(whole, x), 1e-4)


@every_wiring
def test_segments_with_the_carried_state_are_one_pass(wiring):
    mixed, x = layer(wiring), inputs(9, 4)
    first, state = run(mixed, x[:, :3], return_state=True)  # within chunk and segment
    second, state = run(mixed, x[:, 3:], initial_state=state, return_state=True)
    assert_close(ops.concatenate([first, second], axis=1), run(mixed, x))


@every_wiring
def test_future_tokens_do_not_change_the_past(wiring):
    mixed, x = layer(wiring, memory=dict(max_lr=0.3)), inputs(12, 4)
    before = to_numpy(run(mixed, x))
    for place in (5, 8):  # inside a segment and at its border
        changed = x.copy()
        changed[:, place:] += 1.0
        after = to_numpy(run(mixed, changed))
        assert_close(after[:, :place], before[:, :place], 1e-6)
        assert difference(after[:, place], before[:, place]) > 1e-3


@every_wiring
def test_the_memory_reaches_beyond_the_attention(wiring):
    mixed, x = layer(wiring, memory=dict(max_lr=0.3, conv_size=0)), inputs(12, 4)
    changed = x.copy()
    changed[:, 0] += 1.0
    before, after = run(mixed, x), run(mixed, changed)
    assert difference(after[:, -1], before[:, -1]) > 1e-4


@every_wiring
def test_masked_steps_do_not_exist(wiring):
    mixed, x = layer(wiring), inputs(7, 4)
    mask = np.array([[1, 1, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1, 0]], "bool")
    y = to_numpy(run(mixed, x, mask=ops.convert_to_tensor(mask)))
    for row in range(2):
        expected = run(mixed, x[row : row + 1, mask[row]])
        assert_close(y[row : row + 1, mask[row]], expected)


def test_masked_steps_leave_the_state():
    mixed, x = layer("mag"), inputs(5, 4)
    mask = ops.convert_to_tensor(np.array([[1, 1, 0, 0, 1], [0, 0, 0, 1, 1]], "bool"))
    _, state = run(mixed, x, mask=mask, return_state=True)
    for row in range(2):
        short = x[row : row + 1, to_numpy(mask)[row] > 0]
        _, expected = run(mixed, short, return_state=True)
        parts = keras.tree.flatten(state), keras.tree.flatten(expected)
        for part, whole in zip(*parts, strict=True):
            assert_close(part[row : row + 1], whole)


def plain_memory(**options):
    """One linear memory without norm and convolution, whose gates are constant."""
    plain = dict(num_heads=1, memory_size=4, depth=1, residual_norm=False)
    plain |= dict(conv_size=0, chunk_size=1)
    keras.utils.set_random_seed(0)
    built = NeuralMemory(**{**plain, **options})
    built.build((None, None, 4))
    for name in built.gates:
        built.gates[name][0].assign(np.zeros((4, 1)))
    return built


def test_without_gates_a_linear_memory_is_the_delta_rule():
    beta = 0.6
    mixed = plain_memory(use_momentum=False, use_forgetting=False, max_lr=beta)
    x = inputs(7, 4, batch=1)  # θ = max_lr σ(0) = β / 2
    w = named_weights(mixed)
    q, k, v = (z[0, :, 0] for z in Memories(w, 1, heads=1).streams(x))
    W, expected = w["M1"][0], []
    for t in range(7):
        W = W + beta * np.outer(k[t], v[t] - k[t] @ W)
        expected.append(q[t] @ W)
    assert_close(run(mixed, x)[0], np.stack(expected) @ w["o_proj/kernel"])


def test_forgetting_all_forgets_all_that_was_before():
    mixed = plain_memory(use_momentum=False)
    mixed.gates["alpha"][1].assign([100.0])
    x = inputs(6, 4)
    changed = x.copy()
    changed[:, :3] += 1.0
    before, after = run(mixed, x), run(mixed, changed)
    assert_close(after[:, 4:], before[:, 4:], 1e-6)  # token 3 reads with 2 gone
    mixed.gates["alpha"][1].assign([-3.0])
    assert difference(run(mixed, changed)[:, 4:], run(mixed, x)[:, 4:]) > 1e-4


@pytest.mark.parametrize("saturated", [None, -100.0, 100.0])
def test_long_sequences_stay_finite(saturated):
    mixed, x = layer("lmm", memory=dict(chunk_size=64)), inputs(4096, 4, batch=1)
    if saturated is not None:
        # 64 gradients at the same M: larger rates step over the minimum, ever further.
        mixed = plain_memory(max_lr=1 / 64, chunk_size=64)
        for _, bias in mixed.gates.values():
            bias.assign([saturated])
    assert np.isfinite(to_numpy(run(mixed, x))).all()


@pytest.mark.parametrize("wiring", ["mac", "mag"])
def test_half_precision_streams_with_a_memory_in_float32(wiring):
    mixed, x = layer(wiring, dtype="mixed_bfloat16"), inputs(5, 4)
    state = mixed.initial_state(2)
    step, outputs = compiled(mixed.step), []
    for t in range(5):
        y, state = step(ops.convert_to_tensor(x[:, t]), state)
        assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
        outputs.append(ops.cast(y, "float32"))
    memory = state[1][1] if wiring == "mac" else state[0][1]
    flat = keras.tree.flatten(memory)
    assert {keras.backend.standardize_dtype(z.dtype) for z in flat} == {"float32"}
    # bfloat16 keeps 8 bits; the memory's norm of four features enlarges their loss.
    whole = ops.cast(run(mixed, x), "float32")
    assert difference(ops.stack(outputs, axis=1), whole) < 0.15


def test_without_persistent_tokens_and_convolutions():
    for wiring in WIRINGS:
        built = model(wiring, num_persistent=0, conv_size=0, num_layers=1)
        x = inputs(6)
        assert_close(stream(built, x), predict(built, x), 1e-4)


def test_config_keeps_the_arguments():
    memory = dict(
        num_heads=3,
        memory_size=5,
        depth=3,
        expansion=2.0,
        residual_norm=False,
        chunk_size=8,
        use_momentum=False,
        use_forgetting=False,
        max_lr=0.5,
        conv_size=2,
    )
    config = NeuralMemory(**memory).get_config()
    assert {name: config[name] for name in memory} == memory
    options = dict(num_heads=3, segment_size=8, num_persistent=1, memory=memory)
    config = MemoryAsContext(**options).get_config()
    assert {name: config[name] for name in options} == options
    options = dict(num_heads=3, attention_window=8, num_persistent=1, memory=memory)
    config = MemoryAsLayer(**options).get_config()
    assert {name: config[name] for name in options} == options


def test_segments_that_cut_a_chunk_are_refused():
    message = "segment_size must be a multiple of chunk_size, received 6 and 4; change"
    with pytest.raises(ValueError, match=message):
        MemoryAsContext(segment_size=6, memory=dict(chunk_size=4))
