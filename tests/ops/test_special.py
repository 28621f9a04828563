import math

import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.exporting import export
from keras_edifice.model import EdificeModel
from keras_edifice.ops.special import digamma, entmax15, lgamma, sparsemax
from tests.support.close import assert_close, to_numpy
from tests.support.compiled import compiled
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient

rng = np.random.default_rng(0)
BOTH = pytest.mark.parametrize("function", [sparsemax, entmax15])


def by_bisection(z, function):
    """The τ at which the entries sum to one, found without sorting, in float64."""
    z = np.asarray(z, "float64")
    if function is entmax15:
        z = z / 2

    def entries(tau):
        positive = np.maximum(z - tau, 0.0)
        return positive**2 if function is entmax15 else positive

    low, high = z.max(-1, keepdims=True) - 1.0, z.max(-1, keepdims=True)
    for _ in range(80):
        middle = (low + high) / 2
        too_low = entries(middle).sum(-1, keepdims=True) > 1.0
        low, high = np.where(too_low, middle, low), np.where(too_low, high, middle)
    return entries(low)


def as_model(function, size):
    return keras.Sequential([keras.Input((size,)), keras.layers.Activation(function)])


def jacobian(function, z):
    """d p_i / d z_j, a row by the gradient of each entry."""
    model = as_model(function, len(z))
    rows = [
        gradients(model, z[None], lambda y, i=i: ops.sum(y[:, i]))[1][0]
        for i in range(len(z))
    ]
    return np.stack(rows)


@BOTH
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_values_are_those_of_the_threshold(function, scale):
    z = (rng.normal(size=(50, 7)) * scale).astype("float32")
    assert_close(function(ops.convert_to_tensor(z)), by_bisection(z, function))


@BOTH
def test_any_number_of_leading_axes(function):
    z = rng.normal(size=(2, 3, 5)).astype("float32")
    assert_close(function(ops.convert_to_tensor(z)), by_bisection(z, function))


@BOTH
def test_rows_sum_to_one_with_exact_zeros(function):
    p = to_numpy(function(ops.convert_to_tensor(rng.normal(size=(50, 9)) * 3.0)))
    assert_close(p.sum(-1), np.ones(50), 1e-6)
    assert (p == 0.0).any()
    assert (p >= 0.0).all()


@BOTH
def test_equal_entries_share(function):
    z = np.array([[2.0, 2.0, 2.0, 2.0], [1.0, 1.0, -9.0, -9.0]], "float32")
    expected = [[0.25] * 4, [0.5, 0.5, 0.0, 0.0]]
    assert_close(function(ops.convert_to_tensor(z)), expected, 1e-6)


@BOTH
def test_far_apart_entries_give_one_hot(function):
    z = np.array([[1e6, -1e6, 0.0], [-3e4, 5e4, 4.9e4]], "float32")
    expected = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    assert_close(function(ops.convert_to_tensor(z)), expected, 0)


def test_jacobian_of_sparsemax():
    z = np.array([0.5, 0.2, -2.0, 0.4, -0.1], "float32")
    support = by_bisection(z, sparsemax) > 0
    k = support.sum()
    assert 1 < k < len(z)
    expected = np.diag(support * 1.0) - np.outer(support, support) / k
    assert_close(jacobian(sparsemax, z), expected, 1e-6)


def test_jacobian_of_entmax15():
    z = np.array([0.5, 0.2, -2.5, 0.4, -0.1], "float32")
    s = np.sqrt(by_bisection(z, entmax15))
    assert 1 < (s > 0).sum() < len(z)
    assert_close(jacobian(entmax15, z), np.diag(s) - np.outer(s, s) / s.sum(), 1e-5)


@BOTH
def test_gradient_is_the_numerical_one(function):
    z = rng.normal(size=(3, 5)).astype("float32")
    weights = rng.normal(size=(3, 5))
    _, by_input = gradients(
        as_model(function, 5),
        z,
        lambda y: ops.sum(y * ops.convert_to_tensor(weights.astype("float32"))),
    )
    expected = numerical_gradient(
        lambda z: (by_bisection(z, function) * weights).sum(), z
    )
    assert_close(by_input, expected, 1e-4)


@BOTH
def test_half_precision_is_computed_in_float32(function):
    z = rng.normal(size=(4, 6)).astype("float32")
    p = function(ops.cast(ops.convert_to_tensor(z), "bfloat16"))
    assert keras.backend.standardize_dtype(p.dtype) == "bfloat16"
    rounded = to_numpy(ops.cast(ops.cast(z, "bfloat16"), "float32"))
    # The result has eight bits, and so one part in 256 of rounding.
    assert_close(ops.cast(p, "float32"), by_bisection(rounded, function), 4e-3)


POSITIVE = np.concatenate(
    [np.geomspace(1e-3, 1e3, 2001), np.linspace(0.9, 3.1, 201), [1.0, 2.0, 3.0]]
).astype("float32")


def log_gamma(x):
    return np.vectorize(math.lgamma)(np.asarray(x, "float64"))


def psi(x):
    """ψ(x) = ψ(x + 1) - 1/x up to 100, where the series has two terms to give."""
    x, total = np.array(x, "float64"), 0.0
    for _ in range(100):
        total, x = total - 1.0 / x, x + 1.0
    return total + np.log(x) - 0.5 / x - 1 / (12 * x**2) + 1 / (120 * x**4)


def psi_slope(x):
    """ψ'(x) = ψ'(x + 1) + 1/x², in the same way."""
    x, total = np.array(x, "float64"), 0.0
    for _ in range(100):
        total, x = total + 1.0 / x**2, x + 1.0
    return total + 1 / x + 0.5 / x**2 + 1 / (6 * x**3) - 1 / (30 * x**5)


def test_the_reference_of_digamma_is_the_slope_of_lgamma():
    x = np.geomspace(0.1, 100.0, 9)
    slope = numerical_gradient(lambda x: log_gamma(x).sum(), x)
    assert_close(psi(x), slope, 1e-6)
    assert_close(psi(1.0), -0.57721566490153286, 1e-12)
    slope = numerical_gradient(lambda x: psi(x).sum(), x)
    assert_close(psi_slope(x), slope, 1e-6)


@pytest.mark.parametrize(
    ("function", "reference"), [(lgamma, log_gamma), (digamma, psi)]
)
def test_values_over_six_decades(function, reference):
    found = to_numpy(compiled(function)(ops.convert_to_tensor(POSITIVE)))
    expected = reference(POSITIVE)
    # Both functions have zeros, near which the error is absolute.
    error = np.abs(found - expected) / np.maximum(1.0, np.abs(expected))
    assert error.max() < 1e-6


@pytest.mark.parametrize("x", [1e-30, 1e-8, 1e8, 1e30])
def test_far_outside_nothing_overflows(x):
    x = np.float32(x)
    both = compiled(lambda x: (lgamma(x), digamma(x)))
    found = both(ops.convert_to_tensor(x[None]))
    assert_close(found[0], log_gamma(x[None]), 1e-6)
    assert_close(found[1], psi(x[None]), 1e-6)


@pytest.mark.parametrize(("function", "slope"), [(lgamma, psi), (digamma, psi_slope)])
def test_slopes_are_those_of_the_functions(function, slope):
    x = np.concatenate([np.geomspace(1e-2, 1e3, 101), [1e-6, 1.0, 2.0, 3.0, 1e20]])
    x = x.astype("float32")
    model = as_model(function, len(x))
    _, by_input = gradients(model, x[None], ops.sum)
    assert_close(by_input[0], slope(x), 1e-6)


@pytest.mark.parametrize("function", [lgamma, digamma])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gamma_functions_of_half_precision_are_computed_in_float32(function, dtype):
    x = ops.cast(ops.convert_to_tensor(POSITIVE[::40]), dtype)
    y = function(x)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    exact = ops.cast(function(ops.cast(x, "float32")), dtype)
    assert_close(ops.cast(y, "float32"), ops.cast(exact, "float32"), 0)


@keras.saving.register_keras_serializable("tests")
class GammaFunctions(keras.layers.Layer):
    """(batch, features) -> the same: ln Γ and ψ of positive numbers."""

    def call(self, x):
        x = 0.1 + ops.square(x)
        return lgamma(x) + digamma(x) * sparsemax(x)

    def compute_output_shape(self, input_shape):
        return input_shape


@pytest.mark.parametrize("format", ["onnx", "saved_model"])
def test_gamma_functions_are_exported(format, tmp_path):
    inputs = keras.Input((5,), name="inputs")
    x = keras.layers.Dense(4)(inputs)
    model = EdificeModel(inputs, GammaFunctions()(x), name="gamma")
    path = tmp_path / ("model.onnx" if format == "onnx" else "model")
    assert export(model, path, format) <= 1e-5


def test_gamma_functions_train_in_fit():
    inputs = keras.Input((5,))
    x = GammaFunctions()(keras.layers.Dense(4)(inputs))
    model = keras.Model(inputs, x)
    jit = keras.backend.backend() != "torch"
    model.compile(keras.optimizers.Adam(1e-2), loss="mse", jit_compile=jit)
    x = rng.normal(size=(32, 5)).astype("float32")
    history = model.fit(x, np.zeros((32, 4), "float32"), epochs=5, verbose=0)
    assert history.history["loss"][-1] < history.history["loss"][0]
