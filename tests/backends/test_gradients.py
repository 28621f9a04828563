import numpy as np
from keras import ops

from keras_edifice.backends.gradients import backend_vjp
from tests.support.close import assert_close

rng = np.random.default_rng(0)


def tensors(*shapes):
    return [ops.convert_to_tensor(rng.normal(size=s).astype("float32")) for s in shapes]


def test_value_and_gradients_are_those_of_the_product():
    x, w, cotangent = tensors((4, 3), (3, 2), (4, 2))
    y, (by_x, by_w) = backend_vjp(ops.matmul, [x, w], cotangent)
    assert_close(y, ops.matmul(x, w))
    assert_close(by_x, ops.matmul(cotangent, ops.transpose(w)))
    assert_close(by_w, ops.matmul(ops.transpose(x), cotangent))


def test_what_the_value_does_not_depend_on_has_a_gradient_of_zeros():
    x, unused, cotangent = tensors((5,), (2,), (5,))
    _, (by_x, by_unused) = backend_vjp(
        lambda x, unused: 3.0 * x, [x, unused], cotangent
    )
    assert_close(by_x, 3.0 * cotangent)
    assert_close(by_unused, np.zeros(2))


def test_a_constant_has_gradients_of_zeros():
    x, cotangent = tensors((5,), (5,))
    y, (by_x,) = backend_vjp(lambda x: ops.ones((5,)), [x], cotangent)
    assert_close(y, np.ones(5))
    assert_close(by_x, np.zeros(5))


def test_gradients_have_gradients():
    x, ones = ops.convert_to_tensor(np.array([0.3, -1.2], "float32")), np.ones(2)
    ones = ops.convert_to_tensor(ones.astype("float32"))

    def slope(x):
        return backend_vjp(lambda x: ops.power(x, 3), [x], ones)[1][0]

    y, (by_x,) = backend_vjp(slope, [x], ones)
    assert_close(y, 3.0 * np.square([0.3, -1.2]))
    assert_close(by_x, 6.0 * np.array([0.3, -1.2]))
