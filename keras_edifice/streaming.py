"""Causal models token by token: the same weights, the state in the open.

>>> stream = streaming(model)
>>> y, state = stream.prefill(prompt)           # (batch, time, features)
>>> y_t, state = stream.step(x_t, state)        # (batch, features)
"""

import functools
import inspect
import tempfile
from pathlib import Path

import keras
import numpy as np
from keras import Input, layers, ops, tree

from keras_edifice.backends.artefacts import onnx_session
from keras_edifice.backends.running import inference
from keras_edifice.exporting import TOLERANCE, export
from keras_edifice.samples import sample_inputs

CHAIN = 32
"""Steps over which an exported step model is compared with the model."""

PER_STEP = (
    layers.Activation,
    layers.Add,
    layers.Average,
    layers.Dense,
    layers.Dropout,
    layers.Embedding,
    layers.GaussianDropout,
    layers.GaussianNoise,
    layers.Identity,
    layers.LayerNormalization,
    layers.Maximum,
    layers.Minimum,
    layers.Multiply,
    layers.RMSNormalization,
    layers.Rescaling,
    layers.Subtract,
)
"""Layers of Keras that act on each step by itself."""


def streaming(model: keras.Model, max_length: int | None = None) -> "StreamingModel":
    """A causal model as one that runs token by token, with the same weights.

    Args:
        model: functional, with one input (batch, time, features) or (batch, time) of
            tokens, and one output.
        max_length: tokens that the cache of full attention holds; what its layers
            say if None. Other layers need no such bound.

    Raises:
        TypeError: no functional model.
        ValueError: a layer looks at other steps and has no step of its own.
    """
    return StreamingModel(model, max_length)


class StreamingModel:
    """What `streaming` gives. The state is a dict of tensors (batch, ...) by name.

    Attributes:
        model: the model that is streamed.
        step_model: a functional Keras model of one step: a dict of the token, under the
            name of the model's input, and of the states -> a dict of "outputs" and of
            the new states, whose names begin with "next_".
    """

    def __init__(self, model, max_length=None):
        if not isinstance(model, keras.Model) or not getattr(model, "inputs", None):
            raise TypeError(
                "streaming takes a functional Keras model, received "
                f"{type(model).__name__}; build it with keras.Model(inputs, outputs)"
            )
        if len(model.inputs) != 1 or len(model.outputs) != 1:
            raise ValueError(
                f"{model.name} cannot stream: it must have one input and one output, "
                f"received {len(model.inputs)} and {len(model.outputs)}"
            )
        self.model, self.max_length = model, max_length
        self.input_name = model.inputs[0].name
        self._stateful = {}  # name of a use -> the layer
        _walk(model, None, self._note)
        self._structures = {n: _structure(s) for n, s in self._states(1).items()}
        self._owners = {  # name of a part of the state -> name of the use
            f"{name}_{i}": name
            for name, structure in self._structures.items()
            for i in tree.flatten(structure)
        }
        self.step_model = self._make_step_model()
        variables = model.variables
        self._step = inference(self._one_step, variables)
        self._prefill = inference(self._whole, variables)

    def initial_state(self, batch_size: int) -> dict:
        """The state before the first token."""
        parts = tree.flatten(list(self._states(batch_size).values()))
        return dict(zip(self._owners, parts, strict=True))

    def step(self, x_t, state: dict):
        """One token.

        Args:
            x_t: (batch, features), or (batch,) of tokens.
            state: of `initial_state`, `prefill` or the step before.

        Returns:
            What the model gives at this step, and the new state.
        """
        x_t = ops.convert_to_tensor(x_t, dtype=self.model.inputs[0].dtype)
        return self._step(x_t, state)

    def prefill(self, x, state: dict | None = None):
        """Many tokens at once, by the parallel form.

        Args:
            x: (batch, time, features), or (batch, time) of tokens.
            state: of the tokens before; that of no token if None.

        Returns:
            The model's output for x, and the state after it.
        """
        x = ops.convert_to_tensor(x, dtype=self.model.inputs[0].dtype)
        return self._prefill(x, state or self.initial_state(x.shape[0]))

    def export(self, path) -> float:
        """Writes the step model as ONNX, with the states as inputs and outputs.

        Returns:
            The largest difference between the file and the model, relative to the
            largest output or 1, over 32 steps of which each takes the state of the
            one before.

        Raises:
            ValueError: as `keras_edifice.export`, or the states drift apart.
        """
        path = Path(path).absolute()
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".step.") as folder:
            written = Path(folder, path.name)
            difference = export(self.step_model, written, "onnx")
            difference = max(difference, self._drift(str(written)))
            if not difference <= TOLERANCE:
                raise ValueError(
                    f"{self.step_model.name} was not exported: after {CHAIN} steps the "
                    f"file differs by {difference:.1e}"
                )
            written.replace(path)
        return difference

    def _drift(self, path):
        """Largest difference from the model over a chain of steps of the file."""
        run, model = onnx_session(self.step_model, path), self.step_model
        inputs = [x.name for x in model.inputs]
        order = [
            next(name for name, y in model.output.items() if y is flat)
            for flat in tree.flatten(model.output)
        ]
        tokens = sample_inputs(self.model, 2, CHAIN)
        state, largest = self.initial_state(2), 0.0
        held = {name: ops.convert_to_numpy(part) for name, part in state.items()}
        for t in range(CHAIN):
            token = np.take(tokens, t % tokens.shape[1], axis=1)
            given = {**held, self.input_name: token}
            flat = run([given[name] for name in inputs])
            found = dict(zip(order, flat, strict=True))
            held = {name: found[f"next_{name}"] for name in held}
            y, state = self.step(token, state)
            y = ops.convert_to_numpy(y)
            gap = np.abs(found["outputs"] - y).max() / max(1.0, np.abs(y).max())
            largest = max(largest, float(gap))
        return largest

    def _note(self, name, layer, *args, **kwargs):
        """Takes down what has a state; refuses what mixes steps without one."""
        if hasattr(layer, "step") and hasattr(layer, "initial_state"):
            self._stateful[name] = layer
        elif not (isinstance(layer, PER_STEP) or getattr(layer, "per_step", False)):
            raise ValueError(
                f"{self.model.name} cannot run token by token: {layer.name} "
                f"({type(layer).__name__}) may look at other steps and has no step"
            )

    def _states(self, batch_size):
        """Name of a layer with state -> its state before the first token."""
        states = {}
        for name, layer in self._stateful.items():
            accepted = inspect.signature(layer.initial_state).parameters
            bound = {"max_length": self.max_length}
            bounded = self.max_length is not None and "max_length" in accepted
            states[name] = layer.initial_state(batch_size, **(bound if bounded else {}))
        return states

    def _make_step_model(self):
        token = self.model.inputs[0]
        x = Input(token.shape[2:], dtype=token.dtype, name=self.input_name)
        state = {
            name: Input(
                part.shape[1:],
                dtype=keras.backend.standardize_dtype(part.dtype),
                name=name,
            )
            for name, part in self.initial_state(1).items()
        }
        y, new = self._run(x, state, lambda layer, name, _: Step(layer, name=name))
        outputs = {"outputs": y, **{f"next_{n}": part for n, part in new.items()}}
        inputs = {self.input_name: x, **state}
        return keras.Model(inputs, outputs, name=f"{self.model.name}_step")

    def _one_step(self, x_t, state):
        def make(layer, name, structure):
            return functools.partial(_step, layer, structure)

        return self._run(x_t, state, make)

    def _whole(self, x, state):
        def make(layer, name, structure):
            return functools.partial(_prefill, layer, structure)

        return self._run(x, state, make)

    def _run(self, x, state, make):
        """The output and the new state.

        `make(layer, name, structure of its state)` is a function
        [x, *parts of the state] -> [y, *new parts].
        """
        state = dict(state)

        def call(name, layer, x, *args, **kwargs):
            if name not in self._stateful:
                return layer(x, *args, **kwargs)
            names = [n for n, owner in self._owners.items() if owner == name]
            run = make(layer, name, self._structures[name])
            y, *parts = run([x, *(state[n] for n in names)])
            state.update(zip(names, parts, strict=True))
            return y

        y = _walk(self.model, x, call)
        return y, state


@keras.saving.register_keras_serializable("keras_edifice")
class Step(layers.Layer):
    """The step of a layer as a layer: [x_t, *state] -> [y_t, *new state], flat.

    Args:
        layer: with `initial_state(batch_size)` and `step(x_t, state)`; its weights are
            shared.
    """

    def __init__(self, layer, **kwargs):
        super().__init__(autocast=False, **kwargs)  # a state keeps its precision
        self.layer = layer

    def build(self, input_shape):
        if not self.layer.built:
            batch, *features = input_shape[0]
            self.layer.build((batch, None, *features))
        self._leaves = _structure(self.layer.initial_state(1))

    def call(self, inputs):
        return _step(self.layer, self._leaves, inputs)

    def get_config(self):
        layer = keras.saving.serialize_keras_object(self.layer)
        return {**super().get_config(), "layer": layer}

    @classmethod
    def from_config(cls, config):
        layer = keras.saving.deserialize_keras_object(config["layer"])
        return cls(**{**config, "layer": layer})


def _structure(state):
    """The state with the number of each part in its place: no tensors to carry."""
    parts = tree.flatten(state)
    return tree.pack_sequence_as(state, list(range(len(parts)))) if parts else ()


def _packed(structure, parts):
    return tree.pack_sequence_as(structure, parts) if parts else ()


def _step(layer, structure, inputs):
    x, *parts = inputs
    y, state = layer.step(x, _packed(structure, parts))
    return [y, *tree.flatten(state)]


def _prefill(layer, structure, inputs):
    """By the layer's own `prefill(x, state)`, or the call that most of them have."""
    x, *parts = inputs
    state = _packed(structure, parts)
    if hasattr(layer, "prefill"):
        y, state = layer.prefill(x, state)
    else:
        y, state = layer(x, initial_state=state, return_state=True)
    return [y, *tree.flatten(state)]


def _walk(model, x, call, prefix=""):
    """The model's output with `call(name, layer, *args, **kwargs)` for each layer.

    A layer that is used more than once has another name each time; the layers of a
    model inside carry its name before theirs.
    """
    uses = {}

    def called(layer, *args, **kwargs):
        uses[layer.name] = uses.get(layer.name, 0) + 1
        name = prefix + layer.name
        if uses[layer.name] > 1:
            name = f"{name}_use_{uses[layer.name]}"
        if isinstance(layer, keras.Model) and getattr(layer, "inputs", None):
            return _walk(layer, args[0], call, f"{name}_")
        return call(name, layer, *args, **kwargs)

    x = tree.pack_sequence_as(model.input, [x])
    outputs = model._run_through_graph(x, lambda layer: layer, called)
    return tree.flatten(outputs)[0]
