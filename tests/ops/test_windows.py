import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.exporting import export
from keras_edifice.model import EdificeModel
from keras_edifice.ops.attention import sdpa
from keras_edifice.ops.windows import (
    crop,
    cyclic_shift,
    fit_window,
    pad_to_windows,
    padded_size,
    relative_position_bias,
    relative_position_index,
    repeat_for_images,
    shifted_window_mask,
    window_partition,
    window_reverse,
)
from tests.support.close import assert_close, to_numpy
from tests.support.compiled import compiled
from tests.support.gradients import gradients

rng = np.random.default_rng(0)
SIZES = [(4, 4, 4), (8, 4, 4), (6, 9, 3), (4, 6, (2, 3)), (3, 5, 1), (1, 1, 1)]


def images(height, width, channels=3, batch=2):
    return rng.normal(size=(batch, height, width, channels)).astype("float32")


def sides(window):
    return (window, window) if isinstance(window, int) else window


@pytest.mark.parametrize(("height", "width", "window"), SIZES)
def test_windows_are_cut_out_row_by_row(height, width, window):
    x, (rows, columns) = images(height, width), sides(window)
    expected = [
        image[i : i + rows, j : j + columns].reshape(rows * columns, -1)
        for image in x
        for i in range(0, height, rows)
        for j in range(0, width, columns)
    ]
    windows = window_partition(ops.convert_to_tensor(x), window)
    assert_close(windows, np.stack(expected), 0)
    assert_close(window_reverse(windows, window, height, width), x, 0)


def test_an_image_that_is_not_whole_windows_is_refused():
    with pytest.raises(
        ValueError, match="windows of 4 x 4 .* received 8 x 6; call pad"
    ):
        window_partition(ops.zeros((1, 8, 6, 2)), 4)


@pytest.mark.parametrize("window", [1, 2, 3, 7, (2, 5)])
def test_padding_is_below_and_to_the_right(window):
    x = images(5, 7)
    padded = pad_to_windows(ops.convert_to_tensor(x), window)
    assert padded.shape[1:3] == padded_size(5, 7, window)
    assert not any(np.array(padded.shape[1:3]) % sides(window))
    assert_close(crop(padded, 5, 7), x, 0)
    assert_close(ops.sum(ops.abs(padded)), np.abs(x).sum())


@pytest.mark.parametrize("shift", [0, 1, (2, 0), (1, 3), -2])
def test_shift_goes_around_the_edges(shift):
    x, (down, right) = images(4, 6), sides(shift)
    moved = to_numpy(cyclic_shift(ops.convert_to_tensor(x), shift))
    for i, j in np.ndindex(4, 6):
        assert_close(moved[:, i, j], x[:, (i + down) % 4, (j + right) % 6], 0)
    back = cyclic_shift(ops.convert_to_tensor(moved), (-down, -right))
    assert_close(back, x, 0)


def test_small_axes_are_one_window_without_a_shift():
    assert fit_window(14, 14, 7, 3) == ((7, 7), (3, 3))
    assert fit_window(7, 14, 7, 3) == ((7, 7), (0, 3))
    assert fit_window(4, 3, 7, 3) == ((4, 3), (0, 0))
    assert fit_window(8, 8, (4, 2), (2, 1)) == ((4, 2), (2, 1))


@pytest.mark.parametrize(
    ("height", "width", "window", "shift"),
    [(8, 8, 4, 2), (6, 9, 3, 1), (4, 8, (4, 4), (0, 2)), (6, 6, (2, 3), (1, 1))],
)
def test_tokens_see_those_that_no_edge_parts_them_from(height, width, window, shift):
    mask = shifted_window_mask(height, width, window, shift)
    (rows, columns), (down, right) = sides(window), sides(shift)
    places = np.stack(np.indices((height, width)), axis=-1)
    places = np.roll(places, (-down, -right), axis=(0, 1))[None].astype("float32")
    tokens = to_numpy(window_partition(ops.convert_to_tensor(places), window))
    # Neighbours before the shift are less than a window apart, the others more.
    apart = np.abs(tokens[:, :, None] - tokens[:, None])
    seen = (apart[..., 0] < rows) & (apart[..., 1] < columns)
    assert mask.dtype == bool
    assert (mask == seen).all()
    assert not mask.all()


def test_nothing_shifted_needs_no_mask():
    assert shifted_window_mask(8, 8, 4, 0) is None


def test_regions_are_those_of_the_paper():
    # The nine regions of an 8 x 8 image, M = 4 and s = 2, of section 3.2.
    line = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    regions = 3 * line[:, None] + line
    windows = [regions[i : i + 4, j : j + 4].ravel() for i in (0, 4) for j in (0, 4)]
    expected = np.stack([w[:, None] == w for w in windows])
    assert (shifted_window_mask(8, 8, 4, 2) == expected).all()


def test_each_image_of_a_batch_has_the_mask_of_its_windows():
    mask = shifted_window_mask(8, 4, 4, 1)
    windows = window_partition(ops.convert_to_tensor(images(8, 4, batch=3)), 4)
    repeated = to_numpy(repeat_for_images(mask, windows))
    assert repeated.shape == (6, 1, 16, 16)
    assert (repeated[:, 0] == np.tile(mask, (3, 1, 1))).all()


@pytest.mark.parametrize("window", [1, 2, 4, (2, 3)])
def test_index_is_that_of_the_relative_position(window):
    rows, columns = sides(window)
    index = relative_position_index(window)
    assert index.dtype == np.int32
    for i, j in np.ndindex(*index.shape):
        by_row, by_column = i // columns - j // columns, i % columns - j % columns
        expected = (by_row + rows - 1) * (2 * columns - 1) + by_column + columns - 1
        assert index[i, j] == expected
    count = (2 * rows - 1) * (2 * columns - 1)
    assert set(index.ravel()) == set(range(count))
    assert (index + index.T == count - 1).all()


def test_biases_are_rows_of_the_table():
    index = relative_position_index(3)
    table = rng.normal(size=(25, 4)).astype("float32")
    biases = relative_position_bias(ops.convert_to_tensor(table), index)
    assert_close(biases[0], table[index].transpose(2, 0, 1), 0)


@keras.saving.register_keras_serializable("test_windows")
class WindowAttention(keras.layers.Layer):
    """(b, h, w, c) -> the same: attention in shifted windows."""

    def __init__(self, window, shift, **kwargs):
        super().__init__(**kwargs)
        self.window = window
        self.shift = shift

    def build(self, input_shape):
        self.table = self.add_weight(((2 * self.window - 1) ** 2, 1), "normal")

    def call(self, x):
        _, height, width, channels = x.shape
        x = cyclic_shift(pad_to_windows(x, self.window), self.shift)
        tall, wide = padded_size(height, width, self.window)
        mask = shifted_window_mask(tall, wide, self.window, self.shift)
        tokens = window_partition(x, self.window)
        bias = relative_position_bias(self.table, relative_position_index(self.window))
        heads = ops.expand_dims(tokens, 2)
        seen = repeat_for_images(mask, tokens)
        y = sdpa(heads, heads, heads, bias=bias, mask=seen)[:, :, 0]
        y = window_reverse(y, self.window, tall, wide)
        return crop(cyclic_shift(y, -self.shift), height, width)

    def compute_output_shape(self, input_shape):
        return input_shape


def reference(x, table, window, shift):
    """Each pixel attends to those of its window of the shifted grid, in float64."""
    batch, height, width, channels = x.shape
    tall, wide = (side + -side % window for side in (height, width))
    full = np.zeros((batch, tall, wide, channels))
    full[:, :height, :width] = x

    def window_of(i, j):  # the grid, moved by the shift, is cut at the edges
        return (i - shift) // window, (j - shift) // window

    y = np.zeros_like(full)
    for b, i, j in np.ndindex(batch, tall, wide):
        pixels = [
            (m, n)
            for m, n in np.ndindex(tall, wide)
            if window_of(m, n) == window_of(i, j)
        ]
        side = 2 * window - 1
        index = [(i - m + window - 1) * side + j - n + window - 1 for m, n in pixels]
        keys = np.stack([full[b, m, n] for m, n in pixels])
        scores = keys @ full[b, i, j] / np.sqrt(channels) + table[index, 0]
        weights = np.exp(scores - scores.max())
        y[b, i, j] = weights @ keys / weights.sum()
    return y[:, :height, :width]


def test_attention_in_shifted_windows_is_that_of_the_moved_grid():
    layer, x = WindowAttention(3, 1), images(5, 7)
    layer.build(x.shape)
    y = compiled(layer.call)(ops.convert_to_tensor(x))
    expected = reference(x, to_numpy(layer.table), 3, 1)
    assert_close(y, expected)


def test_opposite_corners_do_not_see_each_other():
    layer, x = WindowAttention(4, 2), images(8, 8)
    layer.build(x.shape)
    run = compiled(layer.call)
    changed = x.copy()
    changed[:, 0, 0] += 1.0
    difference = run(ops.convert_to_tensor(changed)) - run(ops.convert_to_tensor(x))
    moved = np.abs(to_numpy(difference)).max((0, 3)) > 0
    assert moved[:2, :2].all()
    assert moved.sum() == 4


def test_gradient_reaches_every_pixel_and_every_bias():
    layer, x = WindowAttention(2, 1), images(4, 4, batch=1)
    layer.build(x.shape)
    (by_table,), by_x = gradients(layer, x, lambda y: ops.sum(ops.square(y)))
    assert (np.abs(by_x) > 0).all()
    assert (np.abs(by_table) > 0).all()


def model():
    inputs = keras.Input((5, 7, 3), name="image")
    return EdificeModel(inputs, WindowAttention(3, 1)(inputs), name="windows")


@pytest.mark.parametrize("format", ["onnx", "saved_model"])
def test_windows_are_exported(format, tmp_path):
    name = "model.onnx" if format == "onnx" else "model"
    assert export(model(), tmp_path / name, format) <= 1e-4


def test_windows_train():
    trained, x = model(), images(5, 7)
    before = trained.get_weights()[0]
    trained.compile("sgd", "mse", jit_compile=keras.backend.backend() != "torch")
    trained.fit(x, -x, verbose=0)
    assert np.abs(trained.get_weights()[0] - before).max() > 0
