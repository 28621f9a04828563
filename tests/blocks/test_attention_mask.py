import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_edifice.blocks.attention_mask import AttentionMask
from keras_edifice.ops.masks import make_mask
from tests.support.close import assert_close, to_numpy

rng = np.random.default_rng(0)


def features(length):
    return rng.normal(size=(2, length, 4)).astype("float32")


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(window=2),
        dict(causal=False, window=3),
        dict(causal=False, block_causal=2),
        dict(chunk=3),
        dict(dilation=2),
        dict(prefix=2),
    ],
    ids=str,
)
def test_mask_is_that_of_the_conditions(options):
    found = ops.convert_to_numpy(AttentionMask(**options)(features(6)))
    expected = to_numpy(make_mask(6, **{"causal": True, **options}))
    assert (found.dtype, found.shape) == (bool, (1, 1, 6, 6))
    assert (found == expected).all()


def test_without_conditions_all_is_visible():
    for x in (features(3), features(3)[..., None]):
        assert to_numpy(AttentionMask(causal=False)(x)).all()
        assert AttentionMask(causal=False)(x).shape == (1, 1, 3, 3)


def test_padding_and_segments_are_hidden():
    mask = np.array([[1, 1, 0], [1, 1, 1]], bool)
    segments = np.array([[0, 0, 1], [0, 1, 1]])
    found = to_numpy(AttentionMask()(features(3), mask=mask, segment_ids=segments))
    for b in range(2):
        for i in range(3):
            for j in range(3):
                seen = j <= i and mask[b, j] and segments[b, i] == segments[b, j]
                assert found[b, 0, i, j] == seen


def test_attention_of_keras_takes_it_at_any_length(tmp_path):
    x = keras.Input((None, 4))
    seen = ops.squeeze(AttentionMask(window=2)(x), 1)
    attention = layers.MultiHeadAttention(2, 2)
    model = keras.Model(x, attention(x, x, attention_mask=seen))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for length in (3, 7):
        data = features(length)
        changed = data.copy()
        changed[:, 0] += 1.0
        before, after = (loaded.predict(z, verbose=0) for z in (data, changed))
        assert_close(before, model.predict(data, verbose=0), 1e-6)
        assert np.abs(after - before)[:, :2].max() > 1e-3
        assert_close(after[:, 2:], before[:, 2:], 1e-6)
