import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.exporting import export
from keras_edifice.model import EdificeModel
from keras_edifice.ops.masks import (
    additive,
    both,
    hidden,
    make_mask,
    positions,
    rank_4,
    visible,
)
from tests.support.close import assert_close, to_numpy

rng = np.random.default_rng(0)

EXPECTED = {
    "causal": (dict(causal=True), "1000 1100 1110 1111"),
    "window": (dict(causal=True, window=2), "1000 1100 0110 0011"),
    "window of one": (dict(causal=True, window=1), "1000 0100 0010 0001"),
    "window to both sides": (dict(window=2), "1100 1110 0111 0011"),
    "blocks": (dict(block_causal=2), "1100 1100 1111 1111"),
    "chunks": (dict(chunk=2), "1100 1100 0011 0011"),
    "causal chunks": (dict(chunk=2, causal=True), "1000 1100 0010 0011"),
    "dilation": (dict(dilation=2, causal=True), "1000 0100 1010 0101"),
    "dilated window": (dict(dilation=2, window=3), "1010 0101 1010 0101"),
    "prefix": (dict(causal=True, prefix=2), "1100 1100 1110 1111"),
}


def matrix(rows):
    return np.array([[int(cell) for cell in row] for row in rows.split()], bool)


@pytest.mark.parametrize("name", EXPECTED)
def test_small_masks_are_those_one_draws(name):
    options, rows = EXPECTED[name]
    assert (to_numpy(make_mask(4, **options)[0, 0]) == matrix(rows)).all()


def test_nothing_hidden_is_no_mask():
    assert make_mask(4) is None and make_mask(4, prefix=2) is None
    assert both(None, None) is None


def test_queries_after_a_cache_are_aligned_at_the_end():
    mask = make_mask(2, 5, causal=True, q_offset=3)
    assert (to_numpy(mask[0, 0]) == matrix("11110 11111")).all()
    windowed = make_mask(2, 5, causal=True, window=3, q_offset=3)
    assert (to_numpy(windowed[0, 0]) == matrix("01110 00111")).all()


def test_each_row_has_an_offset_and_a_prefix_of_its_own():
    offsets = ops.convert_to_tensor(np.array([0, 2], "int32"))
    mask = to_numpy(make_mask(1, 4, causal=True, q_offset=offsets))
    assert (mask[:, 0, 0] == matrix("1000 1110")).all()
    prefixed = to_numpy(make_mask(1, 4, causal=True, prefix=offsets))
    assert (prefixed[:, 0, 0] == matrix("1000 1100")).all()


def test_padding_hides_keys_and_a_prefix_does_not_show_them():
    padding = ops.convert_to_tensor(matrix("110 011"))
    mask = to_numpy(make_mask(3, causal=True, prefix=2, padding=padding))
    assert (mask[0, 0] == matrix("110 110 110")).all()
    assert (mask[1, 0] == matrix("010 010 011")).all()
    alone = to_numpy(make_mask(3, padding=padding))
    assert (alone[:, 0, 0] == matrix("110 011")).all()


def test_segments_see_themselves_alone():
    segments = ops.convert_to_tensor(np.array([[0, 0, 1, 1]], "int32"))
    mask = to_numpy(make_mask(4, causal=True, segment_ids=segments))
    assert (mask[0, 0] == matrix("1000 1100 0010 0011")).all()
    keys = ops.convert_to_tensor(np.array([[1, 0]], "int32"))
    crossed = to_numpy(make_mask(4, 2, segment_ids=segments, key_segment_ids=keys))
    assert (crossed[0, 0] == matrix("01 01 10 10")).all()


def test_conditions_are_joined_by_and():
    one = to_numpy(make_mask(9, causal=True, window=4))
    two = to_numpy(make_mask(9, chunk=3))
    both_ = to_numpy(make_mask(9, causal=True, window=4, chunk=3))
    assert (both_ == one * two).all()


def test_lengths_come_from_numbers_or_tensors():
    x, keys = np.zeros((2, 3, 4, 5), "float32"), np.zeros((2, 6), "int32")
    x, keys = ops.convert_to_tensor(x), ops.convert_to_tensor(keys)
    assert_close(make_mask(x, keys, causal=True), make_mask(3, 6, causal=True), 0)


def test_positions_start_at_the_offset():
    assert_close(positions(3, 4), [4, 5, 6], 0)
    rows = ops.convert_to_tensor(np.array([0, 7], "int32"))
    assert_close(positions(2, rows), [[0, 1], [7, 8]], 0)
    assert_close(positions(2, rows[1]), [7, 8], 0)


def test_visible_takes_positions_out_of_order():
    keys = ops.convert_to_tensor(np.array([[4, 2, 3]], "float32"))  # a rolled cache
    mask = visible(positions(1, 4), keys, causal=True, window=2)
    assert (to_numpy(mask)[0, 0] == matrix("101")).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_additive_mask_is_finite_and_hides(dtype):
    mask = ops.convert_to_tensor(matrix("10 11"))
    bias = to_numpy(ops.cast(additive(mask, dtype), "float64"))
    assert bias[0, 0] == bias[1, 0] == bias[1, 1] == 0
    twice = 2.0 * ops.cast(additive(mask, dtype), dtype)
    assert np.isfinite(to_numpy(ops.cast(twice, "float64"))).all()
    assert np.exp(bias[0, 1]) == 0
    assert hidden(dtype) < -1e4


def test_masks_of_keys_get_the_axes_of_heads_and_queries():
    assert rank_4(np.ones((2, 5), bool)).shape == (2, 1, 1, 5)
    assert rank_4(np.ones((2, 3, 5), bool)).shape == (2, 1, 3, 5)
    assert rank_4(np.ones((2, 4, 3, 5), bool)).shape == (2, 4, 3, 5)
    with pytest.raises(ValueError, match=r"received the shape \(5,\)"):
        rank_4(np.ones(5, bool))


@keras.saving.register_keras_serializable("tests")
class Visible(keras.layers.Layer):
    """(b, t, f) -> how many keys each query sees, (b, t)."""

    def call(self, x):
        options = dict(causal=True, window=5, dilation=2, prefix=1)
        mask = make_mask(x, **options, padding=x[:, :, 0] > -1e9)
        return ops.sum(ops.cast(mask, "float32"), axis=(1, 3))

    def compute_output_shape(self, input_shape):
        return input_shape[:2]


@pytest.mark.parametrize("format", ["onnx", "saved_model"])
def test_an_open_length_exports(format, tmp_path):
    inputs = keras.Input((None, 2), name="inputs")
    model = EdificeModel(inputs, Visible()(inputs), name="visible")
    x = rng.normal(size=(2, 6, 2)).astype("float32")
    assert_close(model.predict(x, verbose=0), [[1, 2, 2, 3, 3, 4]] * 2, 0)
    path = tmp_path / ("model.onnx" if format == "onnx" else "model")
    assert export(model, path, format) == 0
    written = path if format == "onnx" else path / "saved_model.pb"
    assert written.stat().st_size < 100_000  # no matrix of all pairs in it
