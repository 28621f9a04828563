import functools

import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.exporting import export
from keras_edifice.model import EdificeModel
from keras_edifice.ops.ode import (
    METHODS,
    TABLEAUS,
    dopri5_step,
    ode_step,
    odeint,
    odeint_adjoint,
)
from keras_edifice.ops.tracing import export_scope
from tests.support.close import assert_close, to_numpy
from tests.support.compiled import compiled
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient

rng = np.random.default_rng(0)
ORDERS = dict(euler=1, midpoint=2, heun=2, rk4=4, rk4_38=4, dopri5=5)
W = rng.normal(size=(3, 3)).astype("float32")
b = rng.normal(size=3).astype("float32")


def turning(t, y):
    """y' = J (y - g) + g' with a turn J and g = (sin t, cos 2t); t is (batch,)."""
    g, slope = [ops.sin(t), ops.cos(2 * t)], [ops.cos(t), -2 * ops.sin(2 * t)]
    return ops.stack([slope[0] - (y[:, 1] - g[1]), slope[1] + y[:, 0] - g[0]], axis=-1)


def turned(t, y0):
    """The solution of `turning` from y0 at time zero, (batch, 2), in float64."""
    c = np.asarray(y0, "float64") - [0.0, 1.0]
    turn = np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]])
    return c @ turn.T + [np.sin(t), np.cos(2 * t)]


def network(t, y, W, b):
    """A small dynamics with weights and time."""
    return ops.tanh(ops.matmul(y, W) + b * ops.expand_dims(t, -1))


def numpy_network(t, y, W, b):
    return np.tanh(y @ W + b * np.reshape(t, (-1, 1)))


def numpy_rk4(fn, y, times, num_steps):
    """Classic RK4 with equal steps, a loop in float64. -> (batch, times, ...)."""
    y = np.asarray(y, "float64")
    ys = [y]
    for start, end in zip(times[:-1], times[1:], strict=True):
        h = (end - start) / num_steps
        for n in range(num_steps):
            t = start + n * h
            k1 = fn(t, y)
            k2 = fn(t + h / 2, y + h / 2 * k1)
            k3 = fn(t + h / 2, y + h / 2 * k2)
            k4 = fn(t + h, y + h * k3)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        ys.append(y)
    return np.stack(ys, axis=1)


# Dormand & Prince 1980, table II.5.2 of Hairer, Nørsett & Wanner: the last two rows are
# the solutions of fifth and of fourth order.
PRINCE = [
    [1 / 5],
    [3 / 40, 9 / 40],
    [44 / 45, -56 / 15, 32 / 9],
    [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
    [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
    [35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84],
    [5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40],
]


def numpy_dopri5(fn, t, y, h, k1):
    """One step in float64: the solution of fifth order, its field and its error.

    The error is two thirds of the difference to the fourth order: the difference to a
    third of the one and two thirds of the other, which is of fourth order as well.
    """
    ks = [k1]
    for row in PRINCE[:-1]:
        new = y + h * sum(a * k for a, k in zip(row, ks, strict=True))
        ks.append(fn(t + h * sum(row), new))
    fourth = y + h * sum(a * k for a, k in zip(PRINCE[-1], ks, strict=True))
    return new, ks[-1], 2 / 3 * (new - fourth)


def numpy_adaptive(fn, y, t0, t1, rtol, atol):
    """One example, with the steps of Hairer et al. II.4; the evaluations as well."""

    def rms(x):
        return np.sqrt(np.mean(x**2))

    f = fn(t0, y)
    scale = atol + rtol * np.abs(y)
    d0, d1 = rms(y / scale), rms(f / scale)
    h0 = 1e-6 if min(d0, d1) < 1e-5 else 0.01 * d0 / d1
    d2 = rms((fn(t0 + h0, y + h0 * f) - f) / scale) / h0
    h, t, count = min(100 * h0, (0.01 / max(d1, d2)) ** 0.2), t0, 2
    while t < t1:
        h = min(h, t1 - t)
        new, new_f, error = numpy_dopri5(fn, t, y, h, f)
        ratio = rms(error / (atol + rtol * np.maximum(np.abs(y), np.abs(new))))
        count += 6
        if ratio <= 1:
            t, y, f = t + h, new, new_f
        least = 1.0 if ratio <= 1 else 0.2
        h = h * min(10.0, max(0.9 * max(ratio, 1e-9) ** -0.2, least))
    return y, count


def tensors(*arrays):
    return [ops.convert_to_tensor(np.asarray(x, "float32")) for x in arrays]


def solved(fn, y0, times, **options):
    """`odeint` of arrays; times (times,) or (batch, times)."""
    run = compiled(lambda y0, times: odeint(fn, y0, times, **options))
    return run(*tensors(y0, times))


class Solution(keras.layers.Layer):
    """(batch, 3) -> (batch, times, 3): `network` integrated, by either gradient."""

    def __init__(self, times, adjoint=False, options=None, **kwargs):
        super().__init__(**kwargs)
        self.times, self.adjoint, self.options = times, adjoint, options or {}

    def build(self, input_shape):
        self.W = self.add_weight((3, 3), name="W")
        self.b = self.add_weight((3,), name="b")
        self.set_weights([W, b])

    def call(self, y):
        if self.adjoint:
            weights = [self.W, self.b]
            return odeint_adjoint(network, y, self.times, weights, **self.options)
        W, b = ops.convert_to_tensor(self.W), ops.convert_to_tensor(self.b)

        def fn(t, y):
            return network(t, y, W, b)

        return odeint(fn, y, self.times, **self.options)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], len(self.times), input_shape[1])


Solution = keras.saving.register_keras_serializable("tests")(Solution)


def model_of(*args, **kwargs):
    inputs = keras.Input((3,), name="inputs")
    return EdificeModel(inputs, Solution(*args, **kwargs)(inputs), name="solution")


@pytest.mark.parametrize("method", METHODS)
def test_coefficients_are_consistent(method):
    nodes, rows, weights, errors = TABLEAUS[method]
    assert_close([sum(row) for row in rows], list(nodes), 1e-14)
    assert_close(sum(weights), 1.0, 1e-14)
    assert_close(sum(errors or [0.0]), 0.0, 1e-14)
    assert_close(np.dot(weights, [0.0, *nodes]), 0.5, 1e-14 if method != "euler" else 1)


@pytest.mark.parametrize("method", METHODS)
def test_halving_the_step_shows_the_order(method):
    y0, times = rng.normal(size=(8, 2)), np.linspace(0.0, 5.0, 5)
    exact = np.stack([turned(t, y0) for t in times], axis=1)
    coarse, errors = 16 if method == "euler" else 2, []
    for num_steps in (coarse, 2 * coarse):
        y = solved(turning, y0, times, method=method, num_steps=num_steps)
        errors.append(np.sqrt(np.mean((to_numpy(y) - exact) ** 2)))
    assert errors[1] > 3e-6  # above the error of float32 itself
    assert abs(np.log2(errors[0] / errors[1]) - ORDERS[method]) < 0.15


@pytest.mark.parametrize("method", METHODS)
def test_steps_one_by_one_are_the_solution(method):
    y0, dt = rng.normal(size=(2, 3)), np.array([0.1, -0.2])
    y, dt = tensors(y0, dt)
    weights = tensors(W, b)

    def fn(t, y):
        return network(t, y, *weights)

    times = ops.stack([0.3 + 0.0 * dt, 0.3 + 3 * dt], axis=1)
    expected = odeint(fn, y, times, method, num_steps=3)[:, -1]
    for n in range(3):
        y = ode_step(fn, 0.3 + n * dt, y, dt, method)
    assert_close(y, expected, 1e-6)


def test_classic_steps_are_those_of_the_textbook():
    y0, times = rng.normal(size=(2, 3)), [0.0, 0.5, 2.0]
    weights = tensors(W, b)
    y = solved(
        lambda t, y: network(t, y, *weights), y0, times, method="rk4", num_steps=3
    )
    field = functools.partial(numpy_network, W=W, b=b)
    assert_close(y, numpy_rk4(field, y0, times, 3))


def test_the_error_is_the_difference_to_a_solution_of_fourth_order():
    y0, weights, sizes = rng.normal(size=(2, 3)), tensors(W, b), []
    for h in (1.0, 0.5):
        y, error = dopri5_step(
            lambda t, y: network(t, y, *weights), *tensors([0.3, 0.3], y0, [h, h])
        )
        field = functools.partial(numpy_network, W=W, b=b)
        k1 = field(0.3, y0)
        expected, _, expected_error = numpy_dopri5(field, 0.3, y0, h, k1)
        assert_close(y, expected)
        assert_close(error, expected_error, 1e-6)
        sizes.append(np.abs(expected_error).max())
    assert np.log2(sizes[0] / sizes[1]) > 4


@pytest.mark.parametrize(
    "options", [dict(method="rk4", num_steps=10), dict(rtol=1e-6, atol=1e-7)]
)
def test_linear_systems_match_the_matrix_exponential(options):
    A = rng.normal(size=(3, 3)).astype("float32")
    values, vectors = np.linalg.eig(A.astype("float64"))
    y0 = rng.normal(size=(2, 3)).astype("float32")

    def exact(t):
        return ((y0 @ np.linalg.inv(vectors).T) * np.exp(values * t)) @ vectors.T

    (transposed,) = tensors(A.T)
    times = [0.0, 0.4, 1.0]
    y = solved(lambda t, y: ops.matmul(y, transposed), y0, times, **options)
    assert_close(y, np.stack([exact(t).real for t in times], axis=1))


def test_steps_after_the_error_are_those_of_the_controller():
    y0, weights = rng.normal(size=(1, 3)).astype("float32"), tensors(W, b)
    for rtol in (1e-2, 1e-4):
        y, nfe = solved(
            lambda t, y: network(t, 3.0 * y, *weights),
            y0,
            [0.0, 4.0],
            rtol=rtol,
            atol=rtol,
            return_nfe=True,
        )
        expected, count = numpy_adaptive(
            lambda t, y: numpy_network(t, 3.0 * y, W, b)[0],
            y0[0].astype("float64"),
            0.0,
            4.0,
            rtol,
            rtol,
        )
        assert to_numpy(nfe) == [count]
        # The sizes are rounded to float32, and so the errors of the steps differ.
        assert_close(y[0, -1], expected, 1e-4)


def stiff(t, y):
    """y' = -λ (y - cos t), with λ = 100 and 1 for the two examples."""
    rate = ops.convert_to_tensor(np.array([[100.0], [1.0]], "float32"))
    return -rate * (y - ops.expand_dims(ops.cos(t), 1))


def stiff_solution(t, y0):
    rate = np.array([[100.0], [1.0]])
    part = rate * (rate * np.cos(t) + np.sin(t)) / (rate**2 + 1)
    return part + (y0 - rate**2 / (rate**2 + 1)) * np.exp(-rate * t)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_the_tolerance_is_kept_where_the_problem_is_stiff(tolerance):
    y0 = np.array([[3.0], [3.0]])
    y, nfe = solved(
        stiff, y0, [0.0, 1.5], rtol=tolerance, atol=tolerance, return_nfe=True
    )
    assert_close(y[:, -1], stiff_solution(1.5, y0), tolerance)
    # Each example takes its own steps; explicit ones of a stiff problem are short.
    stiff_count, easy_count = to_numpy(nfe)
    assert easy_count < 30
    assert stiff_count > 200


def test_an_example_does_not_depend_on_the_batch():
    y0 = np.array([[3.0], [0.5]])
    both = solved(stiff, y0, [0.0, 0.5])

    def alone(t, y):
        return -1.0 * (y - ops.expand_dims(ops.cos(t), 1))

    assert_close(both[1:], solved(alone, y0[1:], [0.0, 0.5]), 1e-6)


@pytest.mark.parametrize(
    "options", [dict(method="rk4", num_steps=40), dict(rtol=1e-6, atol=1e-6)]
)
def test_back_in_time_returns_to_the_beginning(options):
    y0 = rng.normal(size=(2, 2))
    there = to_numpy(solved(turning, y0, [0.0, 2.0], **options))[:, -1]
    back = solved(turning, there, [2.0, 1.0, 0.0], **options)
    assert_close(back[:, -1], y0, 1e-4)  # the two errors of 1e-5 add up
    assert_close(back[:, 1], turned(1.0, y0), 1e-4)


@pytest.mark.parametrize("options", [dict(method="rk4", num_steps=20), dict(rtol=1e-6)])
def test_each_example_may_have_its_own_times(options):
    y0 = rng.normal(size=(3, 2))
    # The second does not move, the third goes back.
    times = np.array([[0.0, 0.7, 1.9], [0.0, 0.0, 0.0], [0.0, -0.3, -0.8]])
    y = solved(turning, y0, times, **options)
    for i in range(3):
        for k in range(3):
            expected = turned(times[i, k], y0[i : i + 1])[0]
            assert_close(y[i, k], expected, 2e-5)


@pytest.mark.parametrize("options", [dict(method="heun", num_steps=2), {}])
def test_many_times_are_those_of_one_interval_after_another(options):
    y0, times = rng.normal(size=(2, 2)), np.linspace(0.0, 2.0, 41)
    y = solved(turning, y0, times, **options)
    assert y.shape == (2, 41, 2)
    exact = np.stack([turned(t, y0) for t in times], axis=1)
    assert_close(y, exact, 2e-3)  # that of the coarse steps
    if options:
        one = solved(turning, y0, [0.0, 2.0], method="heun", num_steps=80)
        assert_close(y[:, -1], one[:, -1])


def test_a_thousand_steps_are_a_loop():
    y0 = np.array([[1.0, -2.0]])
    y = solved(lambda t, y: -y, y0, [0.0, 2.0], method="euler", num_steps=1000)
    assert_close(y[:, -1], (1.0 - 0.002) ** 1000 * y0)


def test_a_field_of_zero_changes_nothing():
    y0 = rng.normal(size=(2, 4)).astype("float32")
    for options in ({}, dict(method="rk4", num_steps=3)):
        y = solved(lambda t, y: ops.zeros_like(y), y0, [0.0, 5.0], **options)
        assert_close(y[:, -1], y0, 0)


def test_solutions_in_one_dimension_do_not_cross():
    y0 = np.sort(rng.normal(size=(20, 1)), axis=0)
    times, options = np.linspace(0, 3, 4), dict(method="rk4", num_steps=20)
    y = solved(lambda t, y: ops.sin(5.0 * y), y0, times, **options)
    assert (np.diff(to_numpy(y)[..., 0], axis=0) > -1e-6).all()


def test_too_few_attempts_give_nan_and_not_a_wrong_number():
    y0 = np.array([[3.0], [3.0]])
    y = to_numpy(solved(stiff, y0, [0.0, 1.0, 2.0], max_steps=12))
    assert np.isnan(y[0, 1:]).all()
    assert np.isfinite(y[0, 0]).all()
    assert_close(y[1, 1:], [stiff_solution(t, y0)[1] for t in (1.0, 2.0)], 1e-2)


def test_evaluations_of_equal_steps_are_counted():
    y0 = rng.normal(size=(2, 2))
    for method, stages in dict(euler=1, heun=2, rk4_38=4, dopri5=6).items():
        _, nfe = solved(
            turning, y0, [0.0, 1.0, 2.0], method=method, num_steps=3, return_nfe=True
        )
        assert_close(nfe, [6 * stages] * 2, 0)


def test_the_end_moves_the_solution_by_the_field():
    y0 = rng.normal(size=(2, 2)).astype("float32")

    class AtTime(keras.layers.Layer):
        def call(self, end):
            (y,) = tensors(y0)
            times = ops.concatenate([0.0 * end, end], axis=1)
            return odeint(turning, y, times, rtol=1e-5, max_steps=24)[:, -1]

    end = np.array([[0.8], [1.7]], "float32")
    _, by_end = gradients(AtTime(), end, lambda y: ops.sum(y))
    field = numerical_gradient(
        lambda t: sum(turned(t[i, 0], y0[i : i + 1]).sum() for i in range(2)), end
    )
    assert_close(by_end, field, 1e-3)


FIXED = dict(method="rk4", num_steps=6)
CHOSEN = dict(rtol=1e-5, atol=1e-6, max_steps=24)


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("options", [FIXED, CHOSEN])
def test_gradients_are_those_of_the_exact_solution(options, adjoint):
    y0, times = rng.normal(size=(2, 3)).astype("float32"), [0.0, 0.5, 1.2]
    weights = rng.normal(size=(2, 3, 3)).astype("float32")
    model = model_of(times, adjoint, options)
    by_weight, by_input = gradients(
        model, y0, lambda y: ops.sum(y * ops.convert_to_tensor(weights))
    )

    def loss(y0, W, b):
        field = functools.partial(numpy_network, W=W, b=b)
        return (numpy_rk4(field, y0, times, 12) * weights).sum()

    # The backward integration adds errors of the size of the forward one.
    assert_close(by_input, numerical_gradient(lambda y: loss(y, W, b), y0), 2e-4)
    for found, expected in zip(
        by_weight,
        [
            numerical_gradient(lambda W: loss(y0, W, b), W),
            numerical_gradient(lambda b: loss(y0, W, b), b),
        ],
        strict=True,
    ):
        assert_close(found, expected, 2e-4)


def test_the_adjoint_is_the_gradient_of_the_steps_where_they_are_fine():
    y0, times = rng.normal(size=(2, 3)).astype("float32"), list(np.linspace(0, 1, 18))
    options, found = dict(method="rk4", num_steps=1), []
    for adjoint in (False, True):
        model = model_of(times, adjoint, options)
        by_weight, by_input = gradients(model, y0, lambda y: ops.sum(y**2))
        found.append([*by_weight, by_input])
    for expected, by_adjoint in zip(*found, strict=True):
        size = np.abs(expected).max()
        assert_close(by_adjoint / size, expected / size)


def test_half_precision_is_computed_in_float32():
    y0 = ops.cast(ops.convert_to_tensor(rng.normal(size=(2, 3))), "bfloat16")
    for adjoint in (False, True):
        layer = Solution([0.0, 1.0], adjoint, dict(FIXED, num_steps=10))
        layer.build((None, 3))
        exact = ops.cast(layer(ops.cast(y0, "float32")), "bfloat16")
        y = layer.call(y0)
        assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
        assert_close(ops.cast(y, "float32"), ops.cast(exact, "float32"), 0)


@keras.saving.register_keras_serializable("tests")
class Dynamics(keras.layers.Layer):
    """(batch, 3) -> the same: two dense layers integrated over the unit of time."""

    def __init__(self, adjoint=False, options=None, **kwargs):
        super().__init__(**kwargs)
        self.adjoint, self.options = adjoint, options or {}
        self.network = keras.Sequential(
            [keras.layers.Dense(5, "tanh"), keras.layers.Dense(3)]
        )

    def build(self, input_shape):
        self.network.build((None, 4))

    def call(self, y):
        if not self.adjoint:
            return odeint(self.field, y, [0.0, 1.0], **self.options)[:, -1]

        def field(t, y, *weights):
            with_time = ops.concatenate([y, ops.expand_dims(t, 1)], axis=1)
            return self.network.stateless_call(weights, [], with_time)[0]

        weights = self.network.trainable_variables
        return odeint_adjoint(field, y, [0.0, 1.0], weights, **self.options)[:, -1]

    def field(self, t, y):
        return self.network(ops.concatenate([y, ops.expand_dims(t, 1)], axis=1))

    def compute_output_shape(self, input_shape):
        return input_shape


def losses_in_fit(adjoint, options):
    """Of three epochs, compiled by XLA where the backend has it."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    model = keras.Model(inputs, Dynamics(adjoint, options)(inputs))
    jit = keras.backend.backend() != "torch"
    model.compile(keras.optimizers.SGD(0.1), loss="mse", jit_compile=jit)
    x = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
    run = model.fit(x, np.sin(x), batch_size=8, epochs=3, shuffle=False, verbose=0)
    return run.history["loss"]


def test_networks_train_in_fit_alike_by_both_gradients():
    options = dict(method="rk4_38", num_steps=20)
    losses = losses_in_fit(False, options)
    assert losses[-1] < losses[0]
    assert_close(losses_in_fit(True, options), losses)


def test_networks_train_in_fit_by_steps_after_the_error():
    losses = losses_in_fit(False, dict(rtol=1e-3, max_steps=8))
    assert losses[-1] < losses[0]
    equal = losses_in_fit(False, dict(method="dopri5", num_steps=4))
    assert_close(losses, equal, 1e-3)  # the tolerance


def test_the_adjoint_keeps_no_steps():
    if keras.backend.backend() != "torch":
        pytest.skip("PyTorch alone says which tensors are kept for the gradient")
    import torch

    (y0,), kept = tensors(rng.normal(size=(2, 3))), {}
    for adjoint in (False, True):
        for num_steps in (5, 50):
            options = dict(method="rk4", num_steps=num_steps)
            layer = Solution([0.0, 1.0], adjoint, options)
            layer.build((None, 3))
            sizes = kept[adjoint, num_steps] = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x
            ):
                layer.call(y0)
    assert sum(kept[True, 50]) == sum(kept[True, 5]) < sum(kept[False, 5])
    assert sum(kept[False, 50]) > 5 * sum(kept[False, 5])


@pytest.mark.parametrize(
    ("options", "format"),
    [
        (dict(method="heun", num_steps=3), "onnx"),
        (dict(rtol=1e-2, max_steps=4), "onnx"),
        (dict(rtol=1e-2, max_steps=4), "saved_model"),
    ],
)
def test_solutions_are_exported(options, format, tmp_path):
    path = tmp_path / ("model.onnx" if format == "onnx" else "model")
    assert export(model_of([0.0, 0.5], False, options), path, format) <= 1e-5


def test_a_file_of_very_many_attempts_is_refused():
    if keras.backend.backend() != "torch":
        pytest.skip("only on PyTorch does a file hold each attempt")
    (y0,) = tensors(rng.normal(size=(2, 2)))
    with export_scope("onnx"), pytest.raises(ValueError, match="256 .* at most 64; lo"):
        odeint(turning, y0, [0.0, 1.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(method="rk45"), "method must be one of 'euler', .* received 'rk45'"),
        (dict(method="rk4"), "'rk4' has no error .*; pass num_steps, or method='dop"),
    ],
)
def test_what_cannot_be_integrated_is_refused(options, message):
    (y0,) = tensors(rng.normal(size=(2, 2)))
    with pytest.raises(ValueError, match=message):
        odeint(turning, y0, [0.0, 1.0], **options)
    with pytest.raises(ValueError, match=message):
        odeint_adjoint(turning, y0, [0.0, 1.0], [], **options)
