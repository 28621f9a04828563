import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_edifice.ops.tracing import export_scope
from keras_edifice.recurrent.gru import GRULayer
from keras_edifice.recurrent.lstm import LSTMLayer
from tests.support.close import assert_close, to_numpy
from tests.support.gradients import gradients
from tests.support.shaking import shake

KINDS = [(LSTMLayer, layers.LSTM, 2), (GRULayer, layers.GRU, 1)]
OPTIONS = [{}, {"go_backwards": True}, {"use_bias": False}, {"return_sequences": False}]
rng = np.random.default_rng(0)
where_loops_compile = pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="PyTorch has loops of its own"
)


def pair(kind, states, length=6, **options):
    """The layer and that of Keras with the same weights, as models with states."""
    models, options = [], {"return_sequences": True, "return_state": True, **options}
    for make in kind:
        inputs = [keras.Input((length, 3)), *(keras.Input((4,)) for _ in range(states))]
        outputs = make(4, **options)(inputs[0], initial_state=inputs[1:])
        models.append(keras.Model(inputs, outputs))
    shake(models[0])
    models[1].set_weights(models[0].get_weights())
    return models


def inputs(states):
    x = [rng.normal(size=(2, 6, 3)), *rng.normal(size=(states, 2, 4))]
    return [part.astype("float32") for part in x]


def scans(layer, monkeypatch):
    """A list that grows with each call of the scan."""
    calls, scan = [], layer.scan
    monkeypatch.setattr(layer, "scan", lambda *x: calls.append(0) or scan(*x))
    return calls


@where_loops_compile
@pytest.mark.parametrize("ours, theirs, states", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_scan_equals_the_loop_of_keras(ours, theirs, states, options, monkeypatch):
    scanned, loop = pair((ours, theirs), states, **options)
    calls, x = scans(scanned.layers[-1], monkeypatch), inputs(states)
    for found, expected in zip(scanned(x), loop(x), strict=True):
        assert_close(found, expected, 1e-6)
    assert calls

    def loss(results):
        return sum(ops.sum(ops.square(z)) for z in results)

    found, by_input = gradients(scanned, x, loss)
    expected, by_input_of_loop = gradients(loop, x, loss)
    pairs = zip([*found, *by_input], [*expected, *by_input_of_loop], strict=True)
    for gradient, other in pairs:
        assert_close(gradient, other, 1e-5)


@where_loops_compile
@pytest.mark.parametrize("ours, theirs, states", KINDS)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_training_is_that_of_keras_at_any_length(ours, theirs, states, jit_compile):
    scanned, loop = pair((ours, theirs), states, length=None)
    losses = []
    for model in (scanned, loop):
        optimizer = keras.optimizers.SGD(0.5)
        model.compile(optimizer, ["mse"] * (1 + states), jit_compile=jit_compile)
    for length in (6, 3):
        x = inputs(states)
        x[0] = x[0][:, :length]
        y = [np.ones((2, length, 4)), *np.ones((states, 2, 4))]
        losses.append([np.ravel(m.train_on_batch(x, y)) for m in (scanned, loop)])
    for found, expected in losses:
        assert_close(found, expected)
    for found, expected in zip(scanned.weights, loop.weights, strict=True):
        assert_close(found, to_numpy(expected))


@where_loops_compile
@pytest.mark.parametrize("ours, theirs, states", KINDS)
def test_what_the_scan_has_not_goes_step_by_step(ours, theirs, states, monkeypatch):
    x = inputs(states)[0]
    others = {"activation": "relu"}, {"recurrent_activation": "tanh"}, {"unroll": True}
    for options in others:
        layer = ours(4, **options)
        calls = scans(layer, monkeypatch)
        layer(x)
        assert not calls, options
    layer = ours(4, dropout=0.5, recurrent_dropout=0.5)
    calls = scans(layer, monkeypatch)
    layer(x, mask=np.ones((2, 6), bool))
    layer(x, training=True)
    with export_scope("onnx"):
        layer(x)
    assert not calls
    layer(x)
    assert calls


@where_loops_compile
@pytest.mark.parametrize("ours, theirs, states", KINDS)
def test_a_state_between_calls_is_that_of_keras(ours, theirs, states):
    x = inputs(states)[0]
    scanned, loop = (
        make(4, stateful=True, return_sequences=True) for make in (ours, theirs)
    )
    scanned.build((2, 6, 3))
    loop.build((2, 6, 3))
    loop.set_weights(scanned.get_weights())
    for _ in range(2):
        assert_close(scanned(x), to_numpy(loop(x)), 1e-6)


@where_loops_compile
@pytest.mark.parametrize("ours, theirs, states", KINDS)
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_keeps_its_types(ours, theirs, states, policy):
    layer = ours(4, dtype=policy, return_sequences=True, return_state=True)
    half = policy.removeprefix("mixed_")
    for result in layer(inputs(states)[0]):
        assert keras.backend.standardize_dtype(result.dtype) == half
        assert np.isfinite(to_numpy(ops.cast(result, "float32"))).all()
