import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_edifice.backends.running import inference
from keras_edifice.backends.traits import COMPILES_LOOPS
from keras_edifice.ops.gradients import grad_sum
from keras_edifice.ops.gru_scan import gru_scan
from tests.support.applied import assert_same_gradients
from tests.support.close import assert_close, to_numpy
from tests.support.compiled import compiled

rng = np.random.default_rng(0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def recurrence(x, kernel, recurrent, bias, recurrent_bias, h):
    """The equation of the module, a loop in float64."""
    states = []
    for x_t in x:
        a_z, a_r, a_n = np.split(x_t @ kernel + bias, 3, axis=-1)
        p_z, p_r, p_n = np.split(h @ recurrent + recurrent_bias, 3, axis=-1)
        z, n = sigmoid(a_z + p_z), np.tanh(a_n + sigmoid(a_r + p_r) * p_n)
        h = z * h + (1 - z) * n
        states.append(h)
    return np.stack(states), h


def arguments(length=5, units=3, scale=1.0):
    gates = 3 * units
    weights = [(2, gates), (units, gates), (gates,), (gates,)]
    shapes = [(length, 2, 2), *weights, (2, units)]
    return [(scale * rng.normal(size=s)).astype("float32") for s in shapes]


def run(arrays, dtype="float32"):
    return compiled(gru_scan)(*(ops.convert_to_tensor(z, dtype) for z in arrays))


@pytest.mark.parametrize("units", [1, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 37])
def test_scan_is_the_recurrence(length, units):
    arrays = arguments(length, units)
    expected = recurrence(*(to_numpy(z) for z in arrays))
    for found, wanted in zip(run(arrays), expected, strict=True):
        assert_close(found, wanted)


@pytest.mark.parametrize("units", [1, 3, 4])
@pytest.mark.parametrize("length", [1, 5])
def test_gradient_is_that_of_the_recurrence(length, units):
    """Of all outputs and the last state, in all arguments."""

    def joined(scan, concatenate, expand):
        def function(*arrays):
            hs, h = scan(*arrays)
            return concatenate([hs, expand(h, 0)])

        return function

    assert_same_gradients(
        joined(gru_scan, ops.concatenate, ops.expand_dims),
        joined(recurrence, np.concatenate, np.expand_dims),
        arguments(length, units),
    )


@pytest.mark.parametrize("which", [0, 1])
def test_each_result_has_its_gradient_alone(which):
    assert_same_gradients(
        lambda *arrays: gru_scan(*arrays)[which],
        lambda *arrays: recurrence(*arrays)[which],
        arguments(),
    )


def test_long_sequences_and_saturated_gates_stay_finite():
    for scale in (1.0, 1e4):
        arrays = [ops.convert_to_tensor(z) for z in arguments(4096, scale=scale)]

        def by_input(*arrays):
            def total(x):
                hs, h = gru_scan(x, *arrays[1:])
                return ops.sum(hs) + ops.sum(h)

            return gru_scan(*arrays), grad_sum(total, arrays[0])

        run = inference(by_input, []) if COMPILES_LOOPS else by_input
        found, gradient = run(*arrays)
        for z in [*found, gradient]:
            assert np.isfinite(to_numpy(z)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_computed_in_float32(dtype):
    arrays = [ops.cast(ops.convert_to_tensor(z), dtype) for z in arguments(300)]
    expected = recurrence(*(to_numpy(ops.cast(z, "float32")) for z in arrays))
    digits = {"float16": 2**-11, "bfloat16": 2**-8}[dtype]  # those of one rounding
    for found, wanted in zip(compiled(gru_scan)(*arrays), expected, strict=True):
        assert keras.backend.standardize_dtype(found.dtype) == dtype
        assert_close(ops.cast(found, "float32"), wanted, digits + 1e-5)


@pytest.mark.skipif(
    keras.backend.backend() == "torch",
    reason="PyTorch does not know how the gradient came about",
)
def test_the_second_derivative_is_that_of_plain_operations():
    arrays = [ops.convert_to_tensor(z) for z in arguments()]

    def plain(x):
        kernel, recurrent, bias, recurrent_bias, h = arrays[1:]
        total = 0.0
        for t in range(len(x)):
            a = ops.matmul(x[t], kernel) + bias
            p = ops.matmul(h, recurrent) + recurrent_bias
            a_z, a_r, a_n = ops.split(a, 3, axis=-1)
            p_z, p_r, p_n = ops.split(p, 3, axis=-1)
            z, r = ops.sigmoid(a_z + p_z), ops.sigmoid(a_r + p_r)
            h = z * h + (1 - z) * ops.tanh(a_n + r * p_n)
            total = total + ops.sum(ops.square(h))
        return total

    def scanned(x):
        return ops.sum(ops.square(gru_scan(x, *arrays[1:])[0]))

    def second(function):
        return grad_sum(lambda x: ops.sum(ops.square(grad_sum(function, x))), arrays[0])

    assert_close(second(scanned), to_numpy(second(plain)), 1e-4)


def test_scan_is_the_loop_of_keras():
    layer = layers.GRU(4, return_sequences=True, return_state=True)
    layer.build((None, 6, 3))
    layer.set_weights([rng.normal(size=w.shape) for w in layer.get_weights()])
    kernel, recurrent, biases = layer.get_weights()
    x, h = (rng.normal(size=s).astype("float32") for s in ((2, 6, 3), (2, 4)))
    all_h, last = map(to_numpy, layer(x, initial_state=h))
    found = run([x.swapaxes(0, 1), kernel, recurrent, *biases, h])
    for ours, theirs in zip(found, [all_h.swapaxes(0, 1), last], strict=True):
        assert_close(ours, theirs, 1e-6)
