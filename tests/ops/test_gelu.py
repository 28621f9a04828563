import math

import keras
import numpy as np

from keras_edifice.ops.gelu import gelu
from tests.support.close import assert_close
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient

x = np.linspace(-6, 6, 101)


def reference(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def test_it_is_x_times_the_normal_distribution_function():
    assert_close(gelu(keras.ops.convert_to_tensor(x, "float32")), reference(x), 1e-6)


def test_gradient_is_that_of_the_equation():
    inputs = keras.Input((101,))
    model = keras.Model(inputs, keras.layers.Activation(gelu)(inputs))
    _, by_input = gradients(model, x[None].astype("float32"), keras.ops.sum)
    expected = numerical_gradient(lambda x: reference(x).sum(), x)
    assert_close(by_input[0], expected, 1e-5)


def test_half_precision_stays_half_precision():
    y = gelu(keras.ops.convert_to_tensor(x, "bfloat16"))
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    # bfloat16 keeps 8 bits; near -6 the sum 1 + erf loses all of them.
    assert_close(keras.ops.cast(y, "float32"), reference(x), 2e-2)
