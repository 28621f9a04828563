"""A functional model run token by token, by the `step` of its layers."""

import keras


def stream(model, x):
    """Outputs of `model` after each token of x, (batch, time, features).

    Layers with a `step` take their state along; all others must act on each token by
    itself.
    """
    state = {
        layer.name: layer.initial_state(len(x))
        for layer in model.layers
        if hasattr(layer, "step")
    }

    def stepped(operation):
        if operation.name not in state:
            return operation

        def step(token, **_):
            y, state[operation.name] = operation.step(token, state[operation.name])
            return y

        return step

    tokens = [keras.ops.convert_to_tensor(x[:, t]) for t in range(x.shape[1])]
    outputs = [model._run_through_graph(token, stepped) for token in tokens]
    return keras.ops.stack(outputs, axis=1)
