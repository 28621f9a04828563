import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_edifice.backends.running import inference
from keras_edifice.backends.traits import COMPILES_LOOPS
from keras_edifice.ops.gradients import grad_sum
from keras_edifice.ops.lstm_scan import lstm_scan
from tests.support.applied import assert_same_gradients
from tests.support.close import assert_close, to_numpy
from tests.support.compiled import compiled

rng = np.random.default_rng(0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def recurrence(x, kernel, recurrent, bias, h, c):
    """The equation of the module, a loop in float64."""
    states = []
    for x_t in x:
        z = x_t @ kernel + h @ recurrent + bias
        i, f, g, o = np.split(z, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        states.append(h)
    return np.stack(states), h, c


def arguments(length=5, units=3, scale=1.0):
    gates = 4 * units
    matrices = [(2, gates), (units, gates), (gates,)]
    shapes = [(length, 2, 2), *matrices, (2, units), (2, units)]
    return [(scale * rng.normal(size=s)).astype("float32") for s in shapes]


def run(arrays, dtype="float32"):
    return compiled(lstm_scan)(*(ops.convert_to_tensor(z, dtype) for z in arrays))


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
    """Of all outputs and both last states, in all arguments."""

    def joined(scan, concatenate, expand):
        def function(*arrays):
            hs, h, c = scan(*arrays)
            return concatenate([hs, expand(h, 0), expand(c, 0)])

        return function

    assert_same_gradients(
        joined(lstm_scan, ops.concatenate, ops.expand_dims),
        joined(recurrence, np.concatenate, np.expand_dims),
        arguments(length, units),
    )


@pytest.mark.parametrize("which", [0, 1, 2])
def test_each_result_has_its_gradient_alone(which):
    assert_same_gradients(
        lambda *arrays: lstm_scan(*arrays)[which],
        lambda *arrays: recurrence(*arrays)[which],
        arguments(),
    )


def test_long_sequences_and_saturated_gates_stay_finite():
    for scale in (1.0, 1e4):
        arrays = [ops.convert_to_tensor(z) for z in arguments(4096, scale=scale)]

        def by_input(*arrays):
            def total(x):
                hs, h, c = lstm_scan(x, *arrays[1:])
                return ops.sum(hs) + ops.sum(h) + ops.sum(c)

            return lstm_scan(*arrays), grad_sum(total, arrays[0])

        run = inference(by_input, []) if COMPILES_LOOPS else by_input
        found, gradient = run(*arrays)
        for z in [*found, gradient]:
            assert np.isfinite(to_numpy(z)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_computed_in_float32(dtype):
    arrays = [ops.cast(ops.convert_to_tensor(z), dtype) for z in arguments(300)]
    expected = recurrence(*(to_numpy(ops.cast(z, "float32")) for z in arrays))
    digits = {"float16": 2**-11, "bfloat16": 2**-8}[dtype]  # those of one rounding
    for found, wanted in zip(compiled(lstm_scan)(*arrays), expected, strict=True):
        assert keras.backend.standardize_dtype(found.dtype) == dtype
        assert_close(ops.cast(found, "float32"), wanted, digits + 1e-5)


@pytest.mark.skipif(
    keras.backend.backend() == "torch",
    reason="PyTorch does not know how the gradient came about",
)
def test_the_second_derivative_is_that_of_plain_operations():
    arrays = [ops.convert_to_tensor(z) for z in arguments()]

    def plain(x):
        kernel, recurrent, bias, h, c = arrays[1:]
        total = 0.0
        for t in range(len(x)):
            z = ops.matmul(x[t], kernel) + ops.matmul(h, recurrent) + bias
            i, f, g, o = ops.split(z, 4, axis=-1)
            c = ops.sigmoid(f) * c + ops.sigmoid(i) * ops.tanh(g)
            h = ops.sigmoid(o) * ops.tanh(c)
            total = total + ops.sum(ops.square(h))
        return total

    def scanned(x):
        return ops.sum(ops.square(lstm_scan(x, *arrays[1:])[0]))

    def second(function):
        return grad_sum(lambda x: ops.sum(ops.square(grad_sum(function, x))), arrays[0])

    assert_close(second(scanned), to_numpy(second(plain)), 1e-4)


def test_scan_is_the_loop_of_keras():
    layer = layers.LSTM(4, return_sequences=True, return_state=True)
    layer.build((None, 6, 3))
    layer.set_weights([rng.normal(size=w.shape) for w in layer.get_weights()])
    x, h, c = (
        rng.normal(size=s).astype("float32") for s in ((2, 6, 3), (2, 4), (2, 4))
    )
    all_h, *last = layer(x, initial_state=[h, c])
    expected = [to_numpy(all_h).swapaxes(0, 1), *map(to_numpy, last)]
    found = run([x.swapaxes(0, 1), *layer.get_weights(), h, c])
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, 1e-6)
