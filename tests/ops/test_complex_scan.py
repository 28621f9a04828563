import functools

import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.exporting import export
from keras_edifice.ops import complex_scan as module
from keras_edifice.ops.complex_scan import (
    complex_linear_scan,
    complex_linear_scan_step,
)
from keras_edifice.ops.linear_scan import linear_scan
from keras_edifice.ops.tracing import export_scope
from tests.support.applied import assert_same_gradients, gradients_in_all
from tests.support.close import assert_close, to_numpy
from tests.support.compiled import compiled

rng = np.random.default_rng(0)


def recurrence(decay, inputs, state=None):
    """h_t = a_t h_{t-1} + b_t in complex128; a decay without time is for all steps."""
    if decay.ndim < inputs.ndim:
        decay = np.broadcast_to(decay, inputs.shape)
    state = np.zeros_like(inputs[:, 0]) if state is None else state
    states = []
    for t in range(inputs.shape[1]):
        state = decay[:, t] * state + inputs[:, t]
        states.append(state)
    return np.stack(states, axis=1)


def complex_normal(*shape):
    z = rng.normal(size=(2, *shape)).astype("float32").astype("float64")
    return z[0] + 1j * z[1]


def decays(kind, length, shape=(3,)):
    """Decays of all sizes up to exactly one, of every phase."""
    shape = shape if kind == "constant" else (2, length, *shape)
    size = rng.uniform(0, 1, size=shape)
    size.flat[::4], size.flat[1::4] = 1.0, 1e-30
    z = size * np.exp(1j * rng.uniform(-np.pi, np.pi, size=shape))
    z.flat[:1] = 1.0
    return z.real.astype("float32") + 1j * z.imag.astype("float32")


def pair(z):
    return tuple(
        ops.convert_to_tensor(np.asarray(part, "float32")) for part in (z.real, z.imag)
    )


def number(pair):
    return to_numpy(pair[0]) + 1j * to_numpy(pair[1])


def assert_pair_close(actual, expected, tolerance=1e-5):
    assert_close(actual[0], expected.real, tolerance)
    assert_close(actual[1], expected.imag, tolerance)


@pytest.mark.parametrize("kind", ["varying", "constant"])
@pytest.mark.parametrize("length", [1, 7, 16, 17, 300])
def test_scan_is_the_recurrence(length, kind):
    shape = (3, 2)
    decay, inputs = decays(kind, length, shape), complex_normal(2, length, *shape)
    state = complex_normal(2, *shape)
    scan = compiled(functools.partial(complex_linear_scan, return_state=True))
    states, last = scan(pair(decay), pair(inputs), pair(state))
    expected = recurrence(decay, inputs, state)
    # Where the decay is one, the states grow as the root of the length.
    assert_pair_close(states, expected, 2e-5)
    assert_pair_close(last, expected[:, -1], 2e-5)


@pytest.mark.parametrize("kind", ["varying", "constant"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 7, 40])
@pytest.mark.parametrize("name", ["blocked", "doubling", "sequential"])
def test_every_form_is_the_recurrence(name, length, reverse, kind):
    decay, inputs = decays(kind, length), complex_normal(2, length, 3)
    state = complex_normal(2, 3)
    scan = functools.partial(getattr(module, name), reverse=reverse)
    found = compiled(scan)(pair(decay), pair(inputs), pair(state))
    if reverse:
        decay = decay[:, ::-1] if kind == "varying" else decay
        expected = recurrence(decay, inputs[:, ::-1], state)[:, ::-1]
    else:
        expected = recurrence(decay, inputs, state)
    assert_pair_close(found, expected)


@pytest.mark.parametrize("kind", ["varying", "constant"])
@pytest.mark.parametrize("length", [1, 17])
def test_gradient_is_that_of_the_recurrence(length, kind):
    decay = decays(kind, length, (2,))
    complexes = [decay, complex_normal(2, length, 2), complex_normal(2, 2)]
    arrays = [part for z in complexes for part in (z.real, z.imag)]
    arrays = [np.ascontiguousarray(z, "float32") for z in arrays]

    def function(a, b, c, d, e, f):
        states, last = complex_linear_scan((a, b), (c, d), (e, f), return_state=True)
        return ops.concatenate(
            [
                ops.concatenate([z, ops.expand_dims(s, 1)], 1)
                for z, s in zip(states, last, strict=True)
            ],
            axis=1,
        )

    def reference(a, b, c, d, e, f):
        states = recurrence(a + 1j * b, c + 1j * d, e + 1j * f)
        states = np.concatenate([states, states[:, -1:]], axis=1)
        return np.concatenate([states.real, states.imag], axis=1)

    assert_same_gradients(function, reference, arrays)


@pytest.mark.parametrize("kind", ["varying", "constant"])
def test_step_by_step_is_the_scan(kind):
    decay, inputs = decays(kind, 7), complex_normal(2, 7, 3)
    state, states = pair(np.zeros((2, 3))), []
    for t in range(7):
        now = pair(decay[:, t] if kind == "varying" else decay)
        state = complex_linear_scan_step(now, pair(inputs[:, t]), state)
        states.append(number(state))
    scanned = compiled(complex_linear_scan)(pair(decay), pair(inputs))
    assert_pair_close(scanned, np.stack(states, axis=1))


@pytest.mark.parametrize("kind", ["varying", "constant"])
def test_segments_with_the_carried_state_are_one_pass(kind):
    decay, inputs = decays(kind, 40), complex_normal(2, 40, 3)
    first, second = decay, decay
    if kind == "varying":
        first, second = decay[:, :23], decay[:, 23:]
    scan = compiled(functools.partial(complex_linear_scan, return_state=True))
    before, state = scan(pair(first), pair(inputs[:, :23]))
    after, _ = scan(pair(second), pair(inputs[:, 23:]), state)
    whole = compiled(complex_linear_scan)(pair(decay), pair(inputs))
    joined = np.concatenate([number(before), number(after)], axis=1)
    assert_pair_close(whole, joined)


def test_real_numbers_are_those_of_the_real_scan():
    decay, inputs = decays("varying", 20).real, complex_normal(2, 20, 3).real
    re, im = compiled(complex_linear_scan)(pair(decay), pair(inputs))
    assert_close(re, compiled(linear_scan)(pair(decay)[0], pair(inputs)[0]), 1e-6)
    assert_close(im, np.zeros_like(im), 0)


def test_4096_steps_stay_near_the_recurrence():
    decay, inputs = decays("constant", 4096), complex_normal(2, 4096, 3)
    # Rounding turns a state of modulus one a little at every step.
    expected = recurrence(decay, inputs)
    found = compiled(complex_linear_scan)(pair(decay), pair(inputs))
    assert_pair_close([z / 100 for z in found], expected / 100)


def test_growth_after_the_end_of_a_short_sequence_does_no_harm(monkeypatch):
    # 1.1^65536 is infinite, and the form for unknown lengths squares up to it.
    decay, inputs = np.array([1.1 + 0j]), complex_normal(1, 9, 1)
    monkeypatch.setattr(module, "static_length", lambda *_: None)
    found = compiled(complex_linear_scan)(pair(decay), pair(inputs))
    assert_pair_close(found, recurrence(decay, inputs))


def test_scan_keeps_the_dtype_and_computes_in_float32():
    inputs = np.full((1, 1000, 1), 0.001 + 0.001j)
    half = tuple(ops.cast(part, "bfloat16") for part in pair(inputs))
    decay = pair(np.array([0.999 + 0j]))
    states, last = complex_linear_scan(decay, half, return_state=True)
    dtype = keras.backend.standardize_dtype
    assert dtype(states[0].dtype) == "bfloat16"
    assert dtype(last[1].dtype) == "float32"
    kept = to_numpy(ops.cast(half[0], "float32"))
    expected = recurrence(np.array([0.999 + 0j]), kept + 1j * kept)
    # bfloat16 keeps 8 bits; summed in it, the state would stop growing at 0.25.
    assert_close(ops.cast(states[1], "float32"), expected.imag, 1e-2)
    assert_close(last[0], expected[:, -1].real)


def test_the_decay_must_suit_the_inputs():
    inputs = pair(complex_normal(2, 5, 3))
    with pytest.raises(ValueError, match=r"decay must be .* received \(5, 3\)"):
        complex_linear_scan(pair(complex_normal(5, 3)), inputs)


def test_a_constant_decay_is_never_held_for_every_step(monkeypatch):
    shapes, times = set(), module.times

    def seen(a, b):
        shapes.add(tuple(a[0].shape))
        return times(a, b)

    monkeypatch.setattr(module, "times", seen)
    decay, inputs = decays("constant", 64, (2,)), complex_normal(3, 64, 2)
    compiled(module.blocked)(pair(decay), pair(inputs), pair(complex_normal(3, 2)))
    assert shapes == {(2,)}


@keras.saving.register_keras_serializable("tests")
class Rotating(keras.layers.Layer):
    """(batch, time, features) -> the same: a scan with trained or driven decays."""

    def __init__(self, kind, **kwargs):
        super().__init__(**kwargs)
        self.kind = kind

    def build(self, input_shape):
        shape = (2, input_shape[-1])
        self.rate = self.add_weight(shape, "random_normal", name="rate")

    def call(self, x):
        size, turn = ops.sigmoid(self.rate[0]), self.rate[1] * 10.0
        decay = size * ops.cos(turn), size * ops.sin(turn)
        if self.kind == "varying":
            decay = tuple(ops.sigmoid(x) * part for part in decay)
        re, im = complex_linear_scan(decay, (x, 0.5 * x))
        return re - im

    def compute_output_shape(self, input_shape):
        return input_shape


def model_of(kind, length):
    inputs = keras.Input((length, 3), name="inputs")
    return keras.Model(inputs, Rotating(kind, name="scan")(inputs), name="model")


@pytest.fixture
def fewer_rounds(monkeypatch):
    """The form for unknown lengths reaches 64 steps, and compiles faster."""
    monkeypatch.setattr(module, "LONGEST", 64)


@pytest.mark.parametrize("kind", ["varying", "constant"])
def test_unknown_length_trains_and_predicts(kind, fewer_rounds):
    model = model_of(kind, None)
    model.compile("sgd", "mse")
    tensorflow = keras.backend.backend() == "tensorflow"
    # TensorFlow forgets the length after the second; the others trace each anew.
    for length in (9, 5, 12) if tensorflow else (9,):
        x = rng.normal(size=(2, length, 3)).astype("float32")
        before = to_numpy(model.trainable_variables[0])
        model.fit(x, np.ones((2, length, 3)), verbose=0)
        assert np.abs(to_numpy(model.trainable_variables[0]) - before).max() > 0
        expected = compiled(model.layers[-1])(ops.convert_to_tensor(x))
        assert_close(model.predict(x, verbose=0), expected)


def test_compiled_training_is_that_of_the_recurrence():
    model = model_of("constant", 20)
    on_tensorflow = keras.backend.backend() == "tensorflow"
    model.compile("sgd", "mse", jit_compile=on_tensorflow or "auto")
    x = rng.normal(size=(2, 20, 3)).astype("float32")
    rate = to_numpy(model.trainable_variables[0])
    decay = np.exp(10j * rate[1]) / (1 + np.exp(-rate[0]))
    states = recurrence(decay, (1 + 0.5j) * x.astype("float64"))
    target = np.ones((2, 20, 3))
    loss = model.fit(x, target, verbose=0).history["loss"][0]
    assert_close(loss, np.square(states.real - states.imag - target).mean())
    assert model.evaluate(x, target, verbose=0) < loss


@pytest.mark.parametrize(("format", "length"), [("onnx", None), ("saved_model", 9)])
def test_scan_is_exported(format, length, fewer_rounds, tmp_path):
    path = tmp_path / ("model.onnx" if format == "onnx" else "model")
    assert export(model_of("varying", length), path, format) <= 1e-5


def test_export_unrolls_blocks_instead_of_a_loop(monkeypatch):
    decay, inputs = decays("constant", 40), complex_normal(2, 40, 3)
    monkeypatch.setattr(module.ops, "scan", None)
    with export_scope("onnx"):
        found = compiled(complex_linear_scan)(pair(decay), pair(inputs))
    assert_pair_close(found, recurrence(decay, inputs))


def test_long_strongly_decaying_sequences_have_finite_gradients():
    decay = 1e-30 * np.ones((2, 200, 1), "float32")
    inputs = rng.normal(size=(2, 200, 1)).astype("float32")
    found = gradients_in_all(
        lambda a, b: complex_linear_scan((a, a), (b, b))[0], [decay, inputs], inputs
    )
    assert all(np.isfinite(gradient).all() for gradient in found)
    assert_close(found[1], inputs)
