import keras
import pytest

from keras_edifice.ops.precision import exact_dtype


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float16", "float32"),
        ("bfloat16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
    ],
)
def test_sums_have_at_least_the_precision_of_float32(dtype, expected):
    assert exact_dtype(keras.KerasTensor((1,), dtype=dtype)) == expected
