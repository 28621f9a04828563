import keras
import numpy as np
import pytest

from keras_edifice.blocks.position_table import (
    PositionTable,
    cubic_matrix,
    resize_position_table,
    sincos_2d,
)
from tests.support.close import assert_close, to_numpy

rng = np.random.default_rng(0)


def test_table_is_added_to_every_example():
    x = rng.normal(size=(2, 7, 4)).astype("float32")
    layer = PositionTable([2, 3], stddev=1.0)
    y = to_numpy(layer(x))
    assert_close(y, x + to_numpy(layer.table), 1e-6)
    assert np.abs(y - x).min() > 0


def test_learned_table_starts_small_and_fixed_one_does_not_learn():
    learned, fixed = PositionTable([20, 20]), PositionTable([20, 20], learned=False)
    learned.build((None, 401, 8))
    fixed.build((None, 401, 8))
    assert_close(to_numpy(learned.table).std(), 0.02, 1e-3)
    assert not fixed.trainable_variables
    assert_close(fixed.table[0, 0], np.zeros(8), 0)
    assert_close(fixed.table[0, 1:], sincos_2d(8, (20, 20)), 1e-6)


def test_sines_and_cosines_are_those_of_the_equation():
    table = sincos_2d(8, (2, 3))
    for row in range(2):
        for column in range(3):
            expected = [
                f(place * omega)
                for place in (column, row)
                for f in (np.sin, np.cos)
                for omega in (1.0, 0.01)
            ]
            assert_close(table[3 * row + column], expected, 1e-12)


def test_sines_and_cosines_need_multiples_of_four():
    with pytest.raises(ValueError, match="multiples of 4, received 6"):
        sincos_2d(6, (2, 2))


def test_interpolation_keeps_constants_and_the_same_size():
    for old, new in [(4, 7), (7, 4), (3, 12), (1, 5)]:
        assert_close(cubic_matrix(old, new).sum(-1), np.ones(new), 1e-12)
    assert_close(cubic_matrix(5, 5), np.eye(5), 1e-12)


def test_interpolation_weights_are_those_of_cubic_convolution():
    # twice as many: places lie a quarter off the old ones; W(s) by hand at a = -3/4
    weights = np.array([-0.10546875, 0.87890625, 0.26171875, -0.03515625])
    assert_close(cubic_matrix(6, 12)[5, 1:5], weights, 1e-12)
    assert_close(cubic_matrix(6, 12)[6, 1:5], weights[::-1], 1e-12)


def test_smooth_table_is_followed_on_the_new_grid():
    def surface(side):
        places = (np.arange(side) + 0.5) / side
        return np.sin(3 * places)[:, None] + np.cos(2 * places)[None, :]

    table = np.concatenate([[9.0], surface(8).ravel()]).reshape(1, 65, 1)
    resized = resize_position_table(table, (12, 12))
    assert resized.shape == (1, 145, 1)
    assert resized[0, 0, 0] == 9.0
    inner = resized[0, 1:, 0].reshape(12, 12)[2:-2, 2:-2]
    # with a = -3/4 cubic convolution overshoots: only a = -1/2 is exact on planes
    assert_close(inner, surface(12)[2:-2, 2:-2], 2e-2)


def test_rows_and_columns_do_not_get_mixed_up():
    table = np.repeat(np.arange(3.0), 3).reshape(1, 9, 1)  # the number of the row
    resized = resize_position_table(table, (6, 2), num_prefix=0).reshape(6, 2)
    assert_close(resized[:, 0], resized[:, 1], 1e-12)
    assert np.all(np.diff(resized[:, 0]) > 0)


def test_wrong_number_of_rows_is_refused():
    with pytest.raises(ValueError, match="received 9 with num_prefix 1"):
        resize_position_table(np.zeros((1, 9, 4)), (3, 3))


def test_saved_weights_of_another_grid_are_interpolated(tmp_path):
    def model(grid):
        inputs = keras.Input((1 + grid[0] * grid[1], 4))
        return keras.Model(inputs, PositionTable(grid, stddev=1.0)(inputs))

    small, large, same = model([3, 3]), model([4, 5]), model([3, 3])
    path = tmp_path / "small.weights.h5"
    small.save_weights(path)
    large.load_weights(path)
    same.load_weights(path)
    expected = resize_position_table(small.get_weights()[0], (4, 5))
    assert_close(large.get_weights()[0], expected, 1e-6)
    assert_close(same.get_weights()[0], small.get_weights()[0], 0)


def test_config_keeps_the_arguments():
    layer = PositionTable([2, 3], num_prefix=2, learned=False, stddev=0.1)
    layer = PositionTable.from_config(layer.get_config())
    assert (list(layer.grid), layer.num_prefix) == ([2, 3], 2)
    assert (layer.learned, layer.stddev) == (False, 0.1)
