import keras
import numpy as np
from reservoirpy.nodes import Reservoir, Ridge

import keras_edifice
from tests.support.close import difference, to_numpy
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient

UNITS, FEATURES, LENGTH = 12, 3, 20


def test_reservoir_equals_that_of_reservoirpy(fidelity):
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    ours = keras_edifice.build(
        "reservoir",
        **dict(input_size=FEATURES, reservoir_size=UNITS, output_size=2, sparsity=0.3),
        **dict(bias_scaling=0.5, leak_rate=0.3, return_sequences=True, ridge=1e-3),
    )
    fixed = ours.get_layer("reservoir")
    theirs = Reservoir(
        units=UNITS,
        lr=0.3,
        W=to_numpy(fixed.W).T,
        Win=to_numpy(fixed.W_in).T,
        bias=to_numpy(fixed.b),
    )
    x = rng.normal(size=(1, LENGTH, FEATURES)).astype("float32")
    y = rng.normal(size=(1, LENGTH, 2))
    states = theirs.run(x[0].astype("float64"))
    found = keras.Model(ours.input, fixed.output).predict(x, verbose=0)[0]
    forward = difference(found, states)
    ours.fit_readout(x, y)
    readout = Ridge(ridge=1e-3).fit(states, y[0])
    expected = readout.run(states)
    forward = max(forward, difference(ours.predict(x, verbose=0)[0], expected))
    kernel, bias = (to_numpy(w) for w in ours.layers[-1].weights)
    by_weight, _ = gradients(ours, x, lambda y: keras.ops.sum(keras.ops.square(y)))

    def value(kernel, bias):
        return np.square(states @ kernel + bias).sum()

    expected = [
        numerical_gradient(lambda z: value(z, bias), kernel),
        numerical_gradient(lambda z: value(kernel, z), bias),
    ]
    fidelity.record(
        "reservoir",
        "reservoirpy Reservoir and Ridge",
        forward=forward,
        gradient=max(map(difference, by_weight, expected)),
    )
