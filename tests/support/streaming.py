"""A model run token by token."""

import keras

import keras_edifice


def stream(model, x):
    """Outputs of `model` after each token of x, (batch, time, ...)."""
    streaming, outputs = keras_edifice.streaming(model), []
    state = streaming.initial_state(len(x))
    for t in range(x.shape[1]):
        y, state = streaming.step(x[:, t], state)
        outputs.append(y)
    return keras.ops.stack(outputs, axis=1)
