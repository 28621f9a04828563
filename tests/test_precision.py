import keras
import numpy as np
import pytest
from keras import layers

from keras_edifice.model import EdificeModel
from keras_edifice.precision import in_float32
from tests.support.close import assert_close


def model(policy):
    inputs = keras.Input((4,), name="inputs")
    first = layers.Dense(6, activation="tanh", dtype=policy, name="first")
    nested = keras.Sequential([layers.Dense(5, dtype=policy)], name="nested")
    x = layers.LayerNormalization(dtype=policy)(nested(first(inputs)))
    return EdificeModel(inputs, x, name="model").describe("mlp", {"input_size": 4})


def test_float32_model_is_returned_itself():
    exact = model("float32")
    assert in_float32(exact) is exact


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "float16"])
def test_copy_computes_as_the_model_of_float32_does(policy):
    low, exact = model(policy), model("float32")
    exact.set_weights([np.asarray(w, "float32") for w in low.get_weights()])
    copy = in_float32(low)
    assert {layer.compute_dtype for layer in copy._flatten_layers()} == {"float32"}
    assert copy.options == low.options
    x = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")
    assert_close(copy(x), exact(x), 1e-6)


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
def test_quantised_layers_stay_quantised():
    low = model("mixed_bfloat16")
    low.quantize("int8")
    first = in_float32(low).get_layer("first")
    assert first.dtype_policy.name == "int8_from_float32"
    assert_close(first.kernel, low.get_layer("first").kernel, 0)


def test_losses_are_left_behind():
    low = model("mixed_bfloat16")
    low.compile("adam", "mse")
    assert not in_float32(low).compiled


class Unregistered(layers.Dense):
    pass


def test_layers_need_not_be_registered():
    inputs = keras.Input((4,), name="inputs")
    low = keras.Model(inputs, Unregistered(2, dtype="mixed_bfloat16")(inputs))
    assert type(in_float32(low).layers[-1]) is Unregistered
