import functools

import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.ops import linear_scan as module
from keras_edifice.ops.linear_scan import (
    METHODS,
    linear_scan,
    linear_scan_step,
    selective_scan,
    selective_step,
)
from keras_edifice.ops.tracing import export_scope
from tests.support.applied import gradients_in_all
from tests.support.close import assert_close, to_numpy
from tests.support.compiled import compiled
from tests.support.numerical import numerical_gradient

rng = np.random.default_rng(0)
LENGTHS = [1, 7, 16, 17, 40, 100]


def recurrence(decay, inputs, state=None):
    """h_t = a_t h_{t-1} + b_t, a loop in float64. (batch, time, ...) -> the same."""
    decay, inputs = np.asarray(decay, "float64"), np.asarray(inputs, "float64")
    state = np.zeros_like(inputs[:, 0]) if state is None else state
    states = []
    for t in range(inputs.shape[1]):
        state = decay[:, t] * state + inputs[:, t]
        states.append(state)
    return np.stack(states, axis=1)


def selective_recurrence(x, dt, A, B, C, state=None, discretization="euler_b"):
    """The equation of the module, a loop in float64, and the last state."""
    x, dt, A, B, C = (np.asarray(z, "float64") for z in (x, dt, A, B, C))
    state = np.zeros((len(x), *A.shape)) if state is None else state
    outputs = []
    for t in range(x.shape[1]):
        z = dt[:, t, :, None] * A
        weight = dt[:, t, :, None] if discretization == "euler_b" else np.expm1(z) / A
        state = np.exp(z) * state + weight * x[:, t, :, None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1))
    return np.stack(outputs, axis=1), state


def scan_arguments(length, shape=(3,)):
    decay = rng.uniform(0, 1, size=(2, length, *shape))
    decay[:, :: max(1, length // 3)] = 1.0  # exactly one and nearly zero
    decay[:, 1 :: max(1, length // 3)] = 1e-30
    inputs = rng.normal(size=(2, length, *shape))
    return decay.astype("float32"), inputs.astype("float32")


def selective_arguments(length, channels=3, size=4, dt_scale=0.5):
    x, dt = rng.normal(size=(2, 2, length, channels))
    B, C = rng.normal(size=(2, 2, length, size))
    A = -rng.uniform(0.1, 4.0, size=(channels, size))
    dt = dt_scale * np.log1p(np.exp(dt))
    return [z.astype("float32") for z in (x, dt, A, B, C)]


def tensors(*arrays):
    return [ops.convert_to_tensor(z) for z in arrays]


def scanned(*arrays, **options):
    """`selective_scan` of arrays."""
    scan = functools.partial(selective_scan, **options)
    return compiled(scan)(*tensors(*arrays))


@pytest.mark.parametrize("length", LENGTHS)
def test_scan_is_the_recurrence(length):
    decay, inputs = scan_arguments(length, (3, 2))
    state = rng.normal(size=(2, 3, 2)).astype("float32")
    scan = compiled(functools.partial(linear_scan, return_state=True))
    states, last = scan(*tensors(decay, inputs, state))
    expected = recurrence(decay, inputs, state)
    assert_close(states, expected)
    assert_close(last, expected[:, -1])
    assert_close(linear_scan(*tensors(decay, inputs)), recurrence(decay, inputs))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 7, 40])
@pytest.mark.parametrize("name", ["blocked", "doubling", "sequential"])
def test_every_form_is_the_recurrence(name, length, reverse):
    decay, inputs = scan_arguments(length)
    state = rng.normal(size=(2, 3)).astype("float32")
    time_first = [np.swapaxes(z, 0, 1) for z in (decay, inputs)]
    scan = functools.partial(getattr(module, name), reverse=reverse)
    states = compiled(scan)(*tensors(*time_first, state))
    if reverse:
        expected = recurrence(decay[:, ::-1], inputs[:, ::-1], state)[:, ::-1]
    else:
        expected = recurrence(decay, inputs, state)
    assert_close(np.swapaxes(to_numpy(states), 0, 1), expected)


def test_step_by_step_is_the_scan():
    decay, inputs = tensors(*scan_arguments(7))
    state, states = ops.zeros((2, 3)), []
    for t in range(7):
        state = linear_scan_step(decay[:, t], inputs[:, t], state)
        states.append(state)
    assert_close(linear_scan(decay, inputs), ops.stack(states, axis=1))


def test_segments_with_the_carried_state_are_one_pass():
    decay, inputs = tensors(*scan_arguments(40))
    first, state = linear_scan(decay[:, :23], inputs[:, :23], return_state=True)
    second = linear_scan(decay[:, 23:], inputs[:, 23:], state)
    whole = linear_scan(decay, inputs)
    assert_close(ops.concatenate([first, second], axis=1), whole)


@pytest.mark.parametrize("length", [1, 7, 17])
def test_scan_gradient_is_that_of_the_recurrence(length):
    decay, inputs = scan_arguments(length)
    arrays = [decay, inputs, rng.normal(size=(2, 3)).astype("float32")]
    weights = rng.normal(size=inputs.shape).astype("float32")
    found = gradients_in_all(linear_scan, arrays, weights)
    for i, gradient in enumerate(found):

        def value(z, i=i):
            return (recurrence(*arrays[:i], z, *arrays[i + 1 :]) * weights).sum()

        assert_close(gradient, numerical_gradient(value, arrays[i]), 1e-4)


def test_scan_keeps_the_dtype_and_computes_in_float32():
    decay = np.full((1, 1000, 1), 0.999, "float32")
    inputs = np.full((1, 1000, 1), 0.001, "float32")
    half = ops.cast(ops.convert_to_tensor(inputs), "bfloat16")
    states = linear_scan(ops.convert_to_tensor(decay), half)
    assert keras.backend.standardize_dtype(states.dtype) == "bfloat16"
    expected = recurrence(decay, to_numpy(half))
    # bfloat16 keeps 8 bits; summed in it, the state would stop growing at 0.25.
    assert_close(ops.cast(states, "float32"), expected, 1e-2)


@pytest.mark.parametrize("length", LENGTHS)
def test_selective_scan_is_the_recurrence(length):
    arguments = selective_arguments(length)
    y, last = scanned(*arguments)
    expected, expected_last = selective_recurrence(*arguments)
    assert_close(y, expected)
    assert_close(last, expected_last)


@pytest.mark.parametrize("length", [1, 17])
@pytest.mark.parametrize("discretization", ["euler_b", "zoh"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_the_selective_recurrence(method, discretization, length):
    arguments = selective_arguments(length)
    state = rng.normal(size=(2, 3, 4)).astype("float32")
    options = dict(method=method, chunk_size=7, discretization=discretization)
    y, last = scanned(*arguments, state, **options)
    expected, expected_last = selective_recurrence(*arguments, state, discretization)
    assert_close(y, expected)
    assert_close(last, expected_last)


@pytest.mark.parametrize("discretization", ["euler_b", "zoh"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_gradient_of_the_recurrence(method, discretization):
    arrays = selective_arguments(7, channels=2, size=2)
    arrays += [rng.normal(size=(2, 2, 2)).astype("float32")]
    weights = rng.normal(size=(2, 7 + 2, 2)).astype("float32")

    def joined(*arguments):
        y, last = selective_scan(
            *arguments, method=method, chunk_size=3, discretization=discretization
        )
        return ops.concatenate([y, last], axis=1)

    found = gradients_in_all(joined, arrays, weights)
    for i, gradient in enumerate(found):

        def value(z, i=i):
            y, last = selective_recurrence(
                *arrays[:i], z, *arrays[i + 1 :], discretization=discretization
            )
            return (np.concatenate([y, last], axis=1) * weights).sum()

        assert_close(gradient, numerical_gradient(value, arrays[i]), 1e-4)


@pytest.mark.parametrize("chunk_size", [1, 5, 16, 64])
def test_chunk_size_changes_nothing(chunk_size):
    arguments = selective_arguments(40)
    y, last = scanned(*arguments, chunk_size=chunk_size)
    expected, expected_last = scanned(*arguments, chunk_size=40)
    assert_close(y, expected)
    assert_close(last, expected_last)


def test_methods_agree_in_float64():
    if keras.backend.backend() == "jax":
        pytest.skip("JAX has float64 only if the whole process asks for it")
    arguments = [
        ops.convert_to_tensor(z, dtype="float64") for z in selective_arguments(100)
    ]
    expected = selective_recurrence(*(to_numpy(z) for z in arguments))[0]
    for method in METHODS:
        y = selective_scan(*arguments, method=method)[0]
        # `ops.cumsum` of Keras gives float32 on PyTorch, whatever it gets.
        rounded = method == "cumsum" and keras.backend.backend() == "torch"
        assert_close(y, expected, 1e-5 if rounded else 1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_long_and_strongly_decaying_sequences_stay_finite(method):
    # A = -16 at dt = 1 over 1024 steps: the product of decays is e^-16384.
    length = 1024 if method in ("auto", "cumsum") else 256
    x, dt, A, B, C = selective_arguments(length, channels=2, size=2)
    A, dt = np.full_like(A, -16.0), np.ones_like(dt)
    dt[:, length // 2 :] = 0.1
    y, _ = scanned(x, dt, A, B, C, method=method)
    assert_close(y, selective_recurrence(x, dt, A, B, C)[0])
    found = gradients_in_all(
        lambda *z: selective_scan(*z, method=method)[0], [x, dt, A, B, C], x
    )
    assert all(np.isfinite(gradient).all() for gradient in found)


def test_4096_steps_stay_near_the_recurrence():
    arguments = selective_arguments(4096, channels=2, size=2, dt_scale=0.01)
    assert_close(scanned(*arguments)[0], selective_recurrence(*arguments)[0])
    decay, inputs = scan_arguments(4096)
    assert_close(linear_scan(*tensors(decay, inputs)), recurrence(decay, inputs))


def test_sums_in_log_space_hold_large_inputs():
    x, dt, A, B, C = selective_arguments(40)
    x, dt = 1e6 * x, 40.0 * dt
    y, _ = scanned(x, dt, A, B, C, method="cumsum")
    assert_close(y / 1e6, selective_recurrence(x, dt, A, B, C)[0] / 1e6)


def test_doubling_takes_log2_rounds(monkeypatch):
    shifts, round_ = [], module.doubling_round
    monkeypatch.setattr(
        module,
        "doubling_round",
        lambda *args: shifts.append(args[-1]) or round_(*args),
    )
    for length, rounds in {1: 0, 2: 1, 16: 4, 17: 5}.items():
        shifts.clear()
        decay, inputs = np.ones((2, length, 1), "float32")
        states = module.doubling(*tensors(decay, inputs, np.zeros(1, "float32")))
        assert_close(states[:, 0], np.arange(1, length + 1))
        assert shifts == [2**r for r in range(rounds)]


def test_only_the_states_of_one_chunk_exist(monkeypatch):
    lengths, scan = [], module._scan
    monkeypatch.setattr(
        module,
        "_scan",
        lambda *args, **options: (
            lengths.append(args[3].shape[0]) or scan(*args, **options)
        ),
    )
    arguments = selective_arguments(100)
    gradients_in_all(
        lambda *z: selective_scan(*z, chunk_size=8)[0], arguments, arguments[0]
    )
    assert set(lengths) == {8}


def test_a_step_without_time_leaves_the_state():
    x, dt, A, B, C = selective_arguments(9)
    dt[:, 5:] = 0.0
    for discretization in ("euler_b", "zoh"):
        scan = functools.partial(scanned, discretization=discretization)
        _, last = scan(x, dt, A, B, C)
        _, state = scan(x[:, :5], dt[:, :5], A, B[:, :5], C[:, :5])
        assert_close(last, state, 1e-6)


@pytest.mark.parametrize("discretization", ["euler_b", "zoh"])
def test_selective_step_by_step_is_the_scan(discretization):
    x, dt, A, B, C = tensors(*selective_arguments(17))
    state, outputs = ops.zeros((2, 3, 4)), []
    for t in range(17):
        arguments = x[:, t], dt[:, t], A, B[:, t], C[:, t], state
        y, state = selective_step(*arguments, discretization)
        outputs.append(y)
    y, last = selective_scan(x, dt, A, B, C, discretization=discretization)
    assert_close(y, ops.stack(outputs, axis=1))
    assert_close(last, state)


def test_held_input_follows_theorem_1_of_the_paper():
    # N = 1, A = -1, B = C = 1: h = (1 - g) h + g x with g = sigmoid(δ).
    x, delta = rng.normal(size=(2, 2, 20, 3)).astype("float32")
    ones = np.ones((2, 20, 1), "float32")
    A, dt = -np.ones((3, 1), "float32"), np.log1p(np.exp(delta))
    y, _ = scanned(x, dt, A, ones, ones, discretization="zoh")
    gate = 1 / (1 + np.exp(-delta.astype("float64")))
    assert_close(y, recurrence(1 - gate, gate * x))


def test_held_input_is_exact_for_short_steps():
    x, dt, A, B, C = selective_arguments(20)
    dt = dt * 1e-4
    y, _ = scanned(x, dt, A, B, C, discretization="zoh")
    expected, _ = selective_recurrence(x, dt, A, B, C, discretization="zoh")
    assert_close(y * 1e4, expected * 1e4)


def test_export_takes_the_whole_length_at_once(monkeypatch):
    arguments = tensors(*selective_arguments(40))
    expected = selective_scan(*arguments)[0]
    monkeypatch.setattr(module.ops, "scan", None)  # no loop in the traced graph
    with export_scope("onnx"):
        assert_close(selective_scan(*arguments)[0], expected)


def test_unknown_length_trains_and_predicts():
    inputs = [
        keras.Input((None, 3)),
        keras.Input((None, 3)),
        keras.Input((None, 4)),
        keras.Input((None, 4)),
    ]
    model = keras.Model(inputs, SelectiveWeight()(inputs))
    model.compile("sgd", "mse")
    for length in (9, 5, 12):  # TensorFlow forgets the length after the second
        x, dt, _, B, C = selective_arguments(length)
        model.fit([x, dt, B, C], x, verbose=0)
        A = -np.exp(to_numpy(model.layers[-1].A_log))
        y = model.predict([x, dt, B, C], verbose=0)
        assert_close(y, selective_recurrence(x, dt, A, B, C)[0])


@keras.saving.register_keras_serializable("tests")
class SelectiveWeight(keras.layers.Layer):
    """A selective scan with a trained A."""

    def build(self, *_):
        self.A_log = self.add_weight((3, 4), "zeros", name="A_log")

    def call(self, inputs):
        x, dt, B, C = inputs
        return selective_scan(x, dt, -ops.exp(self.A_log), B, C)[0]

    def compute_output_shape(self, input_shape):
        return input_shape[0]
