import keras
import numpy as np
import pytest

from keras_edifice.blocks.composite import Composite
from keras_edifice.model import EdificeModel
from tests.support.close import assert_close


@keras.saving.register_keras_serializable("keras_edifice_tests")
class Pair(Composite):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.first = keras.layers.Dense(units, dtype=self.dtype_policy, name="first")
        self.second = keras.layers.Dense(units, dtype=self.dtype_policy, name="second")

    def build(self, input_shape):
        self.first.build(input_shape)
        self.second.build((*input_shape[:-1], self.units))

    def call(self, x):
        return self.second(self.first(x))

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)


@keras.saving.register_keras_serializable("keras_edifice_tests")
class Nest(Composite):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.pair = Pair(units, dtype=self.dtype_policy, name="pair")

    def build(self, input_shape):
        self.pair.build(input_shape)

    def call(self, x):
        return self.pair(x)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)


@pytest.mark.parametrize("layer", [Pair, Nest])
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_quantised_sublayers_survive_saving(layer, policy, tmp_path):
    inputs = keras.Input((6,))
    model = EdificeModel(inputs, layer(4, dtype=policy, name="made")(inputs))
    model.quantize("int8")
    x = np.random.default_rng(0).normal(size=(3, 6)).astype("float32")
    expected = model.predict(x, verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    dense = [
        la for la in loaded._flatten_layers() if isinstance(la, keras.layers.Dense)
    ]
    assert [la.quantization_mode for la in dense] == ["int8", "int8"]
    assert {la.compute_dtype for la in dense} == {
        "bfloat16" if policy != "float32" else "float32"
    }
    assert_close(loaded.predict(x, verbose=0), expected, 0)
