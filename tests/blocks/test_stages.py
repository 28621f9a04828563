import keras
import numpy as np
import pytest

from keras_edifice.blocks.stages import check_stages, patch_conv
from tests.support.close import assert_close, to_numpy

rng = np.random.default_rng(0)


def test_lists_of_one_length_are_taken_and_others_refused():
    check_stages(depths=[1, 2], num_heads=[3, 4])
    with pytest.raises(ValueError, match="one number for each stage, received 3 and 2"):
        check_stages(depths=[1, 1, 1], num_heads=[1, 2])


@pytest.mark.parametrize(
    ("patch_size", "strides", "padding"), [(2, 2, 0), (7, 4, 2), (3, 2, 1)]
)
def test_it_is_a_linear_map_of_each_patch(patch_size, strides, padding):
    inputs = keras.Input((None, None, 2))
    y = patch_conv(inputs, 3, patch_size, strides, padding, name="patches")
    model = keras.Model(inputs, y)
    kernel, bias = model.get_weights()
    assert 0 < np.abs(kernel).max() <= 0.0401
    x = rng.normal(size=(2, 9, 12, 2)).astype("float32")
    y = to_numpy(model(x))
    padded = np.pad(x, [(0, 0), *[(padding, padding)] * 2, (0, 0)])
    rows, columns = ((n + 2 * padding - patch_size) // strides + 1 for n in (9, 12))
    assert y.shape == (2, rows, columns, 3)
    for i, j in np.ndindex(rows, columns):
        patch = padded[:, i * strides :, j * strides :][:, :patch_size, :patch_size]
        assert_close(y[:, i, j], np.einsum("bijk,ijkd->bd", patch, kernel) + bias)
