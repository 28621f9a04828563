import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.blocks.layer_norm import LayerNorm
from keras_edifice.blocks.sequence import (
    SequencePool,
    residual,
    sequence_input,
    sequence_model,
)
from tests.support.close import assert_close, to_numpy
from tests.support.streaming import stream

rng = np.random.default_rng(0)


def inputs(length=6, features=3):
    return rng.normal(size=(2, length, features)).astype("float32")


def test_stream_is_the_input_or_a_linear_map_of_it():
    tensor, x = sequence_input(5, 3)
    assert x is tensor
    assert tensor.shape == (None, 5, 3)
    tensor, x = sequence_input(None, 3, 3)
    assert x is tensor
    tensor, x = sequence_input(None, 3, 4)
    model = keras.Model(tensor, x)
    assert x.shape == (None, None, 4)
    data = inputs()
    assert_close(model(data), data @ model.get_weights()[0])


@pytest.mark.parametrize("tie", [True, False])
def test_tokens_are_embedded_and_answered_by_logits(tie):
    tensor, x = sequence_input(5, None, 3, vocab_size=11, tie_embeddings=tie)
    assert tensor.shape == (None, 5) and tensor.dtype == "int32"
    model = sequence_model(tensor, x * 2.0)
    tokens = rng.integers(0, 11, (2, 5))
    table, *other = (to_numpy(w) for w in model.weights)
    out = table.T if tie else other[0]
    assert_close(model(tokens), 2.0 * table[tokens] @ out)
    assert len(model.weights) == (1 if tie else 2)


@pytest.mark.parametrize("sizes", [(None, None), (3, 4)])
def test_input_is_features_or_tokens(sizes):
    embed_size, vocab_size = sizes
    with pytest.raises(ValueError, match="pass embed_size or vocab_size, received"):
        sequence_input(5, embed_size, 3, vocab_size)


def test_residual_adds_the_branch_of_the_normalised_stream():
    tensor, x = sequence_input(6, 3)
    mixer = keras.layers.Dense(3, name="mixer")
    model = keras.Model(tensor, residual(x, mixer, norm=LayerNorm, epsilon=1e-3))
    names = [layer.name for layer in model.layers[1:]]
    assert names == ["mixer_norm", "mixer", "mixer_add"]
    data = inputs().astype("float64")
    centred = data - data.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-3)
    expected = data + normed @ to_numpy(mixer.kernel)
    assert_close(model(data.astype("float32")), expected)


def test_residual_drops_the_branch_and_not_the_stream():
    tensor, x = sequence_input(6, 3)
    mixer = keras.layers.Dense(3, kernel_initializer="ones", name="mixer")
    model = keras.Model(tensor, residual(x, mixer, dropout=0.5))
    data = 1.0 + np.abs(inputs())
    branch = to_numpy(model(data, training=True)) - data
    dropped = np.abs(branch) < 1e-6
    assert 0 < dropped.sum() < dropped.size
    assert_close(model(data), model(data), 0)


def test_read_out_gives_every_step_or_one():
    for options, shape in (
        (dict(return_sequences=True), (2, 6, 3)),
        (dict(pool="last"), (2, 3)),
        (dict(pool="mean"), (2, 3)),
    ):
        tensor, x = sequence_input(None, 3)
        model = sequence_model(tensor, x, name="some", **options)
        assert model.name == "some"
        assert model(inputs()).shape == shape


def test_pool_without_a_mask():
    x = inputs()
    assert_close(SequencePool("last")(x), x[:, -1], 0)
    assert_close(SequencePool("mean")(x), x.mean(1), 1e-6)


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_pool_leaves_masked_steps_out(pool):
    x = inputs()
    mask = np.array([[1, 1, 1, 0, 0, 0], [0, 0, 1, 0, 1, 0]], "bool")
    x[~mask] = np.nan
    rows = [x[0, [0, 1, 2]], x[1, [2, 4]]]
    expected = [row[-1] if pool == "last" else row.mean(0) for row in rows]
    assert_close(SequencePool(pool)(x, mask=mask), np.stack(expected), 1e-6)
    nothing = SequencePool(pool)(x, mask=np.zeros_like(mask))
    assert_close(nothing, np.zeros((2, 3)), 0)


def test_mask_reaches_the_pool_from_a_masking_layer_and_from_the_call():
    tensor, x = sequence_input(None, 3)
    model = sequence_model(tensor, residual(x, keras.layers.Dense(3, name="mixer")))
    data = inputs()
    short = model(data[:, :4])
    padded = data.copy()
    padded[:, 4:] = 0.0
    masked = keras.Sequential([keras.layers.Masking(), model])
    assert_close(masked(padded), short, 1e-6)
    mask = ops.convert_to_tensor(np.arange(6)[None].repeat(2, 0) < 4)
    assert_close(model(ops.convert_to_tensor(data), mask=mask), short, 1e-6)


def test_masked_steps_of_every_step_models_do_not_count_in_the_loss():
    tensor, x = sequence_input(None, 3)
    x = residual(x, keras.layers.Dense(3, name="mixer"))
    model = keras.Sequential(
        [keras.layers.Masking(), sequence_model(tensor, x, return_sequences=True)]
    )
    model.compile(loss="mse")
    data, targets = inputs(), inputs()
    short = model.evaluate(data[:, :4], targets[:, :4], verbose=0)
    data[:, 4:] = 0.0
    targets[:, 4:] = 1e3
    assert_close(model.evaluate(data, targets, verbose=0), short)


def test_mean_of_half_precision_is_taken_in_float32():
    x = ops.ones((1, 3000, 1), dtype="bfloat16")
    mask = np.ones((1, 3000), "bool")
    mean = SequencePool("mean", dtype="bfloat16")(x, mask=mask)
    assert_close(ops.cast(mean, "float32"), np.ones((1, 1)), 0)


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_streamed_pool_is_that_of_the_sequence_so_far(pool):
    tensor, x = sequence_input(None, 3)
    model, data = sequence_model(tensor, x, pool=pool), inputs()
    outputs = stream(model, data)
    for t in range(6):
        assert_close(outputs[:, t], model(data[:, : t + 1]), 1e-6)


def test_unknown_pool_is_refused():
    with pytest.raises(ValueError, match="pool must be one of 'last', 'mean'"):
        SequencePool("max")
