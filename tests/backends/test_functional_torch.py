import gc
import weakref

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_edifice.model import EdificeModel
from tests.support.close import assert_close

rng = np.random.default_rng(0)


class Watched(layers.Layer):
    """Gives twice its input and notes how many earlier outputs still exist."""

    made, alive = [], {}

    def call(self, x):
        gc.collect()
        self.alive[self.name] = sum(y() is not None for y in self.made)
        y = 2.0 * x
        self.made.append(weakref.ref(y))
        return y


def chain(length):
    inputs = x = keras.Input((3,))
    outputs = []
    for i in range(length):
        x = Watched(name=f"watched_{i}")(x)
        outputs.append(x)
    return inputs, outputs


@pytest.mark.skipif(
    keras.backend.backend() != "torch",
    reason="compiled functions free their intermediate values by themselves",
)
def test_an_output_is_let_go_after_its_last_use():
    inputs, outputs = chain(6)
    model = EdificeModel(inputs, outputs[-1] + outputs[1])
    Watched.made.clear()
    y = model(x := rng.normal(size=(2, 3)).astype("float32"))
    assert_close(y, 64 * x + 4 * x)
    # the last one made, and from the third layer on the one of the second too
    assert list(Watched.alive.values()) == [0, 1, 1, 2, 2, 2]


def test_shared_layers_branches_and_several_outputs_are_computed():
    shared = layers.Dense(3, name="shared")
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    x, y = shared(a), shared(b)
    first, *others = ops.split(ops.concatenate([x, y], axis=-1), 3, axis=-1)
    model = EdificeModel([a, b], {"sum": x + y, "first": first, "input": b})
    values = [rng.normal(size=(2, 3)).astype("float32") for _ in range(2)]
    found = model(values)
    kernel, bias = map(ops.convert_to_numpy, shared.weights)
    x, y = (value @ kernel + bias for value in values)
    assert_close(found["sum"], x + y)
    assert_close(found["first"], x[:, :2])
    assert_close(found["input"], values[1], 0)


def test_gradients_flow_where_values_were_let_go():
    inputs = keras.Input((3,))
    x = layers.Dense(4, "tanh")(layers.Dense(4, "tanh")(inputs))
    model = EdificeModel(inputs, layers.Dense(1)(x))
    model.compile("sgd", "mse")
    before = model.get_weights()
    model.fit(rng.normal(size=(8, 3)), rng.normal(size=(8, 1)), epochs=1, verbose=0)
    for old, new in zip(before, model.get_weights(), strict=True):
        assert np.abs(old - new).max() > 0
