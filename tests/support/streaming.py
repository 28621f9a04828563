"""A functional model run token by token, by the `step` of its layers."""

import keras

from tests.support.compiled import compiled


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

    def one_token(token, state):
        state = dict(state)

        def stepped(operation):
            if operation.name not in state:
                return operation

            def step(token, **_):
                name = operation.name
                y, state[name] = operation.step(token, state[name])
                return y

            return step

        return model._run_through_graph(token, stepped), state

    run, outputs = compiled(one_token), []
    for t in range(x.shape[1]):
        y, state = run(keras.ops.convert_to_tensor(x[:, t]), state)
        outputs.append(y)
    return keras.ops.stack(outputs, axis=1)
