import gc
import weakref

import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.backends.running import inference, let_go
from tests.support.close import assert_close


def test_a_function_sees_the_present_values_of_its_variables():
    factor = keras.Variable(np.float32(2.0))
    double = inference(lambda x: {"y": factor * x["x"]}, [factor])
    x = {"x": ops.ones((2, 3))}
    assert_close(double(x)["y"], np.full((2, 3), 2.0), 0)
    factor.assign(5.0)
    assert_close(double(x)["y"], np.full((2, 3), 5.0), 0)
    assert_close(double({"x": ops.ones(4)})["y"], np.full(4, 5.0), 0)


def test_a_model_that_ran_is_let_go():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, keras.layers.Dense(2)(inputs))
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 3)), np.ones((4, 2)), verbose=0)
    model.predict(np.ones((4, 3)), verbose=0)
    kept = weakref.ref(model)
    gc.disable()  # what follows must not be the work of an ordinary collection
    try:
        del model, inputs
        let_go()
    finally:
        gc.enable()
    assert kept() is None


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="graphs are TensorFlow's"
)
def test_the_graph_of_a_custom_gradient_is_let_go():
    import tensorflow as tf

    graphs = []

    @tf.function
    def twice(x):
        graphs.append(weakref.ref(x.graph))

        @tf.custom_gradient
        def double(x):
            return 2.0 * x, lambda upstream: 2.0 * upstream

        return double(x)

    assert_close(twice(tf.ones(3)), np.full(3, 2.0), 0)
    del twice
    let_go()
    assert [graph() for graph in graphs] == [None]
