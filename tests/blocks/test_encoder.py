import keras
import numpy as np

from keras_edifice.blocks.encoder import encoder
from tests.support.close import assert_close

rng = np.random.default_rng(0)


def test_blocks_whose_last_matrices_are_zero_are_the_identity():
    inputs = keras.Input((3, 8))
    model = keras.Model(inputs, encoder(inputs, 2, 2))
    for weight in model.weights:
        if weight.path.endswith(("out/kernel", "second/kernel", "second/bias")):
            weight.assign(np.zeros(weight.shape))
    x = rng.normal(size=(2, 3, 8)).astype("float32")
    assert_close(model(x), x, 0)


def test_options_reach_the_layers():
    inputs = keras.Input((3, 8))
    options = dict(mlp_ratio=2.5, qkv_bias=False, initializer="truncated", dropout=0.1)
    y = encoder(inputs, 2, 4, attention_dropout=0.2, epsilon=1e-3, name="b", **options)
    model = keras.Model(inputs, y)
    attention, mlp = model.get_layer("b2_attention"), model.get_layer("b2_mlp")
    assert (attention.num_heads, attention.use_bias) == (4, False)
    assert (attention.dropout, mlp.dropout, mlp.hidden_size) == (0.2, 0.1, 20)
    assert attention.initializer == mlp.initializer == "truncated"
    assert model.get_layer("b1_mlp_norm").epsilon == 1e-3
