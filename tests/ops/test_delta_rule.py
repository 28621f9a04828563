import functools

import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.exporting import export
from keras_edifice.ops import delta_rule as module
from keras_edifice.ops.delta_rule import (
    delta_rule,
    delta_rule_step,
    dplr,
    dplr_step,
    unit_lower_inverse,
)
from keras_edifice.ops.tracing import export_scope
from tests.support.applied import gradients_in_all
from tests.support.close import assert_close, to_numpy
from tests.support.compiled import compiled
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake

rng = np.random.default_rng(0)
DECAYS = ["none", "head", "channel"]


def decayed(state, log_decay, t):
    """diag(e^g) S."""
    if log_decay is None:
        return state
    decay = np.exp(np.asarray(log_decay[:, t], "float64"))
    return decay.reshape(*decay.shape, *[1] * (4 - decay.ndim)) * state


def zero_state(k, v):
    return np.zeros((len(k), k.shape[2], k.shape[3], v.shape[3]))


def delta_recurrence(q, k, v, beta, log_decay=None, state=None):
    """The equation of the module, a loop in float64, and the last state."""
    q, k, v, beta = (np.asarray(x, "float64") for x in (q, k, v, beta))
    state, outputs = zero_state(k, v) if state is None else state, []
    for t in range(q.shape[1]):
        state = decayed(state, log_decay, t)
        error = v[:, t] - np.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + np.einsum("bh,bhk,bhv->bhkv", beta[:, t], k[:, t], error)
        outputs.append(np.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return np.stack(outputs, axis=1), state


def dplr_recurrence(q, k, v, a, b, log_decay=None, state=None):
    """The equation of the module, a loop in float64, and the last state."""
    q, k, v, a, b = (np.asarray(x, "float64") for x in (q, k, v, a, b))
    state, outputs = zero_state(k, v) if state is None else state, []
    for t in range(q.shape[1]):
        removed = np.einsum("bhi,bhj,bhjv->bhiv", b[:, t], a[:, t], state)
        added = np.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        state = decayed(state, log_decay, t) + removed + added
        outputs.append(np.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return np.stack(outputs, axis=1), state


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def log_decays(kind, length, heads, keys, largest=2.0):
    shape = (2, length, heads) if kind == "head" else (2, length, heads, keys)
    decay = -largest * rng.uniform(size=shape) ** 2
    decay[:, :: max(1, length // 3)] = 0.0  # a decay of exactly one
    decay[:, 1 :: max(1, length // 3)] = -80.0  # and one near zero
    return None if kind == "none" else decay.astype("float32")


def delta_arguments(length, kind, heads=2, keys=6, values=5, **options):
    q, k = unit(rng.normal(size=(2, 2, length, heads, keys)))
    v = rng.normal(size=(2, length, heads, values))
    beta = rng.uniform(0, 2, size=(2, length, heads))  # above 1: eigenvalues below 0
    arrays = [x.astype("float32") for x in (q, k, v, beta)]
    return [*arrays, log_decays(kind, length, heads, keys, **options)]


def dplr_arguments(length, kind, heads=2, keys=6, values=5, **options):
    q, k, v, _, decay = delta_arguments(length, kind, heads, keys, values, **options)
    erased = unit(rng.normal(size=k.shape))
    b = 0.8 * erased * rng.uniform(size=k.shape)
    return [q, k, v, (-erased).astype("float32"), b.astype("float32"), decay]


RULES = {
    "delta_rule": (delta_rule, delta_recurrence, delta_arguments),
    "dplr": (dplr, dplr_recurrence, dplr_arguments),
}


def tensors(*arrays):
    return [None if x is None else ops.convert_to_tensor(x) for x in arrays]


def run(rule, *arrays, chunk_size=8):
    """Outputs and last state of a rule."""
    call = functools.partial(rule, return_state=True, chunk_size=chunk_size)
    return compiled(call)(*tensors(*arrays))


def initial_state(heads=2, keys=6, values=5):
    return rng.normal(size=(2, heads, keys, values)).astype("float32")


@pytest.mark.parametrize("size", [1, 2, 7, 33, 64])
def test_inverse_is_the_inverse(size):
    T = rng.normal(size=(3, 2, size, size)).astype("float32") / 3
    lower = np.tril(T.astype("float64"), -1) + np.eye(size)
    inverse = compiled(unit_lower_inverse)(*tensors(T))
    assert_close(inverse, np.linalg.inv(lower))


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_inverse_is_exact_for_identical_keys(beta):
    # The powers of this matrix grow to 1e18: a series of them would be lost.
    T = beta * np.tril(np.ones((64, 64)), -1) + np.eye(64)
    inverse = compiled(unit_lower_inverse)(*tensors(T.astype("float32")))
    assert_close(inverse, np.linalg.inv(T), 1e-6)


def test_inverse_has_the_gradient_of_the_inverse():
    T = rng.normal(size=(1, 5, 5)).astype("float32")
    weights = rng.normal(size=T.shape).astype("float32")

    def value(z):
        return (np.linalg.inv(np.tril(z, -1) + np.eye(5)) * weights).sum()

    (found,) = gradients_in_all(unit_lower_inverse, [T], weights)
    assert_close(found, numerical_gradient(value, T), 1e-4)


@pytest.mark.parametrize(
    ("kind", "length"), [("none", 40), ("head", 40), ("channel", 40), ("channel", 1)]
)
@pytest.mark.parametrize("name", RULES)
def test_chunks_are_the_recurrence(name, kind, length):
    rule, recurrence, arguments = RULES[name]
    arrays, state = arguments(length, kind), initial_state()
    y, last = run(rule, *arrays, state, chunk_size=16)
    expected, expected_last = recurrence(*arrays, state)
    assert_close(y, expected)
    assert_close(last, expected_last)


@pytest.mark.parametrize(
    ("name", "chunk_size"),
    [("delta_rule", 1), ("delta_rule", 5), ("delta_rule", 64), ("dplr", 64)],
)
def test_chunk_size_changes_nothing(name, chunk_size):
    rule, recurrence, arguments = RULES[name]
    arrays = arguments(70, "channel")
    assert_close(run(rule, *arrays, chunk_size=chunk_size)[0], recurrence(*arrays)[0])


@pytest.mark.parametrize(
    ("name", "kind", "form"),
    [
        *(("delta_rule", kind, "_as_loop") for kind in DECAYS),
        *(("dplr", kind, "_as_loop") for kind in ("head", "channel")),
        ("delta_rule", "head", "_as_maps"),
        ("dplr", "channel", "_as_maps"),
    ],
)
def test_gradient_is_that_of_the_recurrence(name, kind, form, monkeypatch):
    monkeypatch.setattr(module, "_as_loop", getattr(module, form))
    rule, recurrence, arguments = RULES[name]
    *arrays, decay = arguments(6, kind, heads=1, keys=3, values=2)
    state = initial_state(1, 3, 2)
    arrays += [state] if decay is None else [decay, state]
    weights = rng.normal(size=(2, 6 + 3, 1, 2)).astype("float32")

    def complete(arguments):
        *before, state = arguments
        return [*before, None, state] if decay is None else arguments

    def joined(*arguments):
        y, last = rule(*complete(arguments), return_state=True, chunk_size=4)
        return ops.concatenate([y, ops.swapaxes(last, 1, 2)], axis=1)

    found = gradients_in_all(joined, arrays, weights)
    for i, gradient in enumerate(found):

        def value(z, i=i):
            y, last = recurrence(*complete([*arrays[:i], z, *arrays[i + 1 :]]))
            return (np.concatenate([y, last.swapaxes(1, 2)], 1) * weights).sum()

        assert_close(gradient, numerical_gradient(value, arrays[i]), 1e-4)


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize(
    ("name", "step"), [("delta_rule", delta_rule_step), ("dplr", dplr_step)]
)
def test_step_by_step_is_the_recurrence(name, step, kind):
    _, recurrence, arguments = RULES[name]
    arrays = arguments(9, kind)
    expected, last = recurrence(*arrays)
    arrays = tensors(*arrays)
    state, outputs = ops.zeros((2, 2, 6, 5)), []
    step = compiled(step)
    for t in range(9):
        y, state = step(*(None if x is None else x[:, t] for x in arrays), state)
        outputs.append(y)
    assert_close(ops.stack(outputs, axis=1), expected)
    assert_close(state, last)


@pytest.mark.parametrize("name", RULES)
def test_segments_with_the_carried_state_are_one_pass(name):
    rule, recurrence, arguments = RULES[name]
    arrays, state = arguments(40, "channel"), initial_state()
    expected, expected_last = recurrence(*arrays, state)
    segment = compiled(functools.partial(rule, return_state=True, chunk_size=8))
    first, state = segment(*tensors(*(x[:, :20] for x in arrays), state))
    second, last = segment(*tensors(*(x[:, 20:] for x in arrays)), state)
    assert_close(np.concatenate([to_numpy(first), to_numpy(second)], 1), expected)
    assert_close(last, expected_last)


@pytest.mark.parametrize("kind", ["head", "channel"])
@pytest.mark.parametrize("name", RULES)
def test_any_decay_is_exact(name, kind):
    # Weak decays after strong ones: differences of sums of 1e5 would lose them.
    rule, recurrence, arguments = RULES[name]
    *arrays, decay = arguments(64, kind)
    choice = rng.integers(4, size=decay.shape)
    decay = np.asarray([0.0, -1e-3, -0.5, -1e4], "float32")[choice]
    y, last = run(rule, *arrays, decay, chunk_size=64)
    expected, expected_last = recurrence(*arrays, decay)
    assert_close(y, expected)
    assert_close(last, expected_last)


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_gradients_of_any_decay_are_exact(kind):
    *arrays, decay = delta_arguments(6, kind, heads=1, keys=2, values=2)
    choice = rng.integers(3, size=decay.shape)
    arrays += [np.asarray([-1e-3, -0.5, -1e4], "float32")[choice]]
    weights = rng.normal(size=(2, 6, 1, 2)).astype("float32")
    found = gradients_in_all(delta_rule, arrays, weights)
    for i, gradient in enumerate(found):

        def value(z, i=i):
            arguments = [*arrays[:i], z, *arrays[i + 1 :]]
            return (delta_recurrence(*arguments)[0] * weights).sum()

        assert_close(gradient, numerical_gradient(value, arrays[i]), 1e-4)


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_without_memory_only_the_current_token_is_seen(kind):
    q, k, v, beta, decay = delta_arguments(20, kind)
    y, _ = run(delta_rule, q, k, v, beta, np.full_like(decay, -np.inf))
    read = (q * k).sum(-1) * beta
    assert_close(y, read[..., None] * v)


@pytest.mark.parametrize(
    # At β = 2 what a key holds is mirrored at each step and never shrinks: rounding
    # adds up over the sequence, and more so in long chunks.
    ("beta", "chunk_size", "tolerance"),
    [(1.0, 64, 1e-5), (2.0, 16, 1e-4)],
)
@pytest.mark.parametrize("kind", ["none", "channel"])
def test_identical_keys_are_exact(kind, beta, chunk_size, tolerance):
    q, k, v, _, decay = delta_arguments(130, kind, largest=0.1)
    k = np.broadcast_to(k[:, :1], k.shape)
    betas = np.full(k.shape[:3], beta, "float32")
    y, last = run(delta_rule, q, k, v, betas, decay, chunk_size=chunk_size)
    expected, expected_last = delta_recurrence(q, k, v, betas, decay)
    assert_close(y, expected, tolerance)
    assert_close(last, expected_last, tolerance)


def test_what_was_written_is_read_and_the_last_value_of_a_key_stays():
    k = unit(rng.normal(size=(2, 40, 2, 6))).astype("float32")
    k[:, 20:] = k[:, :20]
    v = rng.normal(size=(2, 40, 2, 5)).astype("float32")
    y, _ = run(delta_rule, k, k, v, np.ones((2, 40, 2), "float32"))
    assert_close(y, v)


def test_orthonormal_keys_add_up_as_in_linear_attention():
    k = np.broadcast_to(np.eye(6, dtype="float32")[None, :, None], (2, 6, 2, 6))
    q, v = rng.normal(size=(2, 2, 6, 2, 6)).astype("float32")
    y, _ = run(delta_rule, q, k, v, np.ones((2, 6, 2), "float32"))
    scores = np.tril(np.einsum("bthk,bshk->bhts", q, k))
    assert_close(y, np.einsum("bhts,bshv->bthv", scores, v))


def test_a_channelwise_decay_of_equal_channels_is_the_one_per_head():
    q, k, v, beta, decay = delta_arguments(40, "head")
    wide = np.repeat(decay[..., None], 6, axis=-1)
    expected, _ = delta_recurrence(q, k, v, beta, decay)
    assert_close(run(delta_rule, q, k, v, beta, wide)[0], expected)


def test_delta_rule_is_a_case_of_dplr():
    q, k, v, beta, decay = delta_arguments(40, "channel")
    weighted = beta[..., None] * k
    y, last = run(dplr, q, weighted, v, np.exp(decay) * k, -weighted, decay)
    expected, expected_last = delta_recurrence(q, k, v, beta, decay)
    assert_close(y, expected)
    assert_close(last, expected_last)


def test_dplr_is_the_state_of_rwkv_7():
    # S_t = S_{t-1} diag(w) - (S_{t-1} κ̂) (κ̂ ⊙ a)ᵀ + v kᵀ, values in rows.
    r, k, v, _, decay = delta_arguments(20, "channel", heads=1, largest=0.6)
    kappa, a = unit(rng.normal(size=k.shape)), rng.uniform(size=k.shape)
    S, outputs = np.zeros((2, 5, 6)), []
    for t in range(20):
        erased = np.einsum("bvk,bk->bv", S, kappa[:, t, 0])
        S = S * np.exp(decay[:, t].astype("float64"))
        S = S - erased[..., None] * (kappa * a)[:, t]
        S = S + v[:, t, 0, :, None] * k[:, t]
        outputs.append(np.einsum("bvk,bk->bv", S, r[:, t, 0]))
    kappa, a = kappa.astype("float32"), a.astype("float32")
    y, last = run(dplr, r, k, v, -kappa, kappa * a, decay)
    assert_close(y[:, :, 0], np.stack(outputs, axis=1))
    assert_close(np.swapaxes(to_numpy(last), 2, 3)[:, 0], S)


def test_dplr_without_a_and_b_is_a_decayed_sum():
    q, k, v, _, _, decay = dplr_arguments(20, "channel")
    zeros = np.zeros_like(k)
    _, last = run(dplr, q, k, v, zeros, zeros, decay)
    decay = decay.astype("float64")
    rest = decay.sum(1, keepdims=True) - np.cumsum(decay, axis=1)
    assert_close(last, np.einsum("bthk,bthv->bhkv", k * np.exp(rest), v))


@pytest.mark.parametrize("name", RULES)
def test_a_masked_step_leaves_the_state(name):
    rule, recurrence, arguments = RULES[name]
    arrays = arguments(9, "channel")
    silent = {"delta_rule": [3, 4], "dplr": [1, 4, 5]}[name]  # beta, or k and b; g
    for i in silent:
        arrays[i][:, 5:] = 0.0
    _, last = run(rule, *arrays)
    assert_close(last, recurrence(*(x[:, :5] for x in arrays))[1])


@pytest.mark.parametrize("name", RULES)
def test_future_steps_do_not_change_the_past(name):
    rule, _, arguments = RULES[name]
    arrays, call = (
        arguments(20, "channel"),
        compiled(functools.partial(rule, chunk_size=8)),
    )
    expected = to_numpy(call(*tensors(*arrays)))
    for x in arrays:
        x[:, 11:] = -0.5
    y = to_numpy(call(*tensors(*arrays)))
    assert_close(y[:, :11], expected[:, :11], 1e-6)
    assert np.abs(y - expected)[:, 11:].max(axis=(0, 2, 3)).min() > 0


@pytest.mark.parametrize("name", RULES)
def test_half_precision_is_computed_in_float32(name):
    rule, recurrence, arguments = RULES[name]
    arrays = arguments(300, "head", largest=0.01)
    half = [ops.cast(x, "bfloat16") for x in tensors(*arrays)]
    y, last = compiled(functools.partial(rule, return_state=True))(*half)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    assert keras.backend.standardize_dtype(last.dtype) == "float32"
    expected, expected_last = recurrence(*(ops.cast(x, "float32") for x in half))
    assert_close(last, expected_last)
    assert_close(ops.cast(y, "float32"), expected, 1e-2)  # bfloat16 keeps 8 bits


def test_float64_is_kept():
    if keras.backend.backend() == "jax":
        pytest.skip("JAX has float64 only if the whole process asks for it")
    for rule, recurrence, arguments in RULES.values():
        arrays = [ops.convert_to_tensor(x, "float64") for x in arguments(40, "head")]
        expected, last = recurrence(*(to_numpy(x) for x in arrays))
        y, state = rule(*arrays, return_state=True, chunk_size=16)
        # `ops.cumsum` of Keras gives float32 on PyTorch, whatever it gets.
        rounded = keras.backend.backend() == "torch"
        assert_close(y, expected, 1e-5 if rounded else 1e-10)
        assert_close(state, last, 1e-5 if rounded else 1e-10)


@pytest.mark.parametrize("name", RULES)
def test_4096_steps_stay_near_the_recurrence(name):
    rule, recurrence, arguments = RULES[name]
    arrays = arguments(4096, "channel", heads=1, keys=4, values=2, largest=0.01)
    y, last = run(rule, *arrays)
    expected, expected_last = recurrence(*arrays)
    assert_close(y, expected)
    assert_close(last, expected_last)


def test_no_tensor_grows_faster_than_the_length(monkeypatch):
    sizes, matmul = [], ops.matmul

    def recorded(*args):
        product = matmul(*args)
        sizes.append(np.prod([int(n) for n in product.shape]))
        return product

    monkeypatch.setattr(module.ops, "matmul", recorded)
    largest = []
    for length in (8, 32):
        sizes.clear()
        arrays = dplr_arguments(length, "channel")
        call = functools.partial(dplr, chunk_size=2)
        gradients_in_all(call, arrays, arrays[2])
        largest.append(max(sizes))
    assert largest[1] == 4 * largest[0]


@pytest.mark.parametrize("name", RULES)
def test_the_form_of_onnx_has_the_same_numbers_and_no_loop(name, monkeypatch):
    rule, recurrence, arguments = RULES[name]
    arrays = [*arguments(20, "channel"), initial_state()]
    expected, expected_last = recurrence(*arrays)
    monkeypatch.setattr(module.ops, "scan", None)
    with export_scope("onnx"):
        y, last = run(rule, *arrays, chunk_size=4)
    assert_close(y, expected)
    assert_close(last, expected_last)


def test_chunks_of_no_steps_are_refused():
    arrays = tensors(*delta_arguments(3, "none"))
    with pytest.raises(ValueError, match="at least 1, received 0"):
        delta_rule(*arrays, chunk_size=0)


@keras.saving.register_keras_serializable("tests")
class Corrected(keras.layers.Layer):
    """A rule on projections of the input: (batch, time, features) -> (..., 4)."""

    def __init__(self, rule, **kwargs):
        super().__init__(**kwargs)
        self.rule = rule
        names = ["q", "k", "v", "beta", "a", "decay"]
        self.projections = [keras.layers.Dense(4, name=name) for name in names]

    def build(self, input_shape):
        for layer in self.projections:
            layer.build(input_shape)

    def call(self, x):
        q, k, v, beta, a, decay = (
            ops.reshape(layer(x), (-1, *ops.shape(x)[1:2], 2, 2))
            for layer in self.projections
        )
        k, a = (x / ops.sqrt(ops.sum(x * x, -1, keepdims=True) + 1e-3) for x in (k, a))
        beta, decay = ops.sigmoid(beta), -ops.softplus(decay)
        if self.rule == "dplr":
            y = dplr(q, k, v, -a, a * beta, decay, chunk_size=4)
        else:
            y = delta_rule(q, k, v, beta[..., 0], decay[..., 0], chunk_size=4)
        return ops.reshape(y, (-1, *ops.shape(x)[1:2], 4))

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], 4)


def corrected(length, rule):
    inputs = keras.Input((length, 3), name="inputs")
    return shake(keras.Model(inputs, Corrected(rule)(inputs), name="corrected"))


@pytest.mark.parametrize(
    ("format", "rule"), [("onnx", "dplr"), ("saved_model", "delta_rule")]
)
def test_any_length_is_exported(format, rule, tmp_path):
    path = tmp_path / ("model.onnx" if format == "onnx" else "model")
    # An open length goes from JAX to ONNX by way of TensorFlow: tested there.
    frozen = format == "onnx" and keras.backend.backend() == "jax"
    assert export(corrected(9 if frozen else None, rule), path, format) <= 1e-5


def test_unknown_length_trains_and_predicts():
    model = corrected(None, "dplr")
    model.compile("sgd", "mse")
    tensorflow = keras.backend.backend() == "tensorflow"
    # TensorFlow forgets the length after the second; the others trace each anew.
    for length in (9, 5, 12) if tensorflow else (9,):
        x = rng.normal(size=(2, length, 3)).astype("float32")
        before = to_numpy(model.trainable_variables[0])
        model.fit(x, np.ones((2, length, 4)), verbose=0)
        assert np.abs(to_numpy(model.trainable_variables[0]) - before).max() > 0
        expected = compiled(model.layers[-1])(ops.convert_to_tensor(x))
        assert_close(model.predict(x, verbose=0), expected)


def test_training_compiled_by_xla_is_that_of_eager_code():
    if keras.backend.backend() != "tensorflow":
        pytest.skip("only TensorFlow has two compilers; the test above trains")
    x, trained = rng.normal(size=(2, 9, 3)).astype("float32"), []
    for options in (dict(jit_compile=True), dict(run_eagerly=True)):
        keras.utils.set_random_seed(0)
        model = corrected(9, "dplr")
        model.compile(keras.optimizers.SGD(0.1), "mse", **options)
        model.fit(x, np.ones((2, 9, 4)), verbose=0)
        trained.append(model.get_weights())
    for one, other in zip(*trained, strict=True):
        assert_close(one, other)
