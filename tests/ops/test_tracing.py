import keras
import numpy as np
import pytest

from keras_edifice.ops.tracing import export_scope, exporting, static_length


def test_length_of_an_array_is_an_int_and_of_an_open_axis_none():
    assert static_length(keras.ops.ones((2, 5, 3))) == 5
    assert static_length(keras.Input((None, 3))) is None
    assert static_length(keras.Input((5, 3)), axis=-1) == 3


def test_length_inside_a_compiled_call_is_known_where_it_is_declared():
    seen = []

    class Probe(keras.layers.Layer):
        def call(self, x):
            seen.append(static_length(x))
            return x

        def compute_output_shape(self, input_shape):
            return input_shape

    inputs = keras.Input((5, 3))
    keras.Model(inputs, Probe()(inputs)).predict(np.ones((2, 5, 3)), verbose=0)
    assert set(seen) == {5}


def test_scopes_nest_and_end_after_errors():
    assert exporting() is None
    with pytest.raises(KeyError), export_scope("onnx"):
        with export_scope("saved_model"):
            assert exporting() == "saved_model"
        assert exporting() == "onnx"
        raise KeyError
    assert exporting() is None
