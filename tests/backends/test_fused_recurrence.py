import keras
import numpy as np
import pytest
from keras import layers

from keras_edifice.recurrent.gru import GRULayer
from keras_edifice.recurrent.lstm import LSTMLayer
from tests.support.close import assert_close
from tests.support.gradients import gradients
from tests.support.shaking import shake

KINDS = [(LSTMLayer, layers.LSTM, 2), (GRULayer, layers.GRU, 1)]
rng = np.random.default_rng(0)
on_torch = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="the fused loops are PyTorch's"
)


def pair(kind, states, **options):
    """The layer and that of Keras with the same weights, as models with states."""
    models = []
    for make in kind:
        layer = make(4, return_sequences=True, return_state=True, **options)
        inputs = [keras.Input((6, 3)), *(keras.Input((4,)) for _ in range(states))]
        models.append(keras.Model(inputs, layer(inputs[0], initial_state=inputs[1:])))
    shake(models[0])
    models[1].set_weights(models[0].get_weights())
    return models


def fused_calls(layer, monkeypatch):
    """A list that grows with each call of the fused loop."""
    calls, run = [], layer._fused
    monkeypatch.setattr(layer, "_fused", lambda *x: calls.append(0) or run(*x))
    return calls


@on_torch
@pytest.mark.parametrize("ours, theirs, states", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"go_backwards": True}, {"use_bias": False}], ids=str
)
def test_fused_loop_equals_that_of_keras(ours, theirs, states, options, monkeypatch):
    fused, loop = pair((ours, theirs), states, **options)
    calls = fused_calls(fused.layers[-1], monkeypatch)
    x = [rng.normal(size=(2, 6, 3)), *rng.normal(size=(states, 2, 4))]
    x = [part.astype("float32") for part in x]
    for found, expected in zip(fused(x), loop(x), strict=True):
        assert_close(found, expected, 1e-6)
    assert calls
    found, by_input = gradients(fused, x, lambda y: (y[0] ** 2).sum() + y[1].sum())
    expected, by_input_of_loop = gradients(
        loop, x, lambda y: (y[0] ** 2).sum() + y[1].sum()
    )
    pairs = zip([*found, *by_input], [*expected, *by_input_of_loop], strict=True)
    for gradient, other in pairs:
        assert_close(gradient, other, 1e-5)


@on_torch
@pytest.mark.parametrize("ours, theirs, states", KINDS)
def test_what_the_fused_loop_has_not_goes_step_by_step(
    ours, theirs, states, monkeypatch
):
    x = rng.normal(size=(2, 6, 3)).astype("float32")
    for options in ({"activation": "relu"}, {"recurrent_dropout": 0.5}):
        layer = ours(4, **options)
        calls = fused_calls(layer, monkeypatch)
        layer(x)
        assert not calls
    layer = ours(4)
    calls = fused_calls(layer, monkeypatch)
    layer(x, mask=np.ones((2, 6), bool))
    assert not calls
    layer(x)
    assert calls


@on_torch
@pytest.mark.parametrize("ours, theirs, states", KINDS)
def test_changed_weights_are_those_of_the_next_call(ours, theirs, states):
    fused, loop = pair((ours, theirs), states)
    x = [rng.normal(size=(2, 6, 3)), *rng.normal(size=(states, 2, 4))]
    x = [part.astype("float32") for part in x]
    for seed in range(3):
        if seed == 1:  # by an optimizer
            fused.compile("sgd", loss=["mse"] + [None] * states)
            fused.train_on_batch(x, np.ones((2, 6, 4), "float32"))
        else:
            shake(fused, seed=seed)
        loop.set_weights(fused.get_weights())
        for _ in range(2):
            expected = loop.predict_on_batch(x)
            for found, wanted in zip(fused.predict_on_batch(x), expected, strict=True):
                assert_close(found, wanted, 1e-6)
