import math

import keras
import numpy as np
import pytest

from keras_edifice.blocks.feed_forward import FeedForward, GatedFFN
from tests.support.close import assert_close, to_numpy
from tests.support.shaking import shake

rng = np.random.default_rng(0)
ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "squared_relu": lambda x: np.maximum(x, 0) ** 2,
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2,
    "gelu_tanh": lambda x: (
        x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2
    ),
}


def inputs():
    return rng.normal(size=(2, 3, 4)).astype("float32")


def built(layer, features=4):
    layer.build((None, None, features))
    return shake(layer)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_two_matrices(activation):
    layer, x = built(FeedForward(5, activation)), inputs()
    w1, b1, w2, b2 = (to_numpy(w) for w in layer.weights)
    hidden = ACTIVATIONS[activation](x.astype("float64") @ w1 + b1)
    assert_close(layer(x), hidden @ w2 + b2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_multiplies_what_goes_up(activation):
    layer, x = built(GatedFFN(5, activation)), inputs()
    gate, up, down = (to_numpy(w) for w in layer.weights)
    wide = x.astype("float64")
    assert_close(layer(x), (ACTIVATIONS[activation](wide @ gate) * (wide @ up)) @ down)


def test_fused_matrix_holds_the_gate_first():
    split, fused, x = built(GatedFFN(5)), built(GatedFFN(5, fused=True)), inputs()
    gate, up, down = split.get_weights()
    fused.set_weights([np.concatenate([gate, up], axis=1), down])
    assert_close(fused(x), split(x), 1e-6)


def test_closed_gate_gives_zeros():
    layer, x = built(GatedFFN(5, use_bias=True)), inputs()
    layer.gate.set_weights([np.zeros((4, 5)), np.zeros(5)])
    expected = np.broadcast_to(to_numpy(layer.down.bias), x.shape)
    assert_close(layer(x), expected, 1e-6)


def test_width_is_rounded_up_to_a_multiple():
    llama = GatedFFN(multiple_of=256)
    assert llama._default_width(4096) == 11008  # Llama 2, 7B, too large to build here
    assert built(GatedFFN(expansion=3.0), 10).width == 20
    assert built(FeedForward(), 4).width == 16


def test_number_of_weights():
    assert built(GatedFFN(7), 4).count_params() == 3 * 4 * 7
    assert built(FeedForward(7), 4).count_params() == 2 * 4 * 7 + 7 + 4


def test_dropout_is_drawn_in_training_alone():
    layer, x = built(GatedFFN(64, dropout=0.5)), inputs()
    assert_close(layer(x), layer(x, training=False), 0)
    assert np.abs(to_numpy(layer(x, training=True)) - to_numpy(layer(x))).max() > 1e-3


def test_int8_weights_survive_saving(tmp_path):
    x = inputs()
    inside = keras.Input((3, 4))
    model = keras.Model(inside, GatedFFN(5, name="ffn")(FeedForward(6)(inside)))
    model.quantize("int8")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.get_layer("ffn").gate.quantization_mode == "int8"
    assert_close(loaded(x), model(x), 1e-6)


def test_matrices_start_normal_with_the_given_deviation():
    keras.utils.set_random_seed(0)
    layer = GatedFFN(256, stddev=0.02)
    layer.build((None, None, 64))
    for weight in layer.weights:
        assert abs(to_numpy(weight).std() - 0.02) < 0.001
    assert layer.get_config()["stddev"] == 0.02
