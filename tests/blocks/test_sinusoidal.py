import keras
import numpy as np
import pytest

from keras_edifice.blocks.position_table import sincos_2d
from keras_edifice.blocks.sinusoidal import (
    SinusoidalPositions,
    SinusoidalPositions2D,
    TimestepEmbedding,
)
from tests.support.close import assert_close, to_numpy

rng = np.random.default_rng(0)


def zeros(*shape):
    return np.zeros(shape, "float32")


@pytest.mark.parametrize("features", [6, 7])
def test_interleaved_positions_are_those_of_the_paper(features):
    table = to_numpy(SinusoidalPositions()(zeros(1, 9, features)))[0]
    for t in range(9):
        for i in range(features):
            angle = t * 10000.0 ** (-2 * (i // 2) / features)
            expected = np.sin(angle) if i % 2 == 0 else np.cos(angle)
            assert abs(table[t, i] - expected) < 1e-5


def test_split_layout_has_the_sines_first():
    even, odd = SinusoidalPositions(), SinusoidalPositions("split")
    interleaved = to_numpy(even(zeros(1, 9, 6)))
    expected = np.concatenate([interleaved[..., ::2], interleaved[..., 1::2]], axis=-1)
    assert_close(odd(zeros(1, 9, 6)), expected, 0)


def test_closed_frequencies_end_at_one_in_ten_thousand():
    table = to_numpy(SinusoidalPositions("split", closed=True)(zeros(1, 4, 8)))[0]
    omega = 10000.0 ** (-np.arange(4) / 3)
    assert_close(table[3], np.concatenate([np.sin(3 * omega), np.cos(3 * omega)]))


def test_offset_equals_slicing():
    layer, x = SinusoidalPositions(), rng.normal(size=(2, 9, 6)).astype("float32")
    whole = layer(x)
    assert_close(layer(x[:, 4:], offset=4), whole[:, 4:], 1e-6)
    by_example = layer(x[:, 4:7], offset=np.array([4, 2]))
    assert_close(by_example[0], whole[0, 4:7], 1e-6)
    assert_close(by_example[1], layer(x[:, 4:7], offset=2)[1], 1e-6)


def test_input_and_positions_can_be_scaled():
    layer = SinusoidalPositions(input_scale=2.0, learned_scale=True)
    x = rng.normal(size=(1, 3, 4)).astype("float32")
    layer.build(x.shape)
    layer.scale.assign(0.5)
    table = to_numpy(SinusoidalPositions()(zeros(1, 3, 4)))
    assert_close(layer(x), 2.0 * x + 0.5 * table, 1e-6)


def test_length_may_be_open():
    inputs = keras.Input((None, 4))
    model = keras.Model(inputs, SinusoidalPositions()(inputs))
    expected = to_numpy(SinusoidalPositions()(zeros(1, 5, 4)))
    assert_close(model.predict(zeros(1, 5, 4), verbose=0), expected, 1e-6)


def test_image_positions_are_those_of_masked_autoencoders():
    table = to_numpy(SinusoidalPositions2D()(zeros(1, 2, 3, 8)))
    assert_close(table.reshape(6, 8), sincos_2d(8, (2, 3)))


def test_image_positions_of_detr_run_to_two_pi():
    layer = SinusoidalPositions2D("hw", interleaved=True, normalize=True)
    table = to_numpy(layer(zeros(1, 2, 3, 8)))[0]
    omega = 10000.0 ** (-np.arange(2) / 2)
    for row in range(2):
        for column in range(3):
            angles = [
                2 * np.pi * place / (count + 1e-6) * omega
                for place, count in ((row + 1, 2), (column + 1, 3))
            ]
            waves = [f(a) for angle in angles for a in angle for f in (np.sin, np.cos)]
            assert_close(table[row, column], waves)


def test_times_of_both_conventions():
    times = np.array([0.0, 3.0, 999.0], "float32")
    omega = 10000.0 ** (-np.arange(3) / 3)
    angles = times[:, None].astype("float64") * omega
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    assert_close(TimestepEmbedding(6)(times), expected, 1e-4)  # angles near 1000
    omega = 10000.0 ** (-np.arange(3) / 2)
    angles = times[:, None].astype("float64") * omega
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    assert_close(TimestepEmbedding(6, "sin_cos")(times), expected, 1e-4)


def test_times_from_zero_to_one_are_scaled():
    times = np.array([0.25, 0.5], "float32")
    scaled = TimestepEmbedding(6, time_scale=1000.0)
    assert_close(scaled(times), TimestepEmbedding(6)(1000.0 * times), 1e-6)


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="'interleaved', 'split', received 'other'"):
        SinusoidalPositions("other")
    with pytest.raises(ValueError, match="multiples of 4, received 6"):
        SinusoidalPositions2D().build((None, 2, 2, 6))
    with pytest.raises(ValueError, match="'wh', 'hw', received 'xy'"):
        SinusoidalPositions2D("xy")
    with pytest.raises(ValueError, match="even, received 5"):
        TimestepEmbedding(5)
    with pytest.raises(ValueError, match="'cos_sin', 'sin_cos', received 'other'"):
        TimestepEmbedding(4, "other")
