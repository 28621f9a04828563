import keras
import numpy as np
import pytest

from keras_edifice.blocks.rotary_embedding import RotaryEmbedding, rotary_frequencies
from tests.support.close import assert_close, to_numpy

rng = np.random.default_rng(0)
SCALINGS = {
    "linear": dict(type="linear", factor=4.0),
    "ntk": dict(type="ntk", factor=4.0),
    "dynamic": dict(type="dynamic", factor=4.0, original_length=4),
    "yarn": dict(type="yarn", factor=4.0, original_length=64),
    "llama3": dict(
        type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_length=256,
    ),
}


def turned(x, theta):
    """Pairs of neighbours as complex numbers, times exp(i p θ), in float64."""
    pairs = x[..., ::2].astype("float64") + 1j * x[..., 1::2]
    pairs = pairs * np.exp(1j * np.arange(x.shape[1])[:, None, None] * theta)
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


def inputs(length=9, features=8):
    return rng.normal(size=(2, length, 3, features)).astype("float32")


def test_neighbours_turn_as_complex_numbers():
    x = inputs()
    theta = 10000.0 ** (-np.arange(4) / 4)
    assert_close(RotaryEmbedding(layout="interleaved")(x), turned(x, theta))


def test_layouts_agree_after_a_permutation():
    x = inputs()
    order = np.concatenate([np.arange(0, 8, 2), np.arange(1, 8, 2)])
    interleaved = to_numpy(RotaryEmbedding(layout="interleaved")(x))
    assert_close(RotaryEmbedding()(x[..., order]), interleaved[..., order], 1e-6)


def test_norms_are_kept_and_scores_depend_on_the_distance():
    q, k = np.repeat(rng.normal(size=(2, 1, 1, 1, 8)), 9, axis=2).astype("float32")
    layer = RotaryEmbedding()
    q, k = (to_numpy(layer(z))[0, :, 0] for z in (q, k))
    assert_close(np.linalg.norm(q, axis=-1), np.full(9, np.linalg.norm(q[0])))
    scores = q @ k.T
    assert_close(scores[1:, 1:], scores[:-1, :-1], 1e-4)  # sums of rounded waves
    assert np.abs(scores[0, 1] - scores[1, 0]) > 1e-2


def test_offset_and_positions_equal_slicing():
    layer, x = RotaryEmbedding(), inputs()
    whole = to_numpy(layer(x))
    assert_close(layer(x[:, 4:], offset=4), whole[:, 4:], 1e-6)
    chosen = np.array([7, 2, 2])
    assert_close(layer(x[:, chosen], positions=chosen), whole[:, chosen], 1e-6)
    rows = layer(x[:, :2], offset=np.array([0, 5]))
    assert_close(rows[0], whole[0, :2], 1e-6)
    assert_close(rows[1], layer(x[:, :2], positions=np.array([5, 6]))[1], 1e-6)


def test_only_a_part_of_the_features_turns():
    layer, x = RotaryEmbedding(rotary_fraction=0.5), inputs()
    y = to_numpy(layer(x))
    assert_close(y[..., 4:], x[..., 4:], 0)
    assert_close(y[..., :4], RotaryEmbedding()(x[..., :4]), 1e-6)


def test_linear_and_ntk_frequencies():
    theta = 10000.0 ** (-np.arange(4) / 4)
    found, factor = rotary_frequencies(8, scaling=SCALINGS["linear"])
    assert factor == 1.0
    assert_close(found, theta / 4, 1e-12)
    found, _ = rotary_frequencies(8, scaling=SCALINGS["ntk"])
    assert_close(found[0], 1.0, 1e-12)
    assert_close(found[-1], theta[-1] / 4, 1e-12)  # the slowest is interpolated


def test_dynamic_scaling_grows_with_the_length():
    layer = RotaryEmbedding(layout="interleaved", scaling=SCALINGS["dynamic"])
    short, long = inputs(4), inputs(9)
    assert_close(layer(short), RotaryEmbedding(layout="interleaved")(short), 1e-6)
    base = 10000.0 * (4.0 * 9 / 4 - 3.0) ** (8 / 6)
    assert_close(layer(long), turned(long, base ** (-np.arange(4) / 4)))


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones():
    theta = 10000.0 ** (-np.arange(16) / 16)
    found, factor = rotary_frequencies(32, scaling=SCALINGS["yarn"])
    turns = 64 * theta / (2 * np.pi)
    assert_close(factor, 0.1 * np.log(4.0) + 1.0, 1e-12)
    assert_close(found[turns > 32], theta[turns > 32], 1e-12)
    assert_close(found[turns < 0.5], theta[turns < 0.5] / 4, 1e-12)
    ratio = found / theta
    assert np.all(np.diff(ratio) <= 1e-12) and np.any((ratio > 0.3) & (ratio < 0.9))


def test_llama3_stretches_long_wavelengths():
    theta = 10000.0 ** (-np.arange(32) / 32)
    found, _ = rotary_frequencies(64, scaling=SCALINGS["llama3"])
    wavelength = 2 * np.pi / theta
    for t, f, length in zip(theta, found, wavelength, strict=True):
        if length > 256 / 1.0:
            expected = t / 8
        elif length < 256 / 4.0:
            expected = t
        else:
            s = (256 / length - 1.0) / (4.0 - 1.0)
            expected = (1 - s) * t / 8 + s * t
        assert_close(f, expected, 1e-12)


@pytest.mark.parametrize("kind", SCALINGS)
def test_factor_one_changes_nothing(kind):
    x = inputs(4)  # within the original length of "dynamic"
    layer = RotaryEmbedding(scaling={**SCALINGS[kind], "factor": 1.0})
    assert_close(layer(x), RotaryEmbedding()(x), 1e-6)


def test_half_precision_does_not_blur_long_positions():
    x = keras.ops.cast(inputs(1), "bfloat16")
    y = RotaryEmbedding(dtype="bfloat16")(x, offset=5000)
    expected = RotaryEmbedding()(keras.ops.cast(x, "float32"), offset=5000)
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    assert_close(keras.ops.cast(y, "float32"), expected, 1e-2)  # 8 bits of bfloat16


@pytest.mark.parametrize("kind", SCALINGS)
def test_survives_saving_with_an_open_length(kind, tmp_path):
    inside = keras.Input((None, 3, 8))
    model = keras.Model(inside, RotaryEmbedding(scaling=SCALINGS[kind])(inside))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x = inputs(7)
    assert_close(
        loaded.predict(x, verbose=0), RotaryEmbedding(scaling=SCALINGS[kind])(x), 1e-6
    )


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="'half', 'interleaved', received 'other'"):
        RotaryEmbedding(layout="other")
    with pytest.raises(ValueError, match="type of scaling .* received 'other'"):
        RotaryEmbedding(scaling=dict(type="other"))
    with pytest.raises(ValueError, match="'yarn' needs 'original_length'"):
        RotaryEmbedding(scaling=dict(type="yarn", factor=2.0))
    with pytest.raises(ValueError, match="must be even, received 3 of 3"):
        RotaryEmbedding().build((None, 4, 1, 3))
