import keras
import numpy as np
import pytest

from keras_edifice.recurrent.lstm import LSTMLayer
from keras_edifice.recurrent.stack import recurrent_stack
from tests.support.close import assert_close

rng = np.random.default_rng(0)


def stack(**options):
    def make_layer(name):
        return LSTMLayer(4, return_sequences=True, name=name)

    options = {"embed_size": 3, "return_sequences": True, **options}
    return recurrent_stack("some", make_layer, 4, num_layers=2, **options)


def test_each_layer_takes_the_sequence_of_the_one_before():
    model, x = stack(), rng.normal(size=(2, 5, 3)).astype("float32")
    expected = model.get_layer("some_1")(model.get_layer("some_0")(x))
    assert model.name == "some"
    assert_close(model(x), expected, 1e-6)


def test_norms_and_dropout_are_where_they_are_asked_for():
    model = stack(input_layer_norm=True, use_layer_norm=True, dropout=0.5)
    names = [layer.name for layer in model.layers[1:]]
    expected = "input_norm some_0 norm_0 dropout_1 some_1 norm_1"
    assert names == expected.split()


def test_tokens_of_both_directions_are_refused():
    with pytest.raises(ValueError, match="pass embed_size or bidirectional=False"):
        stack(embed_size=None, vocab_size=5, bidirectional=True)


def test_pool_follows_the_direction():
    for bidirectional, expected in ((False, "last"), (True, "mean")):
        model = stack(bidirectional=bidirectional, return_sequences=False)
        assert isinstance(model, keras.Model)
        assert model.get_layer("pool").pool == expected
