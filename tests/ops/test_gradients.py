import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_edifice.ops.gradients import grad_sum, vjp
from tests.support.close import assert_close
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient

rng = np.random.default_rng(0)
KERNEL = rng.normal(size=(3, 4)).astype("float32")


def energy(x):
    return ops.sum(ops.sin(ops.matmul(x, ops.convert_to_tensor(KERNEL))) ** 2, -1)


def energy_in_numpy(x):
    return (np.sin(x @ KERNEL.astype("float64")) ** 2).sum(-1)


def test_gradient_of_a_sum_is_the_numerical_one():
    x = rng.normal(size=(5, 3)).astype("float32")
    expected = numerical_gradient(lambda x: energy_in_numpy(x).sum(), x)
    assert_close(grad_sum(energy, x), expected)


def test_vjp_is_the_cotangent_times_the_jacobian():
    a, b = rng.normal(size=(2, 4, 3)).astype("float32")
    cotangent = rng.normal(size=(4, 3)).astype("float32")
    value, found = vjp(lambda a, b: ops.tanh(a) * b, [a, b], cotangent)
    assert_close(value, np.tanh(a) * b)
    assert_close(found[0], cotangent * (1 - np.tanh(a) ** 2) * b)
    assert_close(found[1], cotangent * np.tanh(a))


def test_an_argument_without_influence_has_gradient_zero():
    a, b = rng.normal(size=(2, 3)).astype("float32")
    _, found = vjp(lambda a, b: a * 2.0, [a, b], np.ones(3, "float32"))
    assert_close(found[0], np.full(3, 2.0))
    assert_close(found[1], np.zeros(3))
    _, found = vjp(lambda a: ops.ones(3), [a], np.ones(3, "float32"))
    assert_close(found[0], np.zeros(3))


class Square(layers.Layer):
    """∂(a b)/∂a for a = x and b = x²: the way from a to b is not part of it."""

    def call(self, x):
        b = x**2
        return vjp(lambda a, b: a * b, [x, b], ops.ones_like(x))[1][0]


def test_arguments_computed_from_one_another_count_as_independent():
    x = rng.normal(size=(4, 3)).astype("float32")
    assert_close(Square()(x), x**2)
    _, by_input = gradients(Square(), x, ops.sum)
    assert_close(by_input, 2 * x)


def test_half_precision_rows_are_summed_in_float32():
    x = ops.cast(np.ones((4096, 1), "float32"), "bfloat16")
    found = grad_sum(lambda x: x * 3.0, x)
    assert keras.backend.standardize_dtype(found.dtype) == "bfloat16"
    assert_close(ops.cast(found, "float32"), np.full((4096, 1), 3.0))


class Descent(layers.Layer):
    """A few steps down a learned energy, which training differentiates through."""

    def __init__(self, steps, in_a_loop=False):
        super().__init__()
        self.steps, self.in_a_loop = steps, in_a_loop

    def build(self, shape):
        self.kernel = self.add_weight((shape[-1], 4), "glorot_normal", name="kernel")

    def step(self, x, kernel):
        def quartic(x):
            return ops.sum(ops.matmul(x, kernel) ** 4, -1) / 4.0

        return x - 0.1 * grad_sum(quartic, x)

    def call(self, x):
        kernel = ops.convert_to_tensor(self.kernel)
        if self.in_a_loop:
            kernel = ops.stop_gradient(kernel)
            return ops.fori_loop(0, self.steps, lambda i, x: self.step(x, kernel), x)
        for _ in range(self.steps):
            x = self.step(x, kernel)
        return x

    def compute_output_shape(self, shape):
        return shape


def descent_in_numpy(x, kernel, steps):
    for _ in range(steps):
        x = x - 0.1 * (x @ kernel) ** 3 @ kernel.T
    return x


@pytest.mark.parametrize("in_a_loop", [False, True])
def test_steps_down_an_energy_are_those_of_its_gradient(in_a_loop):
    layer, x = Descent(3, in_a_loop), rng.normal(size=(4, 3)).astype("float32")
    y = layer(x)
    assert_close(y, descent_in_numpy(x, layer.kernel.numpy(), 3))


def test_a_gradient_can_be_differentiated_again():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, Descent(2)(inputs))
    x = rng.normal(size=(4, 3)).astype("float32")
    by_weight, by_input = gradients(model, x, lambda y: ops.sum(ops.square(y)))
    kernel = model.get_weights()[0].astype("float64")

    def loss(x, kernel):
        return np.square(descent_in_numpy(x, kernel, 2)).sum()

    assert_close(by_input, numerical_gradient(lambda x: loss(x, kernel), x), 1e-4)
    expected = numerical_gradient(lambda kernel: loss(x, kernel), kernel)
    assert_close(by_weight[0], expected, 1e-4)


def test_a_model_with_an_inner_gradient_trains_in_fit():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, layers.Dense(1)(Descent(2)(inputs)))
    jit = keras.backend.backend() != "torch"
    model.compile(keras.optimizers.Adam(1e-2), loss="mse", jit_compile=jit)
    x = rng.normal(size=(32, 3)).astype("float32")
    history = model.fit(x, x[:, :1], epochs=5, verbose=0).history["loss"]
    assert history[-1] < history[0]


def test_gradients_work_in_predict_and_evaluate():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, Descent(2, in_a_loop=True)(inputs))
    model.compile(loss="mse")
    x = rng.normal(size=(4, 3)).astype("float32")
    expected = descent_in_numpy(x, model.get_weights()[0], 2)
    assert_close(model.predict(x, verbose=0), expected)
    assert model.evaluate(x, expected, verbose=0) < 1e-10
