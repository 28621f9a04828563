import functools

import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.exporting import export
from keras_edifice.ops import state_space as module
from keras_edifice.ops.hippo import nplr, s4d_init, truncated_output
from keras_edifice.ops.state_space import (
    DISCRETIZATIONS,
    diagonal_modes,
    discretize,
    dplr_conv,
    dplr_step,
    dplr_system,
    modal_conv,
    modal_kernel,
    modal_scan,
    modal_step,
    ssm_kernel_diag,
    ssm_kernel_dplr,
)
from keras_edifice.ops.tracing import export_scope
from tests.support.applied import assert_same_gradients, gradients_in_all
from tests.support.close import assert_close, to_numpy
from tests.support.compiled import compiled

rng = np.random.default_rng(0)
FEATURES, STATES = 3, 8
HALF = STATES // 2


def rounded(z):
    """The complex number that two float32 hold."""
    z = np.asarray(z, "complex128")
    return z.real.astype("float32") + 1j * z.imag.astype("float32").astype("float64")


def complex_normal(*shape):
    return rounded(rng.normal(size=shape) + 1j * rng.normal(size=shape))


def steps(size=FEATURES):
    return np.exp(rng.uniform(np.log(0.001), np.log(0.1), size)).astype("float32")


def pair(z):
    return tuple(
        ops.convert_to_tensor(np.asarray(part, "float32")) for part in (z.real, z.imag)
    )


def diagonal(init="legs"):
    """Λ, B, C and Δ of a diagonal state space of some features."""
    Lambda, B = (rounded(np.tile(z, (FEATURES, 1))) for z in s4d_init(init, STATES))
    return Lambda, B, complex_normal(FEATURES, HALF), steps()


def low_rank(measure="legs"):
    """Λ, P, B, C and Δ of a DPLR state space of some features."""
    Lambda, P, B, _ = nplr(measure, STATES)
    Lambda, B = (np.tile(z[:HALF], (FEATURES, 1)) for z in (Lambda, B))
    # Away from the imaginary axis, on which LegT's normal part has its poles.
    Lambda = Lambda - (0.1 if measure == "legt" else 0.0)
    P = np.tile(P[:, None, :HALF], (1, FEATURES, 1))
    C = complex_normal(FEATURES, HALF)
    return rounded(Lambda), rounded(P), rounded(B), C, steps()


def step_of(Lambda, dt, method):
    """Ā and the weight of B in complex128."""
    dt = np.asarray(dt, "float64")[..., None]
    if method == "zoh":
        return np.exp(dt * Lambda), np.expm1(dt * Lambda) / Lambda
    below = 1 - dt * Lambda / 2
    return (1 + dt * Lambda / 2) / below, dt / below


def diagonal_kernel(Lambda, B, C, dt, length, method):
    """The impulse response of the diagonal recurrence, a loop in complex128."""
    step, weight = step_of(Lambda, dt, method)
    state, kernel = weight * B, []
    for _ in range(length):
        kernel.append(2 * (C * state).sum(-1).real)
        state = step * state
    return np.stack(kernel)


def dense(Lambda, P, B, C, dt):
    """Ā, B̄ and C of all states, conjugates included, by the bilinear method."""
    Lambda, P, B, C = (
        np.concatenate([z, z.conj()], axis=-1) for z in (Lambda, P, B, C)
    )
    identity, dt = np.eye(Lambda.shape[-1]), np.asarray(dt, "float64")[:, None, None]
    A = Lambda[..., None] * identity
    for p in P:
        A = A - p[..., None] * p.conj()[..., None, :]
    below = np.linalg.inv(identity - dt / 2 * A)
    return below @ (identity + dt / 2 * A), (below @ (dt * B[..., None]))[..., 0], C


def low_rank_kernel(Lambda, P, B, C, dt, length):
    """The impulse response of the dense recurrence; C is not truncated."""
    A, B, C = dense(Lambda, P, B, C, dt)
    state, kernel = B, []
    for _ in range(length):
        kernel.append((C * state).sum(-1).real)
        state = (A @ state[..., None])[..., 0]
    return np.stack(kernel)


def recurrence(x, rate, weight, state=None):
    """h = e^r h + x, y = Re Σ w h, a loop in complex128; the last h too."""
    if state is None:
        state = np.zeros((*x[:, 0].shape, rate.shape[-1]), "complex128")
    outputs = []
    for t in range(x.shape[1]):
        state = np.exp(rate) * state + x[:, t, ..., None]
        outputs.append((weight * state).sum(-1).real)
    return np.stack(outputs, axis=1), state


@pytest.mark.parametrize("method", DISCRETIZATIONS)
@pytest.mark.parametrize("init", ["lin", "inv", "legs", "real"])
def test_diagonal_kernel_is_the_impulse_response(init, method):
    Lambda, B, C, dt = diagonal(init)
    for length in (1, 40):
        expected = diagonal_kernel(Lambda, B, C, dt, length, method)
        function = functools.partial(
            ssm_kernel_diag, length=length, discretization=method
        )
        kernel = compiled(function)
        found = kernel(*(pair(z) for z in (Lambda, B, C)), ops.convert_to_tensor(dt))
        assert_close(found, expected)


@pytest.mark.parametrize("method", DISCRETIZATIONS)
def test_discretization_keeps_short_steps(method):
    Lambda = rounded(np.array([[-0.5, -0.5 + 100j, -1e-4 + 1e-4j, -3.0, -1e-9]]))
    for dt in np.array([1e-4, 0.02, 1.0], "float32"):
        found = discretize(pair(Lambda), float(dt), method)
        z = np.float64(dt) * Lambda
        rate = z if method == "zoh" else 2 * np.arctanh(z / 2)
        for (re, im), expected in zip(
            found, (rate, step_of(Lambda, dt, method)[1]), strict=True
        ):
            ratio = (to_numpy(re) + 1j * to_numpy(im)) / expected
            assert_close(ratio.real, np.ones((1, 5)), 1e-6)
            assert_close(ratio.imag, np.zeros((1, 5)), 1e-6)


def test_zero_order_hold_of_an_integrator_weighs_by_the_time():
    rate, weight = discretize(pair(np.zeros((1, 2))), 0.25)
    assert_close(weight[0], np.full((1, 2), 0.25), 0)
    for part in (*rate, weight[1]):
        assert_close(part, np.zeros((1, 2)), 0)


def test_bilinear_method_may_forget_everything_in_a_step():
    # ΔΛ = -2 gives Ā = 0, whose logarithm is -∞; ΔΛ = -4 gives Ā = -1/3.
    modes = diagonal_modes(
        *(pair(np.array([[z]])) for z in (-2, 1, 1)), 1.0, "bilinear"
    )
    assert_close(modal_kernel(*modes, 4)[:, 0], [1, 0, 0, 0], 1e-6)
    modes = diagonal_modes(
        *(pair(np.array([[z]])) for z in (-4, 1, 1)), 1.0, "bilinear"
    )
    expected = 2 / 3 * (-1 / 3) ** np.arange(4)
    assert_close(modal_kernel(*modes, 4)[:, 0], expected, 1e-6)


@pytest.mark.parametrize("method", DISCRETIZATIONS)
def test_gradients_of_the_diagonal_kernel_are_those_of_the_recurrence(method):
    Lambda, B, C, dt = diagonal()
    arrays = [part for z in (Lambda, B, C) for part in (z.real, z.imag)]
    arrays = [z.astype("float32") for z in (*arrays, dt)]

    def function(a, b, c, d, e, f, dt):
        return ssm_kernel_diag((a, b), (c, d), (e, f), dt, 7, method)

    def reference(a, b, c, d, e, f, dt):
        parts = a + 1j * b, c + 1j * d, e + 1j * f
        return diagonal_kernel(*parts, dt, 7, method)

    assert_same_gradients(function, reference, arrays)


def test_gradients_stay_finite_where_a_step_forgets_everything():
    def kernel(re, im):
        one = ops.ones_like(re), ops.zeros_like(re)
        return ssm_kernel_diag((re, im), one, one, 1.0, 3, "bilinear")

    arrays = [np.array([[-2.0]], "float32"), np.zeros((1, 1), "float32")]
    found = gradients_in_all(kernel, arrays, np.ones((3, 1), "float32"))
    assert all(np.isfinite(gradient).all() for gradient in found)


@pytest.mark.parametrize("length", [1, 7, 40])
def test_modal_convolution_is_the_recurrence(length):
    rate = -rng.uniform(0.01, 2, (3, 5)) + 1j * rng.uniform(-3, 3, (3, 5))
    rate, weight = rounded(rate), complex_normal(3, 5)
    x = rng.normal(size=(2, length, 3)).astype("float32")
    state = complex_normal(2, 3, 5)
    convolve = compiled(functools.partial(modal_conv, return_state=True))
    expected, expected_last = recurrence(x, rate, weight, state)
    modes = pair(rate), pair(weight)
    y, last = convolve(ops.convert_to_tensor(x), *modes, pair(state))
    assert_close(y, expected)
    assert_close(last[0], expected_last.real)
    assert_close(last[1], expected_last.imag)
    assert_close(
        compiled(modal_conv)(ops.convert_to_tensor(x), *modes),
        recurrence(x, rate, weight)[0],
    )


@pytest.mark.parametrize("shared", [False, True])
def test_modal_scan_stands_still_at_masked_steps(shared):
    rate, weight = rounded(-np.ones((1 if shared else 3, 2)) + 1j), complex_normal(3, 2)
    x = rng.normal(size=(2, 9, 3)).astype("float32")
    state = complex_normal(2, 3, 2)
    mask = np.ones((2, 9), bool)
    mask[:, [0, 4, 5, 8]] = False
    y, last = compiled(modal_scan)(
        ops.convert_to_tensor(x * mask[..., None]),
        *(pair(rate), pair(weight), ops.convert_to_tensor(mask), pair(state)),
    )
    expected, expected_last = recurrence(x[:, mask[0]], rate, weight, state)
    assert_close(to_numpy(y)[:, mask[0]], expected)
    assert_close(last[0], expected_last.real)
    assert_close(last[1], expected_last.imag)


def test_modal_convolution_shares_modes_between_features():
    rate, weight = rounded(-np.ones((3, 1, 2)) + 1j), complex_normal(3, 1, 2)
    x = rng.normal(size=(2, 9, 3, 4)).astype("float32")
    convolve = compiled(functools.partial(modal_conv, return_state=True))
    y, last = convolve(ops.convert_to_tensor(x), pair(rate), pair(weight))
    expected, expected_last = recurrence(x, rate, weight)
    assert_close(y, expected)
    assert_close(last[1], expected_last.imag)


@pytest.mark.parametrize("length", [5, 64, 70])
def test_positions_stand_for_an_unknown_length(length):
    rate = rounded(-rng.uniform(0.01, 0.1, (3, 2)) + 1j * rng.uniform(-3, 3, (3, 2)))
    weight = complex_normal(3, 2)
    position = ops.convert_to_tensor(np.arange(length, dtype="float32"))
    kernel = compiled(modal_kernel)(pair(rate), pair(weight), position)
    expected = np.exp(np.arange(length)[:, None, None] * rate) * weight
    assert_close(kernel, expected.sum(-1).real)


def test_state_of_an_unknown_length_is_that_of_the_recurrence(monkeypatch):
    monkeypatch.setattr(module, "static_length", lambda x: None)
    rate, weight = rounded(-np.ones((3, 2)) / 9 + 1j), complex_normal(3, 2)
    x = rng.normal(size=(2, 9, 3)).astype("float32")
    state = complex_normal(2, 3, 2)
    convolve = compiled(functools.partial(modal_conv, return_state=True))
    y, last = convolve(ops.convert_to_tensor(x), pair(rate), pair(weight), pair(state))
    expected, expected_last = recurrence(x, rate, weight, state)
    assert_close(y, expected)
    assert_close(last[0], expected_last.real)
    assert_close(last[1], expected_last.imag)


def test_modal_steps_are_the_convolution():
    modes = diagonal_modes(*(pair(z) for z in diagonal()[:3]), steps())
    x = ops.convert_to_tensor(rng.normal(size=(2, 9, FEATURES)).astype("float32"))
    convolve = compiled(functools.partial(modal_conv, return_state=True))
    expected, last = convolve(x, *modes)
    state, outputs = pair(np.zeros((2, FEATURES, HALF))), []
    step = compiled(modal_step)
    for t in range(9):
        y, state = step(x[:, t], *modes, state)
        outputs.append(to_numpy(y))
    assert_close(np.stack(outputs, axis=1), expected)
    assert_close(state[0], last[0])
    assert_close(state[1], last[1])


def test_twice_the_step_takes_every_second_tap_of_a_held_system():
    Lambda, B, C, dt = diagonal("lin")

    @compiled
    def kernel(dt, C):
        return modal_kernel(discretize(pair(Lambda), dt)[0], C, 20)

    slow, fast = (kernel(ops.convert_to_tensor(n * dt), pair(C)) for n in (1, 2))
    assert_close(fast[:10], slow[::2])


def test_4096_taps_stay_near_the_impulse_response():
    Lambda, B, C, _ = diagonal("lin")
    dt = np.array([0.001, 0.01, 0.1], "float32")
    arguments = *(pair(z) for z in (Lambda, B, C)), ops.convert_to_tensor(dt)
    kernel = compiled(functools.partial(ssm_kernel_diag, length=4096))(*arguments)
    assert_close(kernel, diagonal_kernel(Lambda, B, C, dt, 4096, "zoh"))
    zero = np.zeros((1, FEATURES, HALF))
    kernel = compiled(functools.partial(ssm_kernel_dplr, length=4096))(
        arguments[0],
        pair(zero),
        arguments[1],
        pair(truncated_output(Lambda, zero, C, dt.astype("float64"), 4096)),
        arguments[3],
    )
    # The steps are rounded to float32 at Ā here and at C̃ there.
    expected = diagonal_kernel(Lambda, B, C, dt, 4096, "bilinear")
    assert_close(kernel, expected, 2e-5)


@pytest.mark.parametrize("measure", ["legs", "legt"])
@pytest.mark.parametrize("format", [None, "onnx"])
def test_low_rank_kernel_is_the_impulse_response(format, measure):
    Lambda, P, B, C, dt = low_rank(measure)
    for length in (1, 8, 9):
        truncated = truncated_output(Lambda, P, C, dt.astype("float64"), length)
        arguments = *(pair(z) for z in (Lambda, P, B, truncated)), dt
        with export_scope(format):
            kernel = compiled(functools.partial(ssm_kernel_dplr, length=length))(
                *arguments[:4], ops.convert_to_tensor(dt)
            )
        assert_close(kernel, low_rank_kernel(Lambda, P, B, C, dt, length))


def test_without_low_rank_the_kernel_is_the_diagonal_one():
    Lambda, B, C, dt = diagonal("inv")
    zero = np.zeros((2, FEATURES, HALF))
    truncated = truncated_output(Lambda, zero, C, dt.astype("float64"), 9)
    arguments = [pair(z) for z in (Lambda, zero, B, truncated)]
    kernel = compiled(functools.partial(ssm_kernel_dplr, length=9))
    found = kernel(*arguments, ops.convert_to_tensor(dt))
    assert_close(found, diagonal_kernel(Lambda, B, C, dt, 9, "bilinear"))


@pytest.mark.parametrize("measure", ["legs", "legt"])
def test_gradients_of_the_low_rank_kernel_are_those_of_the_recurrence(measure):
    Lambda, P, B, C, dt = low_rank(measure)
    length, dt = 6, 10 * dt
    truncated = truncated_output(Lambda, P, C, dt.astype("float64"), length)
    arrays = [part for z in (Lambda, P, B, truncated) for part in (z.real, z.imag)]
    arrays = [z.astype("float32") for z in (*arrays, dt)]

    def function(a, b, c, d, e, f, g, h, dt):
        return ssm_kernel_dplr((a, b), (c, d), (e, f), (g, h), dt, length)

    def reference(a, b, c, d, e, f, g, h, dt):
        parts = a + 1j * b, c + 1j * d, e + 1j * f
        A, _, C = dense(*parts, g + 1j * h, dt)
        rest = np.eye(STATES) - np.linalg.matrix_power(A, length)
        C = np.linalg.solve(rest.swapaxes(1, 2), C[..., None])[:, :HALF, 0]
        return low_rank_kernel(*parts, C, dt, length)

    # The pole nearest to the unit circle amplifies what float32 rounds.
    assert_same_gradients(function, reference, arrays, 1e-3)


def test_low_rank_system_steps_along_its_kernel():
    Lambda, P, B, C, dt = low_rank()
    truncated = truncated_output(Lambda, P, C, dt.astype("float64"), 20)
    arguments = [pair(z) for z in (Lambda, P, B, truncated)]
    system = compiled(functools.partial(dplr_system, length=20))(
        *arguments, ops.convert_to_tensor(dt)
    )
    state, outputs = ops.zeros((1, FEATURES, STATES)), []
    step = compiled(dplr_step)
    for t in range(20):
        x = np.full((1, FEATURES), float(t == 0), "float32")
        y, state = step(ops.convert_to_tensor(x), system, state)
        outputs.append(to_numpy(y)[0])
    assert_close(np.stack(outputs), low_rank_kernel(Lambda, P, B, C, dt, 20))


def test_low_rank_segments_with_the_carried_state_are_one_pass():
    Lambda, P, B, C, dt = low_rank()
    truncated = truncated_output(Lambda, P, C, dt.astype("float64"), 40)
    shared = [pair(z) for z in (Lambda, P, B)]
    step = ops.convert_to_tensor(dt)
    kernel = compiled(functools.partial(ssm_kernel_dplr, length=40))(
        *shared, pair(truncated), step
    )
    system = compiled(dplr_system)(*shared, pair(C), step)
    x = rng.normal(size=(2, 40, FEATURES)).astype("float32")
    run = compiled(functools.partial(dplr_conv, return_state=True))
    first, state = run(ops.convert_to_tensor(x[:, :23]), system, kernel)
    second, last = run(ops.convert_to_tensor(x[:, 23:]), system, kernel, state)
    A, B, C = dense(Lambda, P, B, C, dt)
    state, outputs = np.zeros((2, FEATURES, STATES)), []
    for t in range(40):
        state = (A @ state[..., None])[..., 0] + B * x[:, t, :, None]
        outputs.append((C * state).sum(-1).real)
    assert_close(
        np.concatenate([to_numpy(first), to_numpy(second)], 1), np.stack(outputs, 1)
    )
    half = state[..., :HALF]
    assert_close(last, np.concatenate([half.real, half.imag], axis=-1))


def test_low_rank_step_is_stable():
    Lambda, P, B, C, dt = low_rank()
    A, *_ = dplr_system(
        *(pair(z) for z in (Lambda, P, B, C)), ops.convert_to_tensor(dt)
    )
    assert np.abs(np.linalg.eigvals(to_numpy(A))).max() < 1


def test_no_tensor_has_every_state_at_every_tap(monkeypatch):
    sizes, matmul, reciprocal = [], module.ops.matmul, module.reciprocal

    def multiplied(a, b):
        sizes.extend([a.shape, b.shape])
        return matmul(a, b)

    def inverted(z):
        sizes.append(z[0].shape)
        return reciprocal(z)

    monkeypatch.setattr(module.ops, "matmul", multiplied)
    monkeypatch.setattr(module, "reciprocal", inverted)
    states, frequencies = 64, 201
    Lambda, one = -np.ones((FEATURES, states)), np.ones((FEATURES, states))
    compiled(functools.partial(modal_kernel, length=400))(pair(Lambda), pair(one))
    assert max(np.prod(size) for size in sizes) <= FEATURES * 2 * states * 32
    sizes.clear()
    arrays = [Lambda, 0 * Lambda, one[None], one[None], one, one, one, one]
    arrays = [z.astype("float32") for z in (*arrays, np.ones(FEATURES))]

    def kernel(a, b, c, d, e, f, g, h, dt):
        return ssm_kernel_dplr((a, b), (c, d), (e, f), (g, h), dt, 400)

    gradients_in_all(kernel, arrays, np.ones((400, FEATURES), "float32"))
    # Eight states, real and imaginary parts of both.
    assert max(np.prod(size) for size in sizes) == FEATURES * 8 * 4 * frequencies


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method must be one of .* received 'euler'"):
        discretize(pair(np.ones((1, 1))), 0.1, "euler")


def fixed(value):
    """An initializer that gives the array."""
    return lambda shape, dtype=None: ops.convert_to_tensor(value, dtype=dtype)


@keras.saving.register_keras_serializable("tests")
class Systems(keras.layers.Layer):
    """(batch, time, 3) -> the same: a diagonal and, given taps, a DPLR state space."""

    def __init__(self, taps=None, **kwargs):
        super().__init__(**kwargs)
        self.taps = taps

    def build(self, input_shape):
        self.parts = []  # real and imaginary parts of Λ, P, B and C
        for z, name in zip(low_rank(), ("Lambda", "P", "B", "C"), strict=False):
            for value, part in ((z.real, "re"), (z.imag, "im")):
                weight = self.add_weight(z.shape, fixed(value), name=f"{name}_{part}")
                self.parts.append(weight)
        self.dt = self.add_weight((FEATURES,), "ones", name="dt")

    def call(self, x):
        parts = [ops.convert_to_tensor(part) for part in self.parts]
        Lambda, P, B, C = zip(parts[::2], parts[1::2], strict=True)
        dt = 0.1 * self.dt
        y = modal_conv(x, *diagonal_modes(Lambda, B, C, dt, "bilinear"))
        y = y + modal_conv(x, *diagonal_modes(Lambda, B, C, dt, "zoh"))
        if self.taps:
            kernel = ssm_kernel_dplr(Lambda, P, B, C, dt, self.taps)
            y = y + module.long_conv(x, kernel)
        return y

    def compute_output_shape(self, input_shape):
        return input_shape


def model_of(length, taps=None):
    inputs = keras.Input((length, FEATURES), name="inputs")
    return keras.Model(inputs, Systems(taps, name="systems")(inputs), name="model")


@pytest.mark.filterwarnings("ignore:Gradients do not exist")  # P has none here
def test_unknown_length_trains_and_predicts():
    model = model_of(None)
    model.compile("sgd", "mse")
    tensorflow = keras.backend.backend() == "tensorflow"
    # TensorFlow forgets the length after the second; the others trace each anew.
    for length in (9, 5, 12) if tensorflow else (9,):
        x = rng.normal(size=(2, length, FEATURES)).astype("float32")
        before = model.get_weights()
        model.fit(x, np.ones_like(x), verbose=0)
        after = model.get_weights()
        moved = [(a != b).any() for a, b in zip(before, after, strict=True)]
        assert sum(moved) == len(moved) - 2  # all but P
        expected = compiled(model.layers[-1])(ops.convert_to_tensor(x))
        assert_close(model.predict(x, verbose=0), expected)


def test_compiled_training_reaches_every_weight():
    model = model_of(9, taps=9)
    on_tensorflow = keras.backend.backend() == "tensorflow"
    model.compile("sgd", "mse", jit_compile=on_tensorflow or "auto")
    x, before = rng.normal(size=(2, 9, FEATURES)), model.get_weights()
    expected = np.square(
        to_numpy(compiled(model.layers[-1])(ops.convert_to_tensor(x.astype("float32"))))
        - 1
    ).mean()
    loss = model.fit(x, np.ones_like(x), verbose=0).history["loss"][0]
    assert_close(loss / expected, 1.0)
    after = model.get_weights()
    assert all(np.abs(a - b).max() > 0 for a, b in zip(before, after, strict=True))
    assert all(np.isfinite(weight).all() for weight in after)


@pytest.mark.parametrize(
    ("format", "length", "taps"),
    [("onnx", None, 40), ("saved_model", 9, 9)],
)
def test_systems_are_exported(format, length, taps, tmp_path):
    path = tmp_path / ("model.onnx" if format == "onnx" else "model")
    assert export(model_of(length, taps), path, format) <= 1e-5
