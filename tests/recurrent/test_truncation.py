import keras
import numpy as np
import pytest
from keras import ops

import keras_edifice
from keras_edifice.recurrent.gru import GRULayer
from keras_edifice.recurrent.lstm import LSTMLayer
from tests.support.close import assert_close
from tests.support.gradients import gradients
from tests.support.shaking import shake

rng = np.random.default_rng(0)
every_layer = pytest.mark.parametrize("kind", [LSTMLayer, GRULayer])


def layer(kind, length=7, **options):
    keras.utils.set_random_seed(0)
    built = kind(4, return_sequences=True, return_state=True, **options)
    built.build((None, length, 3))
    return shake(built)


def inputs(length=7):
    return rng.normal(size=(2, length, 3)).astype("float32")


def by_input(cell, x):
    return gradients(cell, x, lambda y: ops.sum(ops.square(y[0][:, -1])))[1]


@every_layer
def test_no_value_changes(kind):
    x = inputs()
    for expected, found in zip(
        layer(kind)(x), layer(kind, truncate_bptt=3)(x), strict=True
    ):
        assert_close(found, expected, 1e-6)


@every_layer
def test_gradient_of_the_end_is_that_of_a_fixed_state_before_the_last_steps(kind):
    free, x = layer(kind), inputs()
    found = by_input(layer(kind, truncate_bptt=3), x)
    assert np.all(found[:, :4] == 0.0)
    _, *state = free(x[:, :4])
    late = layer(kind, length=3)

    class FromState(keras.layers.Layer):
        def call(self, x):
            return late(x, initial_state=state)

    expected = by_input(FromState(), x[:, 4:])
    assert np.abs(expected).max() > 1e-3
    assert_close(found[:, 4:], expected, 1e-6)


@every_layer
@pytest.mark.parametrize("kept", [7, 8])
def test_truncation_as_long_as_the_sequence_does_nothing(kind, kept):
    x = inputs()
    expected = by_input(layer(kind), x)
    assert np.all(np.abs(expected[:, 0]).max(-1) > 1e-6)
    assert_close(by_input(layer(kind, truncate_bptt=kept), x), expected, 1e-6)


@every_layer
def test_masked_steps_leave_the_state(kind):
    cell, x = layer(kind, truncate_bptt=2), inputs()
    for valid in (4, 6):  # padding from before, and from within the last steps
        mask = ops.convert_to_tensor(np.arange(7)[None].repeat(2, 0) < valid)
        _, *state = cell(ops.convert_to_tensor(x), mask=mask)
        _, *expected = layer(kind)(x[:, :valid])
        assert_close(ops.stack(state), ops.stack(expected), 1e-6)


@every_layer
def test_the_last_output_alone_is_that_of_the_sequence(kind):
    x, whole = inputs(), layer(kind)
    last = kind(4, truncate_bptt=3)
    last.build((None, 7, 3))
    last.set_weights(whole.get_weights())
    assert_close(last(x), whole(x)[0][:, -1], 1e-6)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_truncation_that_cannot_be_done_is_refused(name):
    with pytest.raises(ValueError, match="received None; pass window_size"):
        keras_edifice.build(name, embed_size=3, truncate_bptt=4, window_size=None)
    with pytest.raises(ValueError, match="pass bidirectional=False"):
        keras_edifice.build(name, embed_size=3, truncate_bptt=4, bidirectional=True)


@every_layer
def test_config_keeps_the_truncation(kind):
    config = kind(4, truncate_bptt=3, recurrent_dropout=0.5).get_config()
    copy = kind.from_config(config)
    assert (copy.units, copy.truncate_bptt, copy.recurrent_dropout) == (4, 3, 0.5)
