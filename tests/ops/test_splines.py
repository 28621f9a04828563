import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.exporting import export
from keras_edifice.model import EdificeModel
from keras_edifice.ops.gradients import grad_sum
from keras_edifice.ops.splines import (
    adapted_knots,
    bspline_basis,
    bspline_derivative,
    chebyshev_basis,
    extended_knots,
    fit_coefficients,
    fourier_basis,
    group_rational,
    rbf_basis,
    refit_coefficients,
    sine_basis,
    spline_values,
    uniform_knots,
)
from tests.support.close import assert_close, to_numpy
from tests.support.compiled import compiled
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient

rng = np.random.default_rng(0)


def cox_de_boor(x, t, m, p):
    """Base m of order p at a number x, by the definition."""
    if p == 0:
        return float(t[m] <= x < t[m + 1])
    left, right = t[m + p] - t[m], t[m + p + 1] - t[m + 1]
    rising = (x - t[m]) / left * cox_de_boor(x, t, m, p - 1) if left else 0.0
    falling = (t[m + p + 1] - x) / right if right else 0.0
    return rising + falling * cox_de_boor(x, t, m + 1, p - 1)


def reference(x, knots, order):
    """(..., i), (i, n) -> (..., i, n - 1 - order), in float64."""
    x, knots = np.asarray(x, "float64"), np.asarray(knots, "float64")
    y = np.zeros((*x.shape, knots.shape[-1] - 1 - order))
    for place in np.ndindex(*y.shape):
        *at, m = place
        y[place] = cox_de_boor(x[tuple(at)], knots[at[-1]], m, order)
    return y


def random_knots(features, grid_size, order):
    steps = rng.uniform(0.2, 1.0, size=(features, grid_size + 2 * order))
    knots = np.concatenate([np.zeros((features, 1)), np.cumsum(steps, -1)], -1)
    return (knots - knots.mean()).astype("float32")


def value(function, *arrays):
    return to_numpy(compiled(function)(*map(ops.convert_to_tensor, arrays)))


def gradient(function, x, weights):
    """Of Σ weights * function(x) in x."""
    weights = ops.convert_to_tensor(weights.astype("float32"))
    model = keras.layers.Activation(function)
    return gradients(model, x, lambda y: ops.sum(y * weights))[1]


@pytest.mark.parametrize(
    ("grid_size", "order"), [(1, 1), (5, 0), (4, 2), (5, 3), (3, 4)]
)
def test_bases_are_the_recursion_of_the_paper(grid_size, order):
    knots = random_knots(2, grid_size, order)
    x = rng.uniform(knots.min() - 1, knots.max() + 1, size=(3, 7, 2)).astype("float32")
    y = value(lambda x, t: bspline_basis(x, t, order), x, knots)
    assert y.shape == (3, 7, 2, grid_size + order)
    assert_close(y, reference(x, knots, order))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_repeated_knots_divide_by_nothing(order):
    ends = [-1.0] * (order + 1), [1.0] * (order + 1)
    knots = np.array([*ends[0], 0.0, 0.5, 0.5, *ends[1]], "float32")
    x = rng.uniform(-1.2, 1.2, size=(20, 1)).astype("float32")
    x[:3, 0] = -1.0, 0.5, 1.0
    y = value(lambda x, t: bspline_basis(x, t, order), x, knots)
    assert_close(y, reference(x, knots[None], order))
    weights = rng.normal(size=y.shape)
    found = gradient(
        lambda x: bspline_basis(x, ops.convert_to_tensor(knots), order), x, weights
    )
    assert np.isfinite(found).all()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_bases_sum_to_one_between_the_ends_and_vanish_beyond(order):
    knots = uniform_knots(-1.0, 1.0, 5, order).astype("float32")
    x = np.linspace(-0.999, 0.999, 101, dtype="float32")[:, None]
    total = value(lambda x, t: bspline_basis(x, t, order), x, knots).sum(-1)
    assert_close(total, np.ones_like(total))
    beyond = np.array([[knots[0] - 0.1], [knots[-1] + 0.1], [knots[-1]]], "float32")
    y = value(lambda x, t: bspline_basis(x, t, order), beyond, knots)
    assert (y == 0).all()


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_derivative_and_gradient_are_the_slope_of_the_bases(order):
    knots, x = random_knots(2, 4, order), rng.normal(size=(5, 2)).astype("float32")
    weights = rng.normal(size=(5, 2, 4 + order))
    expected = numerical_gradient(
        lambda x: (reference(x, knots, order) * weights).sum(), x
    )

    def basis(x):
        return bspline_basis(x, ops.convert_to_tensor(knots), order)

    assert_close(gradient(basis, x, weights), expected, 1e-4)
    slopes = value(lambda x, t: bspline_derivative(x, t, order), x, knots)
    assert_close((slopes * weights).sum(-1), expected, 1e-4)


def test_second_derivative_is_that_of_the_spline():
    knots = uniform_knots(-1.0, 1.0, 4, 3)
    coefficients = rng.normal(size=7)
    x = np.linspace(-0.9, 0.95, 12)[:, None].astype("float32")

    def spline(x):
        bases = bspline_basis(x, ops.convert_to_tensor(knots.astype("float32")))
        return ops.sum(bases * ops.convert_to_tensor(coefficients.astype("float32")))

    found = value(lambda x: grad_sum(lambda z: grad_sum(spline, z), x), x)

    def exact(x):
        return (reference(x, knots[None], 3) * coefficients).sum(-1)

    step = 1e-3  # exact for a cubic but where a knot is nearer than this
    expected = (exact(x + step) - 2 * exact(x) + exact(x - step)) / step**2
    assert_close(found, expected, 1e-3)


def test_cubic_splines_are_smooth_at_the_knots():
    knots = uniform_knots(-1.0, 1.0, 5, 3).astype("float32")
    places = knots[3:-3, None]
    for function, order in ((bspline_basis, 3), (bspline_derivative, 3)):
        jump = value(lambda x, t, f=function: f(x, t, 3), places + 1e-4, knots)
        jump -= value(lambda x, t, f=function: f(x, t, 3), places - 1e-4, knots)
        assert np.abs(jump).max() < 1e-2, (function, order)


def test_half_precision_is_computed_in_float32():
    x = ops.cast(rng.uniform(-1, 1, size=(9, 2)).astype("float32"), "bfloat16")
    knots = ops.convert_to_tensor(uniform_knots(-1.0, 1.0, 5).astype("float32"))
    y = compiled(bspline_basis)(x, knots)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    exact = reference(to_numpy(ops.cast(x, "float32")), [to_numpy(knots)] * 2, 3)
    # bfloat16 keeps 8 bits.
    assert_close(ops.cast(y, "float32"), exact, 4e-3)


def test_uniform_knots_go_on_at_the_same_distance():
    assert_close(uniform_knots(-1, 1, 4, 2), np.arange(-4, 5) * 0.5, 1e-12)
    points = np.array([[0.0, 1.0, 4.0], [2.0, 3.0, 4.0]])
    extended = extended_knots(points, 1)
    assert_close(extended, [[-2, 0, 1, 4, 6], [1, 2, 3, 4, 5]], 1e-12)
    assert_close(extended_knots(points, 0), points, 0)


def test_a_cubic_is_fitted_exactly():
    x = rng.uniform(-1, 1, size=(60, 2))
    knots = np.stack([uniform_knots(-1, 1, 5), uniform_knots(-1.5, 1.2, 5)])
    y = np.stack([1 - x + 2 * x**3, x**2 - 3.0], axis=-1)
    coefficients = fit_coefficients(x, y, knots)
    assert coefficients.shape == (2, 2, 8)
    assert_close(spline_values(x, knots, coefficients), y, 1e-9)
    bases = value(bspline_basis, x.astype("float32"), knots.astype("float32"))
    assert_close(np.einsum("nim,iom->nio", bases, coefficients), y)


def test_fit_is_the_least_squares_one_and_the_shortest():
    x, y = rng.uniform(-1, 1, size=(30, 1)), rng.normal(size=(30, 1, 1))
    knots = uniform_knots(-1, 1, 4, 2)[None]
    bases = reference(x, knots, 2)[:, 0]
    expected = np.linalg.pinv(bases) @ y[:, 0]
    assert_close(fit_coefficients(x, y, knots, 2)[0], expected.T, 1e-9)
    few = fit_coefficients(x[:3], y[:3], knots, 2)
    assert_close(few[0], (np.linalg.pinv(bases[:3]) @ y[:3, 0]).T, 1e-9)
    assert_close(spline_values(x[:3], knots, few, 2), y[:3], 1e-9)


def test_a_finer_grid_keeps_the_function():
    x = np.linspace(-0.99, 0.99, 80)[:, None] * np.ones(2)
    knots, coefficients = uniform_knots(-1, 1, 4), rng.normal(size=(2, 3, 7))
    finer = uniform_knots(-1, 1, 8)  # it contains the knots of the coarser one
    refined = refit_coefficients(x, coefficients, knots, finer)
    assert refined.shape == (2, 3, 11)
    assert_close(
        spline_values(x, finer, refined), spline_values(x, knots, coefficients), 1e-9
    )


def test_adapted_knots_follow_the_samples():
    x = np.stack([rng.normal(size=400), rng.exponential(size=400)], axis=-1)
    points = adapted_knots(x, 5, 3, grid_eps=0.0)[:, 3:-3]
    assert_close(points, np.quantile(x, np.linspace(0, 1, 6), axis=0).T, 1e-12)
    uniform = adapted_knots(x, 5, 3, grid_eps=1.0)
    expected = [uniform_knots(z.min(), z.max(), 5) for z in x.T]
    assert_close(uniform, expected, 1e-9)
    mixed = adapted_knots(x, 5, 3, grid_eps=0.02)
    assert mixed.shape == (2, 12)
    assert (np.diff(mixed) > 0).all()
    assert_close(mixed[:, 3:-3], 0.02 * uniform[:, 3:-3] + 0.98 * points, 1e-9)


def test_a_constant_sample_gets_an_interval_around_it():
    knots = adapted_knots(np.full((10, 1), 7.0), 2, 1)
    assert_close(knots, [[6.0, 6.5, 7.0, 7.5, 8.0]], 1e-12)


def test_values_survive_new_knots_up_to_the_residual():
    x, coefficients = rng.uniform(-1, 1, size=(300, 1)), rng.normal(size=(1, 1, 8))
    knots = uniform_knots(-1, 1, 5)[None]
    new = adapted_knots(x, 5)
    before = spline_values(x, knots, coefficients)
    after = spline_values(x, new, refit_coefficients(x, coefficients, knots, new))
    bases = reference(x, new, 3)[:, 0]
    best = bases @ np.linalg.lstsq(bases, before[:, 0])[0]
    assert_close(after[:, 0], best, 1e-8)


def test_other_bases_are_their_equations():
    x = rng.uniform(-1, 1, size=(4, 3)).astype("float32")
    z = x.astype("float64")[..., None]
    chebyshev = np.cos(np.arange(6) * np.arccos(z))
    assert_close(value(lambda x: chebyshev_basis(x, 5), x), chebyshev)
    assert_close(value(lambda x: chebyshev_basis(x, 0), x), np.ones((4, 3, 1)), 0)
    n = np.arange(1, 5)
    fourier = np.concatenate([np.cos(n * z), np.sin(n * z)], axis=-1)
    assert_close(value(lambda x: fourier_basis(x, 4), x), fourier)
    centres = np.linspace(-2, 2, 5)
    rbf = np.exp(-(((z - centres) / 1.0) ** 2))
    assert_close(value(lambda x: rbf_basis(x, -2.0, 2.0, 5), x), rbf)
    frequencies, phases = rng.normal(size=6), rng.normal(size=(3, 6))
    sine = np.sin(z * frequencies + phases)
    found = value(
        sine_basis, x, frequencies.astype("float32"), phases.astype("float32")
    )
    assert_close(found, sine)


def rational(x, a, b, form):
    """The equation of the function, channel by channel in float64."""
    x, a, b = (np.asarray(z, "float64") for z in (x, a, b))
    y = np.zeros_like(x)
    for c in range(x.shape[-1]):
        group = c // (x.shape[-1] // len(b))
        top = a if a.ndim == 1 else a[group]
        z = x[..., c]
        p = sum(top[n] * z**n for n in range(len(top)))
        terms = [b[group, n] * z ** (n + 1) for n in range(b.shape[1])]
        q = sum(map(np.abs, terms)) if form == "abs_sum" else np.abs(sum(terms))
        y[..., c] = p / (1 + q)
    return y


FORMS = pytest.mark.parametrize("form", ["abs_sum", "paper"])


@FORMS
@pytest.mark.parametrize("shared", [True, False])
def test_rational_function_has_a_denominator_for_each_group(form, shared):
    x = 2.0 * rng.normal(size=(2, 3, 6)).astype("float32")
    a = rng.normal(size=(6,) if shared else (2, 6)).astype("float32")
    b = rng.normal(size=(2, 4)).astype("float32")
    y = value(lambda *z: group_rational(*z, form=form), x, a, b)
    assert_close(y, rational(x, a, b, form), 1e-4)  # fifth powers cancel


@FORMS
def test_gradients_of_the_rational_function(form):
    arrays = [
        rng.normal(size=shape).astype("float32") for shape in [(4, 4), (6,), (2, 4)]
    ]
    weights = rng.normal(size=(4, 4))

    class Rational(keras.layers.Layer):
        def build(self, _):
            self.a, self.b = self.add_weight((6,)), self.add_weight((2, 4))

        def call(self, x):
            return group_rational(x, self.a * 1.0, self.b * 1.0, form)

    layer = Rational()
    layer.build(None)
    layer.set_weights(arrays[1:])
    weights_ = ops.convert_to_tensor(weights.astype("float32"))
    by_weights, by_x = gradients(layer, arrays[0], lambda y: ops.sum(y * weights_))
    for i, found in enumerate([by_x, *by_weights]):

        def total(z, i=i):
            return (rational(*arrays[:i], z, *arrays[i + 1 :], form) * weights).sum()

        assert_close(found, numerical_gradient(total, arrays[i]), 1e-4)


@FORMS
def test_a_denominator_of_zeros_learns_and_zero_has_a_finite_gradient(form):
    x = np.array([[0.0, 1.0, -1.0, 2.0]], "float32")
    a = np.array([0.0, 1.0, 0, 0, 0, 0], "float32")

    def function(b):
        return group_rational(
            ops.convert_to_tensor(x), ops.convert_to_tensor(a), b, form
        )

    b = np.zeros((1, 4), "float32")
    assert_close(value(function, b), x, 0)
    found = gradient(function, b, np.ones((1, 4)))
    powers = [x ** (n + 1) if form == "paper" else abs(x) ** (n + 1) for n in range(4)]
    assert_close(found, [[-(x * z).sum() for z in powers]])
    slope = gradient(
        lambda x: group_rational(x, *map(ops.convert_to_tensor, (a, b)), form),
        x,
        np.ones((1, 4)),
    )
    assert_close(slope, np.ones((1, 4)))


def test_published_coefficients_are_near_silu_and_gelu():
    from math import erf

    x = np.linspace(-3, 3, 61, dtype="float32")[:, None]
    a = [3.0549e-7, 0.50000079, 0.24999783, 0.05326628, 0.00580303, 0.00027520]
    b = [-4.1116e-6, 0.10652899, -1.2690e-6, 0.00055023]
    y = value(group_rational, x, np.array(a, "float32"), np.array([b], "float32"))
    assert_close(y, x / (1 + np.exp(-x.astype("float64"))), 1e-5)
    a = [-0.00153969, 0.51692871, 0.44075827, 0.0972553, -0.00884418, -0.00378675]
    b = [-0.14171056, -0.06481231, -0.0444695, 0.01283776]
    arrays = x, np.array(a, "float32"), np.array([b], "float32")
    y = value(lambda *z: group_rational(*z, form="paper"), *arrays)
    gelu = [[0.5 * z * (1 + erf(z / 2**0.5))] for z in x[:, 0]]
    assert np.abs(y - gelu).max() < 4e-3  # how near the published fit is


def test_wrong_groups_and_forms_are_refused():
    a, b = ops.zeros((6,)), ops.zeros((4, 4))
    with pytest.raises(
        ValueError, match="multiple of the 4 groups, received 6; change"
    ):
        group_rational(ops.zeros((2, 6)), a, b)
    with pytest.raises(ValueError, match="'abs_sum' or 'paper', received 'sum'"):
        group_rational(ops.zeros((2, 8)), a, b, form="sum")


@keras.saving.register_keras_serializable("test_splines")
class Splines(keras.layers.Layer):
    """(..., i) -> (..., 3): splines of each input, summed, and a rational function."""

    def build(self, input_shape):
        features = input_shape[-1]
        self.knots = self.add_weight((features, 12), trainable=False, name="knots")
        self.knots.assign(np.tile(uniform_knots(-2, 2, 5), (features, 1)))
        self.coefficients = self.add_weight((features, 8, 3), "normal", name="c")
        self.a = self.add_weight((6,), "ones", name="a")
        self.b = self.add_weight((3, 4), "zeros", name="b")

    def call(self, x):
        bases = bspline_basis(x, self.knots)
        y = ops.einsum("...im,imo->...o", bases, self.coefficients)
        return group_rational(y, self.a, self.b)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], 3)


def model():
    inputs = keras.Input((None, 4), name="inputs")
    return EdificeModel(inputs, Splines()(inputs), name="splines")


@pytest.mark.parametrize("format", ["onnx", "saved_model"])
def test_splines_are_exported(format, tmp_path):
    name = "model.onnx" if format == "onnx" else "model"
    assert export(model(), tmp_path / name, format) <= 1e-4


def test_splines_train():
    trained = model()
    before = [np.array(w) for w in trained.trainable_weights]
    trained.compile("adam", "mse", jit_compile=keras.backend.backend() != "torch")
    x = rng.normal(size=(4, 7, 4)).astype("float32")
    trained.fit(x, 2.0 + x[..., :3], verbose=0)
    for old, weight in zip(before, trained.trainable_weights, strict=True):
        assert np.abs(to_numpy(weight.value) - old).max() > 0, weight.path
