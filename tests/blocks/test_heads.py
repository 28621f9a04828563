import keras
import numpy as np

from keras_edifice.blocks.heads import class_scores
from tests.support.close import assert_close


def test_scores_are_probabilities_in_float32_under_mixed_precision():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        inputs = keras.Input((4,))
        features = keras.layers.Dense(8)(inputs)
        model = keras.Model(inputs, class_scores(features, 3))
    finally:
        keras.config.set_dtype_policy(policy)
    y = model.predict(np.ones((2, 4), "float32"), verbose=0)
    assert y.dtype == "float32"
    assert_close(y.sum(-1), np.ones(2), 1e-6)


def test_no_activation_gives_logits_of_a_linear_map():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, class_scores(inputs, 3, None))
    x = np.random.default_rng(0).normal(size=(2, 4)).astype("float32")
    kernel, bias = model.get_weights()
    assert_close(model(x), x @ kernel + bias)
