import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_edifice.backends.artefacts import RUN
from keras_edifice.exporting import export
from keras_edifice.model import EdificeModel
from keras_edifice.ops import decay_products
from keras_edifice.ops import linear_attention as module
from keras_edifice.ops.linear_attention import (
    linear_attention,
    linear_attention_step,
    normalized_linear_attention,
    normalized_linear_attention_step,
    stabilized_linear_attention,
    stabilized_linear_attention_step,
)
from keras_edifice.ops.tracing import export_scope
from tests.support.applied import gradients_in_all
from tests.support.close import assert_close, difference, to_numpy
from tests.support.compiled import compiled
from tests.support.numerical import numerical_gradient

rng = np.random.default_rng(0)
DECAYS = ["none", "constant", "head", "channel", "constant_channel"]


def recurrence(q, k, v, log_decay=None, bonus=None, state=None):
    """The first equation of the module, a loop in float64, and the last state."""
    q, k, v = (np.asarray(x, "float64") for x in (q, k, v))
    heads = v.shape[2]
    q, k = (np.repeat(x, heads // x.shape[2], axis=2) for x in (q, k))
    decay = np.ones((1, 1, heads, 1))
    if log_decay is not None:
        decay = np.exp(np.asarray(log_decay, "float64"))
        decay = decay[None, None] if decay.ndim == 1 else decay
        decay = decay[..., None] if decay.ndim == 3 else decay
        decay = np.repeat(decay, heads // decay.shape[2], axis=2)
    decay = np.broadcast_to(decay, (*v.shape[:3], decay.shape[3]))
    if state is None:
        state = np.zeros((len(v), heads, k.shape[3], v.shape[3]))
    outputs = []
    for t in range(v.shape[1]):
        written = k[:, t, :, :, None] * v[:, t, :, None]
        before, state = state, decay[:, t, :, :, None] * state + written
        read = state if bonus is None else before + bonus[:, :, None] * written
        outputs.append((q[:, t, :, :, None] * read).sum(2))
    return np.stack(outputs, axis=1), state


def normalized(q, k, v, log_decay=None, eps=1e-6, state=None):
    """The same over the sum of the weights, and the last (S, z)."""
    S, z = (None, None) if state is None else (state[0], state[1][..., None])
    outputs, S = recurrence(q, k, v, log_decay, state=S)
    sums, z = recurrence(q, k, np.ones_like(v[..., :1]), log_decay, state=z)
    return outputs / (sums + eps), (S, z[..., 0])


def stabilized(q, k, v, log_input, log_forget, eps=1e-6, state=None):
    """xLSTM's equations 19 to 27, a loop in float64, and the last (S, n, m)."""
    q, k, v, log_input, log_forget = (
        np.asarray(x, "float64") for x in (q, k, v, log_input, log_forget)
    )
    if state is None:
        n = np.zeros_like(k[:, 0])
        state = n[..., None] * v[:, 0, :, None], n, np.zeros_like(log_input[:, 0])
    S, n, m = state
    outputs = []
    for t in range(v.shape[1]):
        before, m = m, np.maximum(log_forget[:, t] + m, log_input[:, t])
        forget = np.exp(log_forget[:, t] + before - m)[..., None]
        key = np.exp(log_input[:, t] - m)[..., None] * k[:, t]
        S = forget[..., None] * S + key[..., None] * v[:, t, :, None]
        n = forget * n + key
        below = np.maximum(np.abs((n * q[:, t]).sum(-1)), np.exp(-m)) + eps
        outputs.append((q[:, t, :, :, None] * S).sum(2) / below[..., None])
    return np.stack(outputs, axis=1), (S, n, m)


def decay_of(name, length, heads=2, key=4):
    shape = {
        "constant": (heads,),
        "head": (2, length, heads),
        "channel": (2, length, heads, key),
        "constant_channel": (1, 1, heads, key),
    }
    if name == "none":
        return None
    decay = -rng.exponential(size=shape[name])
    if name in ("head", "channel"):  # exactly one and nearly zero
        decay[:, :: max(1, length // 3)] = 0.0
        decay[:, 1 :: max(1, length // 3)] = -69.0
    return decay.astype("float32")


def arguments(decay, length, heads=2, groups=2, key=4, value=3):
    q, k = rng.normal(size=(2, 2, length, groups, key))
    v = rng.normal(size=(2, length, heads, value))
    q, k, v = (x.astype("float32") for x in (q, k, v))
    return [q, k, v, decay_of(decay, length, heads, key)]


def gates(length, heads=2):
    """Arguments of the stabilized form."""
    q, k, v, _ = arguments("none", length)
    log_input = 3.0 * rng.normal(size=(2, length, heads))
    log_forget = -rng.exponential(size=(2, length, heads))
    return [q, k, v, log_input.astype("float32"), log_forget.astype("float32")]


def some_state(heads=2, key=4, value=3):
    return rng.normal(size=(2, heads, key, value)).astype("float32")


def run(function, *arrays, **options):
    """`function` of arrays, compiled; None among the arrays stays None."""
    known = [i for i, x in enumerate(arrays) if x is not None]

    def of_known(*tensors):
        given = dict(zip(known, tensors, strict=True))
        return function(*(given.get(i) for i in range(len(arrays))), **options)

    return compiled(of_known)(*(ops.convert_to_tensor(arrays[i]) for i in known))


def assert_all_close(actual, expected, tolerance=1e-5):
    actual, expected = keras.tree.flatten(actual), keras.tree.flatten(expected)
    for x, y in zip(actual, expected, strict=True):
        assert_close(x, y, tolerance)


def assert_gradients(function, reference, arrays, tolerance=1e-4):
    """Of a random sum of all outputs, in every array, against differences."""
    expected = keras.tree.flatten(reference(*arrays))
    weights = [rng.normal(size=y.shape).astype("float32") for y in expected]

    def loss(*tensors):
        found = keras.tree.flatten(function(*tensors))
        pairs = zip(found, weights, strict=True)
        return sum(ops.sum(y * ops.convert_to_tensor(w)) for y, w in pairs)

    found = gradients_in_all(loss, arrays, 1.0)
    for i, gradient in enumerate(found):

        def value(x, i=i):
            outputs = keras.tree.flatten(reference(*arrays[:i], x, *arrays[i + 1 :]))
            return sum((y * w).sum() for y, w in zip(outputs, weights, strict=True))

        assert_close(gradient, numerical_gradient(value, arrays[i]), tolerance)


@pytest.mark.parametrize("decay", DECAYS)
def test_chunks_are_the_recurrence(decay):
    inputs, state = arguments(decay, 21), some_state()
    options = dict(return_state=True, chunk_size=4)
    found = run(linear_attention, *inputs, None, state, **options)
    assert_all_close(found, recurrence(*inputs, state=state))


@pytest.mark.parametrize("decay", ["none", "constant", "channel"])
def test_one_step_is_a_sequence(decay):
    inputs, state = arguments(decay, 1), some_state()
    found = run(linear_attention, *inputs, None, state, return_state=True)
    assert_all_close(found, recurrence(*inputs, state=state))


@pytest.mark.parametrize(
    ("decay", "chunk_size"),
    [("constant", 1), ("constant", 7), ("channel", 7), ("channel", 64)],
)
def test_chunk_size_changes_nothing(decay, chunk_size):
    inputs = arguments(decay, 21)
    outputs = run(linear_attention, *inputs, chunk_size=chunk_size)
    assert_close(outputs, recurrence(*inputs)[0])


@pytest.mark.parametrize("decay", ["constant", "head", "channel"])
def test_heads_of_a_group_share_queries_and_keys(decay):
    inputs = arguments(decay, 11, heads=6, groups=2)
    state = some_state(heads=6)
    options = dict(return_state=True, chunk_size=4)
    found = run(linear_attention, *inputs, None, state, **options)
    assert_all_close(found, recurrence(*inputs, state=state))


def test_fewer_keys_and_values_serve_more_queries():
    _, k, v, _ = arguments("none", 5)
    q, _, _, g = arguments("head", 5, heads=4, groups=4)
    more = [np.repeat(x, 2, axis=2) for x in (k, v)]
    assert_close(run(linear_attention, q, k, v, g), recurrence(q, *more, g)[0])


@pytest.mark.parametrize(
    ("decay", "length"), [("none", 1), ("constant", 13), ("channel", 13)]
)
def test_bonus_weighs_the_present_token(decay, length):
    inputs, state = arguments(decay, length), some_state()
    bonus = rng.normal(size=(2, 4)).astype("float32")
    options = dict(return_state=True, chunk_size=4)
    found = run(linear_attention, *inputs, bonus, state, **options)
    assert_all_close(found, recurrence(*inputs, bonus, state))


@pytest.mark.parametrize(
    ("decay", "bonus"),
    [("none", False), ("constant", True), ("head", False), ("channel", True)],
)
def test_step_by_step_is_the_sequence(decay, bonus):
    q, k, v, g = arguments(decay, 6)
    bonus = rng.normal(size=(2, 4)).astype("float32") if bonus else None
    state = ops.zeros((2, 2, 4, 3))
    step, outputs = compiled(linear_attention_step), []
    for t in range(6):
        now = g if g is None or g.ndim == 1 else g[:, min(t, g.shape[1] - 1)]
        now = now if now is None else ops.convert_to_tensor(now)
        tensors = [ops.convert_to_tensor(x[:, t]) for x in (q, k, v)]
        u = bonus if bonus is None else ops.convert_to_tensor(bonus)
        y, state = step(*tensors, now, state, u)
        outputs.append(y)
    expected = recurrence(q, k, v, g, bonus)
    assert_all_close((ops.stack(outputs, axis=1), state), expected)


def test_segments_with_the_carried_state_are_one_pass():
    inputs = arguments("channel", 21)
    first = [x[:, :9] for x in inputs]
    rest = [x[:, 9:] for x in inputs]
    attend = functools.partial(run, linear_attention, return_state=True, chunk_size=4)
    early, state = attend(*first)
    late, last = attend(*rest, None, to_numpy(state).astype("float32"))
    outputs, expected = attend(*inputs)
    assert_close(ops.concatenate([early, late], axis=1), outputs)
    assert_close(last, expected)


def test_masked_steps_leave_the_state():
    q, k, v, g = arguments("head", 21)
    k[:, 13:], g[:, 13:] = 0.0, 0.0
    attend = functools.partial(run, linear_attention, return_state=True, chunk_size=4)
    _, last = attend(q, k, v, g)
    _, state = attend(*(x[:, :13] for x in (q, k, v, g)))
    assert_close(last, state, 1e-6)


@pytest.mark.parametrize("decay", ["none", "constant", "constant_channel"])
def test_gradient_is_that_of_the_recurrence(decay):
    inputs = [x for x in arguments(decay, 7, key=2, value=2) if x is not None]
    inputs += [some_state(key=2, value=2)]

    def attend(q, k, v, *others):
        g = others[0] if len(others) > 1 else None
        options = dict(return_state=True, chunk_size=4)
        return linear_attention(q, k, v, g, None, others[-1], **options)

    def reference(q, k, v, *others):
        g = others[0] if len(others) > 1 else None
        return recurrence(q, k, v, g, state=others[-1])

    assert_gradients(attend, reference, inputs)


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_gradient_with_groups_is_that_of_the_recurrence(decay):
    inputs = arguments(decay, 5, heads=2, groups=1, key=2, value=2)
    attend = functools.partial(linear_attention, return_state=True, chunk_size=2)
    assert_gradients(attend, recurrence, inputs)


def test_gradient_with_a_bonus_is_that_of_the_recurrence():
    inputs = arguments("channel", 5, key=2, value=2)
    inputs += [rng.normal(size=(2, 2)).astype("float32")]
    attend = functools.partial(linear_attention, return_state=True, chunk_size=4)
    assert_gradients(attend, recurrence, inputs)


@pytest.mark.parametrize("decay", ["head", "channel"])
def test_decays_of_any_size_are_exact(decay):
    q, k, v, g = arguments(decay, 32)
    g[:] = -1e-3
    g[:, 3], g[:, 11], g[:, 12], g[:, 25] = -1e4, -np.inf, 0.0, -50.0
    found = run(linear_attention, q, k, v, g, return_state=True, chunk_size=8)
    assert_all_close(found, recurrence(q, k, v, g), 2e-6)
    by_all = gradients_in_all(
        functools.partial(linear_attention, chunk_size=8), [q, k, v, g], 1.0
    )
    assert all(np.isfinite(x).all() for x in by_all)
    assert not by_all[3][:, 11].any()


@pytest.mark.parametrize("decay", ["constant", "channel"])
def test_4096_steps_stay_near_the_recurrence(decay):
    q, k, v, g = arguments(decay, 4096, value=2)
    g = 1e-4 * g  # most of the sequence is remembered
    found = run(linear_attention, q, k, v, g, return_state=True)
    expected = recurrence(q, k, v, g)
    for x, y in zip(found, expected, strict=True):
        assert difference(x, y) < 1e-5


@pytest.mark.parametrize("decay", ["none", "channel"])
def test_half_precision_is_summed_in_float32(decay):
    def attend(q, k, v, g):
        q, k, v = (ops.cast(x, "bfloat16") for x in (q, k, v))
        return (q, k, v, *linear_attention(q, k, v, g, return_state=True))

    inputs = arguments(decay, 40)
    *halves, outputs, state = run(attend, *inputs)
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"
    assert keras.backend.standardize_dtype(state.dtype) == "float32"
    halves = [to_numpy(ops.cast(x, "float32")) for x in halves]
    expected, last = recurrence(*halves, inputs[3])
    assert_close(state, last)
    outputs = ops.cast(outputs, "float32")
    assert difference(outputs, expected) < 2**-8  # the rounding of the outputs


class Recorder:
    """`keras.ops` that notes the largest number of elements of any result.

    The backward pass of a custom gradient runs right after the forward pass.
    """

    def __init__(self):
        self.largest = 0

    def __getattr__(self, name):
        def noting(*args, **kwargs):
            result = getattr(ops, name)(*args, **kwargs)
            for x in keras.tree.flatten(result):
                self.largest = max(self.largest, int(np.prod(getattr(x, "shape", 1))))
            return result

        return noting

    def custom_gradient(self, function):
        def both(*args):
            result, gradient = function(*args)
            assert len(gradient(self.ones_like(result))) == len(args)
            return result

        return both


class Traced(layers.Layer):
    """A function that is only traced if its arguments have no values."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.built = True

    def call(self, inputs):
        return self.function(*inputs)


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_nothing_grows_faster_than_the_length(monkeypatch, decay):
    def largest(length):
        recorder = Recorder()
        for traced in (module, decay_products):
            monkeypatch.setattr(traced, "ops", recorder)
        inputs = [x for x in arguments(decay, length) if x is not None]
        attend = functools.partial(linear_attention, chunk_size=8)
        Traced(attend)([keras.KerasTensor(x.shape) for x in inputs])
        return recorder.largest

    assert largest(128) <= 4 * largest(32)


@pytest.fixture
def as_onnx(monkeypatch):
    """An export with a length of 21 that the exporter does not know."""
    known = module.static_length

    def static_length(x, axis=1):
        return None if x.shape[axis] == 21 else known(x, axis)

    for traced in (module, decay_products):
        monkeypatch.setattr(traced, "static_length", static_length)
        monkeypatch.setattr(traced, "LONGEST", 32)
    with export_scope("onnx"):
        yield


@pytest.mark.parametrize("decay", ["none", "constant", "head", "channel"])
def test_open_lengths_have_the_same_numbers(as_onnx, decay):
    inputs, state = arguments(decay, 21), some_state()
    found = run(linear_attention, *inputs, None, state, return_state=True)
    assert_all_close(found, recurrence(*inputs, state=state))


def test_heads_of_a_group_share_queries_and_keys_in_an_export(as_onnx):
    inputs = arguments("head", 21, heads=6, groups=2)
    assert_close(run(linear_attention, *inputs), recurrence(*inputs)[0])


def test_stabilized_form_of_an_open_length_has_the_same_numbers(as_onnx):
    inputs = gates(21)
    outputs = run(stabilized_linear_attention, *inputs)
    assert_close(outputs, stabilized(*inputs)[0])


@pytest.mark.parametrize("decay", ["none", "head", "channel"])
def test_export_of_a_known_length_has_the_same_numbers(monkeypatch, decay):
    inputs = arguments(decay, 21)
    monkeypatch.setattr(module.ops, "scan", None)  # no loop in the traced graph
    with export_scope("onnx"):
        outputs = run(linear_attention, *inputs, chunk_size=4)
    assert_close(outputs, recurrence(*inputs)[0])


def test_wrong_shapes_are_refused():
    q, k, v, _ = arguments("none", 3, heads=4, groups=3)
    with pytest.raises(ValueError, match="divide the largest"):
        linear_attention(*(ops.convert_to_tensor(x) for x in (q, k, v)))
    q, k, v, _ = arguments("none", 3)
    with pytest.raises(ValueError, match="expected log_decay"):
        linear_attention(*(ops.convert_to_tensor(x) for x in (q, k, v, v[0, 0])))


def positive(decay, length, **sizes):
    q, k, v, g = arguments(decay, length, **sizes)
    return [np.exp(0.3 * q), np.exp(0.3 * k), v, g]


@pytest.mark.parametrize("decay", ["none", "head"])
def test_normalized_form_divides_by_the_sum_of_its_weights(decay):
    inputs = positive(decay, 13)
    state = some_state(), np.exp(some_state()[..., 0])

    def attend(q, k, v, g, S, z):
        options = dict(eps=1e-3, return_state=True, chunk_size=4)
        return normalized_linear_attention(q, k, v, g, initial_state=(S, z), **options)

    found = run(attend, *inputs, *state)
    assert_all_close(found, normalized(*inputs, eps=1e-3, state=state))


def test_normalized_step_by_step_is_the_sequence():
    inputs = positive("head", 6)
    state = ops.zeros((2, 2, 4, 3)), ops.zeros((2, 2, 4))
    step, outputs = compiled(normalized_linear_attention_step), []
    for t in range(6):
        y, state = step(*(ops.convert_to_tensor(x[:, t]) for x in inputs), state)
        outputs.append(y)
    assert_all_close((ops.stack(outputs, axis=1), state), normalized(*inputs))


def test_normalized_form_keeps_a_constant_value():
    q, k, v, _ = positive("none", 13)
    v[:] = 0.7
    for causal in (True, False):
        outputs = run(normalized_linear_attention, q, k, v, causal=causal)
        assert_close(outputs, v)


def test_all_steps_see_all_others_without_causality():
    q, k, v, _ = positive("none", 13, heads=4)
    attend = functools.partial(run, normalized_linear_attention, return_state=True)
    whole, state = attend(q, k, v, causal=False)
    causal, last = attend(q, k, v)
    assert_close(whole[:, -1], causal[:, -1])
    assert_all_close(state, last)
    assert_close(attend(q[:, ::-1], k, v, causal=False)[0], to_numpy(whole)[:, ::-1])
    with pytest.raises(ValueError, match="expected no log_decay"):
        tensors = [ops.convert_to_tensor(x) for x in positive("head", 3)]
        normalized_linear_attention(*tensors, causal=False)


def test_normalized_gradient_is_that_of_the_recurrence():
    inputs = positive("head", 5, key=2, value=2)
    attend = functools.partial(
        normalized_linear_attention, return_state=True, chunk_size=2
    )
    assert_gradients(attend, normalized, inputs)


@pytest.mark.parametrize("length", [1, 21])
def test_stabilized_form_is_the_recurrence(length):
    inputs = gates(length)
    state = some_state(), some_state()[..., 0], some_state()[:, :, 0, 0]

    def attend(*tensors):
        options = dict(return_state=True, chunk_size=4)
        state = tensors[5:]
        return stabilized_linear_attention(*tensors[:5], initial_state=state, **options)

    assert_all_close(run(attend, *inputs, *state), stabilized(*inputs, state=state))
    assert_close(run(stabilized_linear_attention, *inputs), stabilized(*inputs)[0])


def test_stabilized_step_by_step_is_the_sequence():
    inputs = gates(6)
    state = [ops.zeros(shape) for shape in ((2, 2, 4, 3), (2, 2, 4), (2, 2))]
    step, outputs = compiled(stabilized_linear_attention_step), []
    for t in range(6):
        y, state = step(*(ops.convert_to_tensor(x[:, t]) for x in inputs), state)
        outputs.append(y)
    assert_all_close((ops.stack(outputs, axis=1), state), stabilized(*inputs))


def test_stabilizer_cancels():
    q, k, v, i, f = gates(13)
    found = run(stabilized_linear_attention, q, k, v, i, f, eps=0.0)
    i, f = i.astype("float64")[..., None], f.astype("float64")
    outputs = recurrence(q, np.exp(i) * k, v, f)[0]
    sums = recurrence(q, np.exp(i) * k, np.ones_like(v[..., :1]), f)[0]
    assert_close(found, outputs / np.maximum(np.abs(sums), 1.0))


def test_saturated_gates_stay_exact():
    q, k, v, i, f = gates(24)
    i[:, 3], i[:, 4], i[:, 9:12], i[:, 20:] = 200.0, -200.0, -np.inf, -60.0
    f[:, 6], f[:, 10], f[:, 15] = -1e3, 0.0, -1e-7
    attend = functools.partial(stabilized_linear_attention, chunk_size=4)
    found = run(attend, q, k, v, i, f, return_state=True)
    assert_all_close(found, stabilized(q, k, v, i, f), 2e-5)  # m = 200 has 24 bits
    f[:, 9:12], i[:, 9:12] = -np.inf, -np.inf  # both gates closed
    found = gradients_in_all(attend, [q, k, v, i, f], 1.0)
    assert all(np.isfinite(x).all() for x in found)


def test_steps_with_closed_input_and_open_forget_gate_change_nothing():
    inputs = gates(13)
    inputs[3][:, 8:], inputs[4][:, 8:] = -np.inf, 0.0
    attend = functools.partial(
        run, stabilized_linear_attention, return_state=True, chunk_size=8
    )
    _, last = attend(*inputs)
    _, state = attend(*(x[:, :8] for x in inputs))
    assert_all_close(last, state, 1e-6)


def test_stabilized_gradient_is_that_of_the_recurrence():
    q, k, v, i, f = gates(5)
    q, k, v = q[..., :2], k[..., :2], v[..., :2]
    attend = functools.partial(stabilized_linear_attention, eps=0.0, chunk_size=2)

    def reference(*arrays):
        return stabilized(*arrays, eps=0.0)[0]

    assert_gradients(attend, reference, [q, k, v, i, f])


@keras.saving.register_keras_serializable("test_linear_attention")
class Mixer(layers.Layer):
    """(batch, time, features) -> (batch, time, 4 per form), forms side by side."""

    def __init__(self, forms, **kwargs):
        super().__init__(**kwargs)
        self.forms = forms

    def build(self, input_shape):
        self.dense = layers.Dense(4 * 4 + 2 * 2, name="dense")
        self.dense.build(input_shape)

    def call(self, x):
        x = self.dense(x)
        # Two heads of two channels; a reshape would need the length.
        q, k, v, g = (
            ops.stack([part[..., :2], part[..., 2:]], axis=2)
            for part in ops.split(x[..., :16], 4, axis=-1)
        )
        i, f = x[..., 16:18], -ops.softplus(-x[..., 18:])
        forms = {
            "channel": (linear_attention, q, k, v, -ops.softplus(g)),
            "stabilized": (stabilized_linear_attention, q, k, v, i, f),
            "grouped": (linear_attention, q[:, :, :1], k[:, :, :1], v, f),
        }
        calls = [forms[name] for name in self.forms]
        outputs = [function(*args, chunk_size=4) for function, *args in calls]
        y = ops.concatenate(outputs, axis=-1)
        return ops.concatenate([y[:, :, 0], y[:, :, 1]], axis=-1)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], 4 * len(self.forms))


def mixer_of(length, *forms):
    inputs = keras.Input((length, 3), name="inputs")
    x = Mixer(list(forms), name="mixer")(inputs)
    return EdificeModel(inputs, layers.Dense(1, name="dense")(x), name="model")


@pytest.mark.parametrize("length", [9, None])
def test_chunks_train_in_fit(length):
    model = mixer_of(length, "channel", "stabilized", "grouped")
    # XLA knows every length, so that the known one is enough for it.
    jit = keras.backend.backend() == "tensorflow" and length is not None
    model.compile(keras.optimizers.Adam(1e-2), "mse", jit_compile=jit or "auto")
    x = rng.normal(size=(16, 9, 3)).astype("float32")
    losses = []
    for size in (9,) if length else (9, 5, 9):  # TensorFlow then forgets the length
        target = np.cumsum(x[:, :size, :1], axis=1) / 3.0
        losses += model.fit(x[:, :size], target, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert np.isfinite(losses).all()


@pytest.mark.parametrize(
    ("format", "length", "forms"),
    [
        ("onnx", None, ("channel", "stabilized")),
        ("onnx", 9, ("stabilized",)),
        ("saved_model", None, ("channel",)),
    ],
)
def test_exports_give_the_same_numbers(format, length, forms, monkeypatch, tmp_path):
    for traced in (module, decay_products):
        monkeypatch.setattr(traced, "LONGEST", 16)  # fewer rounds to trace
    model, path = mixer_of(length, *forms), tmp_path / f"model.{format}"
    export(model, path, format, verify=False)
    x = rng.normal(size=(2, length or 13, 3)).astype("float32")
    (found,) = RUN[format](model, str(path), [[x]], str(tmp_path))
    assert_close(found[0], model.predict(x, verbose=0), 1e-4)
