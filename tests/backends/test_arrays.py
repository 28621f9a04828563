import numpy as np

from keras_edifice.backends import arrays


def test_batches_come_back_in_order_and_type(tmp_path):
    batches = [
        [
            np.arange(i + 12, dtype="int32"),
            *(np.full((2, k), k * 0.5) for k in range(12)),
        ]
        for i in range(11)
    ]
    arrays.save(tmp_path / "batches.npz", batches)
    loaded = arrays.load(tmp_path / "batches.npz")
    for flat, expected in zip(loaded, batches, strict=True):
        for x, wanted in zip(flat, expected, strict=True):
            np.testing.assert_array_equal(x, wanted)
            assert x.dtype == wanted.dtype
