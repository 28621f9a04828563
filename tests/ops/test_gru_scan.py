import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_edifice.backends.running import inference
from keras_edifice.backends.traits import COMPILES_LOOPS
from keras_edifice.ops import gru_scan as module
from keras_edifice.ops.gradients import grad_sum
from keras_edifice.ops.gru_scan import gru_scan
from tests.support.applied import assert_same_gradients
from tests.support.close import assert_close, to_numpy
from tests.support.compiled import compiled

rng = np.random.default_rng(0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def recurrence(driven, recurrent, bias, h):
    """The equation of the module, a loop in float64."""
    states = []
    for t in range(driven.shape[1]):
        a_z, a_r, a_n = np.split(driven[:, t], 3, axis=-1)
        p_z, p_r, p_n = np.split(h @ recurrent + bias, 3, axis=-1)
        z, n = sigmoid(a_z + p_z), np.tanh(a_n + sigmoid(a_r + p_r) * p_n)
        h = z * h + (1 - z) * n
        states.append(h)
    return np.stack(states, axis=1), h


def arguments(length=5, units=3, scale=1.0):
    shapes = [(2, length, 3 * units), (units, 3 * units), (3 * units,), (2, units)]
    return [(scale * rng.normal(size=s)).astype("float32") for s in shapes]


def run(arrays, dtype="float32"):
    return compiled(gru_scan)(*(ops.convert_to_tensor(z, dtype) for z in arrays))


@pytest.mark.parametrize("length", [1, 2, 37])
def test_scan_is_the_recurrence(length):
    arrays = arguments(length)
    expected = recurrence(*(to_numpy(z) for z in arrays))
    for found, wanted in zip(run(arrays), expected, strict=True):
        assert_close(found, wanted)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("length", [1, 5])
def test_gradient_is_that_of_the_recurrence(length, parts, monkeypatch):
    """Of all outputs and the last state, in all four arguments."""
    monkeypatch.setattr(module, "PARTS", parts)

    def joined(scan, concatenate, expand):
        def function(*arrays):
            hs, h = scan(*arrays)
            return concatenate([hs, expand(h, 1)], axis=1)

        return function

    assert_same_gradients(
        joined(gru_scan, ops.concatenate, ops.expand_dims),
        joined(recurrence, np.concatenate, np.expand_dims),
        arguments(length),
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

        def by_driven(*arrays):
            def total(driven):
                hs, h = gru_scan(driven, *arrays[1:])
                return ops.sum(hs) + ops.sum(h)

            return gru_scan(*arrays), grad_sum(total, arrays[0])

        run = inference(by_driven, []) if COMPILES_LOOPS else by_driven
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

    def plain(driven):
        bias, h = arrays[2:]
        total = 0.0
        for t in range(driven.shape[1]):
            a_z, a_r, a_n = ops.split(driven[:, t], 3, axis=-1)
            p = ops.matmul(h, arrays[1]) + bias
            p_z, p_r, p_n = ops.split(p, 3, axis=-1)
            z, r = ops.sigmoid(a_z + p_z), ops.sigmoid(a_r + p_r)
            h = z * h + (1 - z) * ops.tanh(a_n + r * p_n)
            total = total + ops.sum(ops.square(h))
        return total

    def scanned(driven):
        return ops.sum(ops.square(gru_scan(driven, *arrays[1:])[0]))

    def second(function):
        return grad_sum(lambda x: ops.sum(ops.square(grad_sum(function, x))), arrays[0])

    assert_close(second(scanned), to_numpy(second(plain)), 1e-4)


def test_scan_is_the_loop_of_keras():
    layer = layers.GRU(4, return_sequences=True, return_state=True)
    layer.build((None, 6, 3))
    layer.set_weights([rng.normal(size=w.shape) for w in layer.get_weights()])
    kernel, recurrent, (bias, hidden_bias) = layer.get_weights()
    x, h = (rng.normal(size=s).astype("float32") for s in ((2, 6, 3), (2, 4)))
    expected = layer(x, initial_state=h)
    for found, wanted in zip(
        run([x @ kernel + bias, recurrent, hidden_bias, h]), expected, strict=True
    ):
        assert_close(found, to_numpy(wanted), 1e-6)
