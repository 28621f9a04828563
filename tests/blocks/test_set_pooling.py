import numpy as np
import pytest
from keras import ops

from keras_edifice.blocks.set_pooling import SetPooling
from tests.support.close import assert_close, to_numpy

rng = np.random.default_rng(0)
POOLS = dict(sum=np.sum, mean=np.mean, max=np.max)
EACH = pytest.mark.parametrize("pool", POOLS)


@EACH
def test_pools_every_element(pool):
    x = rng.normal(size=(2, 5, 3)).astype("float32")
    expected = POOLS[pool](x.astype("float64"), axis=1)
    assert_close(SetPooling(pool)(x), expected)
    assert_close(SetPooling(pool, keepdims=True)(x), expected[:, None])


@EACH
def test_leaves_masked_elements_out(pool):
    x = rng.normal(size=(2, 5, 3)).astype("float32") - 3.0
    mask = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 0, 1]], "float32")
    x[mask == 0] = np.nan
    expected = [
        POOLS[pool](row[m > 0].astype("float64"), axis=0)
        for row, m in zip(x, mask, strict=True)
    ]
    assert_close(SetPooling(pool)(x, set_mask=mask), np.stack(expected))


@EACH
def test_empty_set_gives_zeros(pool):
    x = rng.normal(size=(2, 5, 3)).astype("float32") - 3.0
    y = SetPooling(pool)(x, set_mask=np.zeros((2, 5), "float32"))
    assert_close(y, np.zeros((2, 3)), 0)


@EACH
def test_half_precision_is_summed_in_float32(pool):
    # A sum of 4096 ones in bfloat16 would stop at 256.
    x = ops.ones((1, 4096, 1), "bfloat16")
    y = to_numpy(ops.cast(SetPooling(pool, dtype="bfloat16")(x), "float32"))
    assert_close(y, [[4096.0 if pool == "sum" else 1.0]], 0)
