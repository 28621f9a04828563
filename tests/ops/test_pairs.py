import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.ops import pairs
from tests.support.close import assert_close, to_numpy

rng = np.random.default_rng(0)
FUNCTIONS = {
    "add": (pairs.add, np.add, 2),
    "times": (pairs.times, np.multiply, 2),
    "conjugate": (pairs.conjugate, np.conj, 1),
    "reciprocal": (pairs.reciprocal, np.reciprocal, 1),
    "exp": (pairs.exp, np.exp, 1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_pairs_are_complex_numbers(name):
    function, expected, count = FUNCTIONS[name]
    z = rng.normal(size=(2, count, 5)).astype("float32")
    arguments = [
        tuple(ops.convert_to_tensor(part) for part in z[:, i]) for i in range(count)
    ]
    found = function(*arguments)
    expected = expected(*(z[0].astype("float64") + 1j * z[1]))
    assert_close(found[0], expected.real)
    assert_close(found[1], expected.imag)


def test_pairs_are_computed_in_float32_at_least():
    for dtype, expected in {"bfloat16": "float32", "float32": "float32"}.items():
        x = ops.ones(3, dtype=dtype)
        assert pairs.exact_dtype(x) == expected
        for part in pairs.exact((x, 2 * x)):
            assert keras.backend.standardize_dtype(part.dtype) == expected
    assert pairs.exact_dtype(np.ones(3, "float64")) == "float64"
    assert to_numpy(pairs.exact((x, 2 * x))[1])[0] == 2.0
