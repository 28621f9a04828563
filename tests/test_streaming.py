import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_edifice
from keras_edifice.blocks.feed_forward import GatedFFN
from keras_edifice.blocks.grouped_query_attention import GroupedQueryAttention
from keras_edifice.blocks.transformer_block import TransformerBlock
from keras_edifice.recurrent.lstm import LSTMLayer
from keras_edifice.streaming import CHAIN
from tests.support.close import assert_close, difference, to_numpy
from tests.support.shaking import shake

rng = np.random.default_rng(0)
STREAMING = keras_edifice.list_architectures(streaming=True)


def tiny(name, **options):
    keras.utils.set_random_seed(0)
    options = {**keras_edifice.info(name).tiny, "window_size": None, **options}
    return shake(keras_edifice.build(name, **options), 0.1)


def inputs(model, length, batch=2):
    return rng.normal(size=(batch, length, model.input_shape[-1])).astype("float32")


def stepped(stream, x, state):
    """The outputs of single steps, (batch, time, ...), and the last state."""
    outputs = []
    for t in range(x.shape[1]):
        y, state = stream.step(x[:, t], state)
        outputs.append(to_numpy(y))
    return np.stack(outputs, axis=1), state


@pytest.mark.parametrize("name", STREAMING)
def test_512_steps_are_the_parallel_form_also_after_a_prefill(name):
    model = tiny(name, return_sequences=True)
    stream, x = keras_edifice.streaming(model), inputs(model, 512)
    expected = model.predict(x, verbose=0)
    found, last = stepped(stream, x, stream.initial_state(2))
    assert difference(found, expected) < 1e-4
    early, state = stream.prefill(x[:, :251])  # as many steps as the other prefill
    assert difference(early, expected[:, :251]) < 1e-4
    middle, state = stepped(stream, x[:, 251:261], state)
    assert difference(middle, expected[:, 251:261]) < 1e-4
    late, state = stream.prefill(x[:, 261:], state)
    assert difference(late, expected[:, 261:]) < 1e-4
    assert set(state) == set(last)
    for part in last:
        assert difference(state[part], last[part]) < 1e-4


@pytest.mark.parametrize("name", STREAMING)
def test_step_model_is_written_and_chained(name, tmp_path):
    stream, path = keras_edifice.streaming(tiny(name)), tmp_path / "step.onnx"
    assert stream.export(path) <= 1e-4
    assert [file.name for file in tmp_path.iterdir()] == ["step.onnx"]


def hybrid(window=None, **options):
    """An LSTM and attention around it, over tokens of three features."""
    keras.utils.set_random_seed(0)
    x = keras.Input((None, 4), name="signal")
    y = x
    for i in range(2):
        attention = GroupedQueryAttention(
            2, attention_window=window, name=f"attention_{i}", max_length=64, **options
        )
        block = TransformerBlock(attention, GatedFFN(6, name=f"ffn_{i}"), name=f"b{i}")
        y = LSTMLayer(4, return_sequences=True, name=f"lstm_{i}")(block(y))
    return shake(keras.Model(x, layers.Dense(2)(y), name="hybrid"))


@pytest.mark.parametrize("window", [None, 5])
def test_a_hybrid_streams_with_its_caches(window):
    model = hybrid(window)
    stream, x = keras_edifice.streaming(model), inputs(model, 40)
    expected = model.predict(x, verbose=0)
    assert_close(stepped(stream, x, stream.initial_state(2))[0], expected, 1e-4)
    early, state = stream.prefill(x[:, :23])
    late, _ = stepped(stream, x[:, 23:], state)
    assert_close(np.concatenate([early, late], axis=1), expected, 1e-4)


def test_the_cache_holds_what_is_asked_and_a_window_no_more_than_itself():
    def slots(stream):
        return {x.shape[1] for x in stream.initial_state(1).values() if x.ndim == 4}

    assert slots(keras_edifice.streaming(hybrid())) == {64}
    assert slots(keras_edifice.streaming(hybrid(), max_length=9)) == {9}
    assert slots(keras_edifice.streaming(hybrid(window=5), max_length=9)) == {5}


@pytest.mark.parametrize("pool", ["last", "mean"])
def test_a_pooled_model_gives_the_vector_of_the_sequence_so_far(pool):
    model = tiny("mamba", pool=pool)
    stream, x = keras_edifice.streaming(model), inputs(model, 9)
    _, state = stream.prefill(x[:, :4])
    found, state = stepped(stream, x[:, 4:7], state)
    for t in range(3):
        assert_close(found[:, t], model.predict(x[:, : 5 + t], verbose=0))
    assert_close(stream.prefill(x[:, 7:], state)[0], model.predict(x, verbose=0))


def test_tokens_stream_as_numbers():
    model = tiny("mamba", embed_size=None, vocab_size=11)
    stream, tokens = keras_edifice.streaming(model), rng.integers(0, 11, (2, 6))
    expected = model.predict(tokens, verbose=0)
    found, _ = stepped(stream, tokens, stream.initial_state(2))
    assert_close(found, expected)
    assert_close(stream.prefill(tokens)[0], expected)


def test_step_model_names_its_states_and_survives_saving(tmp_path):
    stream = keras_edifice.streaming(tiny("lstm"))
    step = stream.step_model
    states = ["lstm_0_0", "lstm_0_1", "lstm_1_0", "lstm_1_1"]
    assert set(step.input) == {"inputs", *states}
    assert set(step.output) == {"outputs", *(f"next_{name}" for name in states)}
    step.save(tmp_path / "step.keras")
    loaded = keras.saving.load_model(tmp_path / "step.keras")
    given = {"inputs": inputs(stream.model, 1)[:, 0]}
    given |= {name: rng.normal(size=(2, 5)).astype("float32") for name in states}
    found, expected = loaded(given), step(given)
    for name in expected:
        assert_close(found[name], expected[name], 1e-6)


def test_weights_that_are_trained_later_are_those_of_the_stream():
    model = tiny("lstm", return_sequences=True)
    stream, x = keras_edifice.streaming(model), inputs(model, 5)
    before, _ = stepped(stream, x, stream.initial_state(2))
    shake(model, seed=1)
    after, _ = stepped(stream, x, stream.initial_state(2))
    assert_close(after, model.predict(x, verbose=0))
    assert difference(after, before) > 1e-2
    assert_close(stream.prefill(x)[0], after)


def test_models_inside_and_layers_used_twice_have_states_of_their_own():
    keras.utils.set_random_seed(0)
    shared = LSTMLayer(3, return_sequences=True, name="shared")
    x = keras.Input((None, 3))
    twice = keras.Model(x, shared(shared(x)), name="twice")
    model = shake(keras.Model(x, layers.Add()([x, twice(x)])))
    stream, data = keras_edifice.streaming(model), inputs(model, 6)
    assert set(stream.initial_state(1)) == {
        f"twice_shared{use}_{i}" for use in ("", "_use_2") for i in (0, 1)
    }
    found, _ = stepped(stream, data, stream.initial_state(2))
    assert_close(found, model.predict(data, verbose=0))


def test_a_classifier_streams():
    model = keras_edifice.classifier(
        "mamba", 3, embed_size=2, hidden_size=4, window_size=None
    )
    stream, x = keras_edifice.streaming(model), inputs(model, 5)
    found, _ = stepped(stream, x, stream.initial_state(2))
    assert_close(found[:, -1], model.predict(x, verbose=0))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: tiny("lstm", bidirectional=True),
            r"lstm cannot run token by token: bidirectional_0 \(Bidirectional\)",
        ),
        (
            lambda: keras_edifice.build("vit", **keras_edifice.info("vit").tiny),
            "vit cannot run token by token: .* has no step",
        ),
        (
            lambda: tiny("lstm", return_state=True),
            "must have one input and one output, received 1 and 5",
        ),
    ],
)
def test_models_that_cannot_stream_say_why(build, message):
    with pytest.raises(ValueError, match=message) as error:
        keras_edifice.streaming(build())
    assert "\n" not in str(error.value)


def test_only_functional_models_stream():
    with pytest.raises(TypeError, match="received Dense; build it with keras.Model"):
        keras_edifice.streaming(layers.Dense(2))


def test_a_file_whose_states_drift_is_not_handed_over(tmp_path, monkeypatch):
    stream = keras_edifice.streaming(tiny("lstm"))
    exact = stream.step

    def drifting(x_t, state):
        y, state = exact(x_t, state)
        return y, {name: part + 1e-2 for name, part in state.items()}

    monkeypatch.setattr(stream, "step", drifting)
    with pytest.raises(ValueError, match=f"after {CHAIN} steps the file differs by"):
        stream.export(tmp_path / "step.onnx")
    assert not any(tmp_path.iterdir())


def test_half_precision_streams():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = tiny("mamba", return_sequences=True)
    finally:
        keras.config.set_dtype_policy("float32")
    stream, x = keras_edifice.streaming(model), inputs(model, 7)
    found, _ = stepped(stream, x, stream.initial_state(2))
    expected = ops.convert_to_numpy(ops.cast(model(x), "float32"))
    assert difference(found, expected) < 0.03  # bfloat16 keeps 8 bits
