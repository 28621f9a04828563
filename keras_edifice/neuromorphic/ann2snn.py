"""Conversion of a trained ReLU network to spikes: rates stand for activations.

    V += I;    s = V >= θ;    V -= s θ;    out = s θ,    θ_l = λ_l

Integrate-and-fire neurons take the place of ReLU. Over T steps the mean of what a
neuron sends is its activation, in units of λ / T and up to λ, its largest activation
on calibration data. Diehl et al. 2015 have λ as a percentile, Rueckauer et al. 2017
(Front. Neurosci. 11:682) the reset by subtraction, the constant input current and
the folding of batch normalisation. `snn.py` trains spikes instead.

The time loop is outermost: each step runs the whole network, so memory does not grow
with T, where layer after layer over all of time would keep T images of every channel.
"""

import inspect
from collections import Counter
from dataclasses import dataclass, field
from typing import Annotated, Literal

import keras
import numpy as np
from keras import Input, layers, ops

from keras_edifice.blocks import batch_norm, convolution
from keras_edifice.blocks.dense import Dense
from keras_edifice.blocks.dense_stack import dense_stack
from keras_edifice.blocks.heads import class_scores
from keras_edifice.model import EdificeModel
from keras_edifice.ops.step_scan import step_scan
from keras_edifice.ops.tracing import exporting
from keras_edifice.options import Activation, Fraction, Positive, Range, Size, check
from keras_edifice.registry import architecture

Percentile = Annotated[float, Range(0.0, 100.0, open_low=True)]
"""A part of a distribution: above 0, to 100."""
Mode = Literal["threshold", "weight"]
Reset = Literal["subtract", "zero"]
Coding = Literal["constant", "poisson"]
BatchNorm = Literal["fold", "keep"]

WEIGHTED = layers.Dense, layers.Conv2D, layers.DepthwiseConv2D
KEEPS_SCALE = layers.AveragePooling2D, layers.GlobalAveragePooling2D, layers.Flatten
NORMALISING = layers.BatchNormalization, layers.Softmax
OFF_AT_INFERENCE = layers.Dropout, layers.SpatialDropout2D, layers.Identity
OURS = {
    Dense: layers.Dense,
    convolution.Conv2D: layers.Conv2D,
    convolution.DepthwiseConv2D: layers.DepthwiseConv2D,
    batch_norm.BatchNorm: layers.BatchNormalization,
}
"""The layers of this package that compute what one of Keras computes."""


@dataclass(eq=False)
class Node:
    """One step of a network that is being converted.

    Attributes:
        kind: input, weighted, scale, relu, max, softmax, add or passive.
        sources: the nodes that it reads.
        shape: of its output, batch first.
        layer: the trained layer.
        weights: kernel and bias of a weighted node, scale and shift of a scale.
    """

    kind: str
    sources: list = field(default_factory=list)
    shape: tuple = ()
    layer: keras.Layer | None = None
    weights: list = field(default_factory=list)


@keras.saving.register_keras_serializable("keras_edifice")
class ChannelScale(layers.Layer):
    """(..., channels) -> the same: w x + b, what inference leaves of batch norm."""

    def build(self, input_shape):
        channels = (input_shape[-1],)
        self.scale = self.add_weight(channels, "ones", name="scale")
        self.shift = self.add_weight(channels, "zeros", name="shift")

    def call(self, x):
        return x * ops.cast(self.scale, x.dtype) + ops.cast(self.shift, x.dtype)

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable("keras_edifice")
class IntegrateAndFire(layers.Layer):
    """One step: currents, V - V[0] and spike counts -> spikes of height θ, both.

    All three have one shape, (batch, ..., channels), and so have the results. V[0] is
    taken off the membranes so that every state starts at zero.

    Args:
        threshold: θ, a number or one for each channel.
        reset: after a spike take θ off the membrane, or set it to zero.
        v_init: V[0] as a part of θ; one half makes the rates round, not truncate.
    """

    def __init__(self, threshold=1.0, reset="subtract", v_init=0.5, **kwargs):
        super().__init__(**kwargs)
        self.threshold, self.reset, self.v_init = threshold, reset, v_init

    def call(self, currents, membranes, counts):
        threshold = ops.convert_to_tensor(self.threshold, currents.dtype)
        membranes = membranes + currents
        fires = ops.cast(membranes >= (1.0 - self.v_init) * threshold, currents.dtype)
        spikes = fires * threshold
        if self.reset == "subtract":
            membranes = membranes - spikes
        else:
            membranes = (1.0 - fires) * membranes - self.v_init * spikes
        return spikes, membranes, counts + fires

    def compute_output_shape(self, currents_shape, membranes_shape, counts_shape):
        return currents_shape, membranes_shape, counts_shape


@keras.saving.register_keras_serializable("keras_edifice")
class SpikingNetwork(layers.Layer):
    """(batch, ...) -> (batch, outputs): the mean of a network's output over time.

    `step_model` is one time step: (input current, states) -> (output, states).

    Args:
        step_model: functional model; its inputs and outputs after the first are the
            states, zero at the start.
        num_timesteps: T.
        input_coding: "constant" sends the input itself in each step, "poisson" spikes
            of its sign, with its size, at most 1, as their probability.
        output_scale: what the mean is multiplied by, a number or one a channel.
        return_all_steps: give the mean after each step, (batch, T, outputs).
        return_counts: give a dict of the outputs and of the states named counts_i,
            the number of spikes of each neuron.
        seed: of the Poisson spikes.
    """

    def __init__(
        self,
        step_model,
        num_timesteps=64,
        input_coding="constant",
        output_scale=1.0,
        return_all_steps=False,
        return_counts=False,
        seed=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.step_model, self.num_timesteps = step_model, num_timesteps
        self.input_coding, self.output_scale = input_coding, output_scale
        self.return_all_steps, self.return_counts = return_all_steps, return_counts
        self.seed = seed
        if input_coding == "poisson":
            self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        self.state_shapes = [tuple(x.shape[1:]) for x in self.step_model.inputs[1:]]

    def initial_state(self, batch_size):
        """Zeros for each state."""
        return [ops.zeros((batch_size, *shape)) for shape in self.state_shapes]

    def step(self, x, state):
        """Input current (batch, ...), states -> (output of this step, states)."""
        # Calling each layer's `call` itself makes a step several times faster where
        # nothing compiles it, on PyTorch.
        outputs = self.step_model._run_through_graph([x, *state], _bare_call)
        outputs, *state = keras.tree.flatten(outputs)
        return outputs, state

    def call(self, x):
        state = self.initial_state(ops.shape(x)[0])
        if self.input_coding == "poisson":
            outputs, state = step_scan(self.step, self._poisson(x), state)
        else:
            clock = ops.zeros((ops.shape(x)[0], self.num_timesteps, 1))
            outputs, state = step_scan(lambda _, s: self.step(x, s), clock, state)
        scale = ops.convert_to_tensor(self.output_scale, outputs.dtype)
        if self.return_all_steps:
            elapsed = np.arange(1.0, self.num_timesteps + 1.0, dtype="float32")
            elapsed = elapsed.reshape(-1, *[1] * (len(outputs.shape) - 2))
            outputs = ops.cumsum(outputs, axis=1) / ops.convert_to_tensor(elapsed)
        else:
            outputs = ops.mean(outputs, axis=1)
        outputs = outputs * scale
        if not self.return_counts:
            return outputs
        names = [x.name for x in self.step_model.inputs[1:]]
        counts = {k: v for k, v in zip(names, state, strict=True) if "counts" in k}
        return {"outputs": outputs, **counts}

    def _poisson(self, x):
        if exporting() == "onnx":
            raise ValueError(
                "input_coding='poisson' draws random numbers, which an ONNX file "
                "cannot; convert with input_coding='constant' to export it"
            )
        x = ops.repeat(ops.expand_dims(x, 1), self.num_timesteps, axis=1)
        draws = keras.random.uniform(ops.shape(x), seed=self.seed_generator)
        return ops.sign(x) * ops.cast(draws < ops.abs(x), x.dtype)

    def compute_output_shape(self, input_shape):
        shape = self.step_model.outputs[0].shape[1:]
        steps = (self.num_timesteps,) if self.return_all_steps else ()
        outputs = (input_shape[0], *steps, *shape)
        if not self.return_counts:
            return outputs
        counts = {
            x.name: (input_shape[0], *x.shape[1:])
            for x in self.step_model.inputs[1:]
            if "counts" in x.name
        }
        return {"outputs": outputs, **counts}

    def get_config(self):
        return {
            **super().get_config(),
            "step_model": keras.saving.serialize_keras_object(self.step_model),
            "num_timesteps": self.num_timesteps,
            "input_coding": self.input_coding,
            "output_scale": self.output_scale,
            "return_all_steps": self.return_all_steps,
            "return_counts": self.return_counts,
            "seed": self.seed,
        }

    @classmethod
    def from_config(cls, config):
        step_model = keras.saving.deserialize_keras_object(config["step_model"])
        return cls(**{**config, "step_model": step_model})


def _bare_call(layer):
    return layer.quantized_call if layer.quantization_mode else layer.call


def _nodes(model):
    """The nodes of a trained model, inputs first, nested models opened.

    Raises:
        ValueError: the model is not functional, has several inputs or outputs, or
            holds a layer that has no spiking form.
    """
    if not getattr(model, "inputs", None):
        raise ValueError(
            f"{model.name} has no layers to read; convert a functional or a built "
            "sequential model"
        )
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise ValueError(
            f"{model.name} has {len(model.inputs)} inputs and {len(model.outputs)} "
            "outputs; convert a model with one of each"
        )
    start = Node("input", shape=tuple(model.inputs[0].shape))
    end = _read(model.outputs[0], {id(model.inputs[0]): start})
    nodes = []

    def visit(node):
        if node not in nodes:
            for source in node.sources:
                visit(source)
            nodes.append(node)

    visit(start)
    visit(end)
    for node in nodes[:-1]:
        if node.kind == "softmax":
            raise ValueError(
                f"{node.layer.name} is a softmax inside the network; only the output "
                "can have one"
            )
    return nodes


def _read(tensor, known):
    """The node that makes a Keras tensor; `known` holds those of tensors read."""
    if id(tensor) not in known:
        layer, call, output = tensor._keras_history
        arguments = layer._inbound_nodes[call].input_tensors
        sources = [_read(x, known) for x in arguments]
        if isinstance(layer, keras.Model):
            inside = {
                id(x): node for x, node in zip(layer.inputs, sources, strict=True)
            }
            known[id(tensor)] = _read(layer.outputs[output], inside)
        else:
            known[id(tensor)] = _translate(layer, sources, tuple(tensor.shape))
    return known[id(tensor)]


def _kind(layer):
    return OURS.get(type(layer), type(layer))


def _translate(layer, sources, shape):
    """The node of one layer, or its source where inference leaves nothing of it."""
    _check_layer(layer, len(shape))
    kind, activation = _kind(layer), None
    if kind in OFF_AT_INFERENCE:
        return sources[0]
    if kind in WEIGHTED:
        node = Node("weighted", sources, shape, layer, _weights(layer))
        activation = layer.activation
    elif kind is layers.BatchNormalization:
        return Node("scale", sources, shape, layer, _inference_scale(layer))
    elif kind is layers.Activation:
        (node,) = sources
        activation = layer.activation
    elif kind is layers.ReLU:
        (node,) = sources
        activation = keras.activations.relu
    elif kind is layers.Softmax:
        (node,) = sources
        activation = keras.activations.softmax
    else:
        names = {layers.Add: "add", layers.MaxPooling2D: "max"}
        return Node(names.get(kind, "passive"), sources, shape, layer)
    if activation is keras.activations.linear:
        return node
    known = {keras.activations.relu: "relu", keras.activations.softmax: "softmax"}
    if activation not in known:
        name = getattr(activation, "__name__", type(activation).__name__)
        raise ValueError(
            f"{layer.name} has the activation {name!r}, which spikes "
            "cannot stand for; use 'relu', 'linear', or 'softmax' on the output"
        )
    return Node(known[activation], [node], shape, layer)


def _check_layer(layer, rank):
    supported = (
        *WEIGHTED,
        *KEEPS_SCALE,
        *OFF_AT_INFERENCE,
        *NORMALISING,
        layers.Activation,
        layers.ReLU,
        layers.MaxPooling2D,
        layers.Add,
    )
    reason = None
    if _kind(layer) not in supported:
        reason = f"only {', '.join(kind.__name__ for kind in supported)} are converted"
    elif getattr(layer, "data_format", "channels_last") != "channels_last":
        reason = "channels must come last"
    elif getattr(layer, "quantization_mode", None):
        reason = "its weights are quantised; convert the model before quantising it"
    elif getattr(layer, "groups", 1) != 1:
        reason = "grouped convolutions have no spiking form here"
    elif _kind(layer) is layers.ReLU and (
        layer.max_value is not None or layer.negative_slope or layer.threshold
    ):
        reason = "max_value, negative_slope and threshold have no spiking form"
    elif _kind(layer) in NORMALISING and layer.axis % rank != rank - 1:
        reason = "the last axis must be the normalised one"
    if reason:
        raise ValueError(
            f"{layer.name} ({type(layer).__name__}) cannot be converted: {reason}"
        )


def _weights(layer):
    """[kernel, bias or None]."""
    bias = None if layer.bias is None else _numpy(layer.bias)
    return [_numpy(layer.kernel), bias]


def _numpy(weight):
    return ops.convert_to_numpy(weight).astype("float64")


def _inference_scale(layer):
    """[w, b] such that batch normalisation at inference is w x + b."""
    scale = 1.0 / np.sqrt(_numpy(layer.moving_variance) + layer.epsilon)
    if layer.scale:
        scale = scale * _numpy(layer.gamma)
    shift = -_numpy(layer.moving_mean) * scale
    if layer.center:
        shift = shift + _numpy(layer.beta)
    return [scale, shift]


def _fold(nodes):
    """Takes batch norms into the weights before them, where nothing else reads those.

    W <- W γ / sqrt(σ² + ε),  b <- (b - μ) γ / sqrt(σ² + ε) + β.
    """
    readers = Counter(source for node in nodes for source in node.sources)
    replaced = {}
    for node in nodes:
        node.sources = [replaced.get(source, source) for source in node.sources]
        if node.kind != "scale":
            continue
        (before,) = node.sources
        if before.kind == "weighted" and readers[before] == 1:
            scale, shift = node.weights
            kernel, bias = before.weights
            bias = 0.0 if bias is None else bias
            before.weights = [_times(before, kernel, 1.0, scale), bias * scale + shift]
            replaced[node] = before
            readers[before] = readers[node]
    return [node for node in nodes if node not in replaced]


def _times(node, kernel, before, after):
    """The kernel of a node times `before` per input and `after` per output channel."""
    inputs = np.broadcast_to(before, node.sources[0].shape[-1])
    outputs = np.broadcast_to(after, node.shape[-1])
    if _kind(node.layer) is layers.DepthwiseConv2D:  # (h, w, inputs, multiplier)
        return kernel * inputs[:, None] * outputs.reshape(len(inputs), -1)
    return kernel * inputs[:, None] * outputs


def _with_scaled_input(nodes):
    """Sets a scale of one behind an input that meets a neuron without any weights.

    The input is in its own units, a neuron's current in units of λ.
    """
    start = nodes[0]
    groups = _groups(nodes)
    if not any(n.kind == "relu" and groups[n] == groups[start] for n in nodes):
        return nodes
    channels = start.shape[-1]
    unit = Node(
        "scale", [start], start.shape, None, [np.ones(channels), np.zeros(channels)]
    )
    for node in nodes:
        node.sources = [unit if source is start else source for source in node.sources]
    return [start, unit, *nodes[1:]]


def _groups(nodes):
    """Node -> a number; nodes of one number share one λ.

    Only weights change the unit of a signal. A neuron fires in units of its own
    input, and what meets in an addition has one unit.
    """
    groups = {}
    for number, node in enumerate(nodes):
        groups[node] = number
        if node.kind in ("input", "weighted", "scale"):
            continue
        joined = {groups[source] for source in node.sources}
        groups = {n: number if g in joined else g for n, g in groups.items()}
    return groups


def _scales(nodes, activations, percentile, per_channel, threshold):
    """Node -> λ of its signal, a number or one for each channel.

    λ is the percentile of the activations above zero, the largest of a group.
    """
    groups, found = _groups(nodes), {}
    for node, values in activations.items():
        values = values.reshape(-1, values.shape[-1])
        parts = values.T if per_channel else [values]
        above = [part[part > 0] for part in parts]
        found[node] = threshold * np.array(
            [np.percentile(part, percentile) if part.size else 1.0 for part in above]
        )

    def scale(node):
        members = [found[n] for n in found if groups[n] == groups[node]]
        if not members:
            return 1.0
        if len({len(m) for m in members}) > 1 or len(members[0]) == 1:
            return float(max(m.max() for m in members))
        largest = np.max(members, axis=0)
        return np.tile(largest, node.shape[-1] // len(largest))

    return {node: scale(node) for node in nodes}


def _normalise(nodes, scales):
    """Weights for signals in units of λ: W <- W λ_in / λ_out, b <- b / λ_out."""
    for node in nodes:
        if not node.weights:
            continue
        before, after = scales[node.sources[0]], scales[node]
        kernel, bias = node.weights
        if node.kind == "scale":
            kernel = kernel * before / after
        else:
            kernel = _times(node, kernel, before, 1.0 / np.asarray(after))
        node.weights = [kernel, None if bias is None else bias / after]


def _wire(nodes, neuron, pool):
    """(input, node -> symbolic output) of a network with the weights of the nodes.

    Args:
        nodes: in the order they are computed.
        neuron: (node, its currents, name) -> what it sends on.
        pool: (node, its input, pooling layer) -> what it sends on.
    """
    inputs = Input(nodes[0].shape[1:], name="inputs")
    values, used = {nodes[0]: inputs}, Counter()
    for node in nodes[1:]:
        x = [values[source] for source in node.sources]
        x = x if node.kind == "add" else x[0]
        name = node.layer.name if node.layer else "scale"
        used[name] += 1
        name = name if used[name] == 1 else f"{name}_{used[name]}"
        if node.kind == "relu":
            values[node] = neuron(node, x, f"{name}_neurons")
            continue
        layer = _copy(node, name)
        if node.kind == "max":
            values[node] = pool(node, x, layer)
            continue
        values[node] = layer(x)
        if node.weights:
            layer.set_weights([w for w in node.weights if w is not None])
    return inputs, values


def _copy(node, name):
    """A layer for the node, in float32 and not trained, its weights not yet set."""
    common = dict(name=name, dtype="float32", trainable=False)
    if node.kind == "scale":
        return ChannelScale(**common)
    if node.kind == "weighted":
        common |= dict(activation=None, use_bias=node.weights[1] is not None)
    kept = ["units", "filters", "kernel_size", "strides", "padding", "dilation_rate"]
    kept += ["depth_multiplier", "pool_size", "keepdims"]
    config = node.layer.get_config()
    return type(node.layer)(**{k: config[k] for k in kept if k in config}, **common)


def fold_batch_norm(model: keras.Model) -> keras.Model:
    """The network that conversion starts from, as an ANN: the same function.

    Args:
        model: a trained model as `convert` takes.

    Returns:
        A functional model without dropout, batch norm inside the weights before it,
        and without the softmax of the output.

    Raises:
        ValueError: as `convert`.
    """
    return _rectified(_fold(_nodes(model)))[0]


def _rectified(nodes):
    """The ReLU network of the nodes, and its ReLU nodes with their outputs."""
    nodes = _without_softmax(nodes)
    inputs, values = _wire(
        nodes,
        neuron=lambda node, x, name: layers.ReLU(name=name, dtype="float32")(x),
        pool=lambda node, x, layer: layer(x),
    )
    outputs = {node: values[node] for node in nodes if node.kind == "relu"}
    return keras.Model(inputs, values[nodes[-1]]), outputs


def _without_softmax(nodes):
    return nodes[:-1] if nodes[-1].kind == "softmax" else nodes


def _step_model(nodes, thresholds, reset, v_init):
    """One time step: (current, states) -> (output, states), all of it symbolic."""
    states, updates = [], []

    def state(x, name):
        states.append(Input(x.shape[1:], name=f"{name}_{len(states)}"))
        return states[-1]

    def neuron(node, currents, name):
        fire = IntegrateAndFire(
            thresholds[node], reset, v_init, name=name, dtype="float32"
        )
        membranes, counts = state(currents, "membranes"), state(currents, "counts")
        spikes, *updated = fire(currents, membranes, counts)
        updates.extend(updated)
        return spikes

    def pool(node, x, layer):
        # The winner of a window is the input that has sent most. When it sends, the
        # largest sum grows by as much; when others send, it does not grow.
        before = state(x, "totals")
        after = layers.Add(dtype="float32")([before, x])
        updates.append(after)
        return layers.Subtract(dtype="float32")([layer(after), layer(before)])

    inputs, values = _wire(nodes, neuron, pool)
    outputs = [values[nodes[-1]], *updates]
    return keras.Model([inputs, *states], outputs, name="step")


def convert(
    model: keras.Model,
    calibration_data,
    *,
    num_timesteps: Size = 64,
    threshold: Positive = 1.0,
    percentile: Percentile = 99.9,
    per_channel: bool = False,
    mode: Mode = "threshold",
    reset: Reset = "subtract",
    v_init: Fraction = 0.5,
    input_coding: Coding = "constant",
    batch_norm: BatchNorm = "fold",
    return_all_steps: bool = False,
    seed: int | None = None,
) -> EdificeModel:
    """A trained ReLU network as a spiking network with the same input and output.

    Args:
        model: functional or sequential model of Dense, Conv2D, DepthwiseConv2D,
            BatchNormalization, ReLU, pooling, Flatten, Dropout and Add layers, with
            or without a softmax at the end, or of models of those.
        calibration_data: inputs as `model.predict` takes them, some hundreds, for λ.
        num_timesteps: T; the error of a rate falls as 1 / T.
        threshold: factor on every λ; above 1 it leaves room, below it clips.
        percentile: of a layer's activations above zero that is λ; 100 clips none.
        per_channel: a λ for each channel, not for each layer.
        mode: "threshold" keeps the weights and fires at θ = λ, "weight" puts λ into
            the weights and fires at 1; the spikes are the same.
        reset: "subtract", or "zero", whose rates stay too low however large T is.
        v_init: membrane at the start as a part of θ.
        input_coding: "constant" current or "poisson" spikes, at inference too.
        batch_norm: "fold" into the weights before it, or "keep" as a layer.
        return_all_steps: give the output after each step, (batch, T, outputs).
        seed: of the Poisson spikes.

    Returns:
        A model for inference; none of its weights is trained.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of range, or a layer that has no spiking form.
    """
    options = {**locals()}
    for name, parameter in inspect.signature(convert).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            check(parameter.annotation, name, options[name])
    everything = _nodes(model)
    nodes = _without_softmax(everything)
    if batch_norm == "fold":
        nodes = _fold(nodes)
    nodes = _with_scaled_input(nodes)
    scales = _scales(
        nodes, _activations(nodes, calibration_data), percentile, per_channel, threshold
    )
    output_scale = 1.0
    if mode == "weight":
        _normalise(nodes, scales)
        output_scale = _plain(scales[nodes[-1]])
    thresholds = {n: 1.0 if mode == "weight" else _plain(scales[n]) for n in nodes}
    inputs = Input(nodes[0].shape[1:], name="inputs")
    outputs = SpikingNetwork(
        _step_model(nodes, thresholds, reset, v_init),
        num_timesteps,
        input_coding,
        output_scale,
        return_all_steps,
        seed=seed,
        name="spiking_network",
        dtype="float32",
    )(inputs)
    if everything[-1].kind == "softmax":
        outputs = layers.Softmax(name="probabilities", dtype="float32")(outputs)
    return EdificeModel(inputs, outputs, name=f"spiking_{model.name}")


def _activations(nodes, data):
    """ReLU node -> its activations on the data."""
    network, outputs = _rectified(nodes)
    if not outputs:
        return {}
    probe = keras.Model(network.inputs, list(outputs.values()))
    values = probe.predict(data, verbose=0)
    values = values if isinstance(values, list) else [values]
    return dict(zip(outputs, values, strict=True))


def _plain(scale):
    return scale if isinstance(scale, float) else [float(value) for value in scale]


def evaluate_conversion(
    ann: keras.Model, snn: keras.Model, data, timesteps: list[int] | None = None
) -> dict:
    """How near a conversion comes, and what it costs, for each number of steps.

    Args:
        ann: the trained model.
        snn: what `convert` made of it.
        data: (inputs, labels); labels as class numbers or one-hot.
        timesteps: numbers of steps to try; None is that of `snn`.

    Returns:
        `ann_accuracy`, `ann_operations` (multiplications of one example) and, with a
        value for each of `timesteps`, `snn_accuracy`, `agreement` (part of the
        examples where both choose the same class), `firing_rates` (layer -> spikes of
        a neuron in a step) and `synaptic_operations` (spikes times the connections
        that they reach, of one example; with max pooling an upper bound, where each
        spike counts as passed on).
    """
    x, labels = data
    labels = np.asarray(labels)
    labels = labels.argmax(-1) if labels.ndim > 1 else labels
    network = snn.get_layer("spiking_network")
    timesteps = [network.num_timesteps] if timesteps is None else list(timesteps)
    expected = ann.predict(x, verbose=0).argmax(-1)
    nodes = _without_softmax(_nodes(ann))
    reach = _connections(nodes)
    neurons = [node for node in nodes if node.kind == "relu"]
    report = dict(
        ann_accuracy=float(np.mean(expected == labels)),
        ann_operations=float(sum(_multiplications(node) for node in nodes)),
        timesteps=timesteps,
        snn_accuracy=[],
        agreement=[],
        firing_rates=[],
        synaptic_operations=[],
    )
    for steps in timesteps:
        outputs = _with_counts(snn, steps).predict(x, verbose=0)
        chosen = outputs.pop("outputs").argmax(-1)
        counts = [outputs[k] for k in sorted(outputs, key=_number)]
        report["snn_accuracy"].append(float(np.mean(chosen == labels)))
        report["agreement"].append(float(np.mean(chosen == expected)))
        report["firing_rates"].append(
            {
                node.layer.name: float(count.mean() / steps)
                for node, count in zip(neurons, counts, strict=True)
            }
        )
        operations = sum(
            (count * reach[node]).sum()
            for node, count in zip(neurons, counts, strict=True)
        )
        report["synaptic_operations"].append(float(operations / len(labels)))
    return report


def _number(name):
    return int(name.rpartition("_")[2])


def _with_counts(snn, num_timesteps):
    """The spiking network with another number of steps, and its spike counts."""
    network = snn.get_layer("spiking_network")
    changed = dict(
        num_timesteps=num_timesteps, return_counts=True, return_all_steps=False
    )
    config = {**network.get_config(), **changed, "step_model": network.step_model}
    inputs = Input(snn.inputs[0].shape[1:])
    return keras.Model(inputs, SpikingNetwork(**config)(inputs))


def _connections(nodes):
    """Node -> the number of connections that one spike of each of its units reaches."""
    reach = {node: np.zeros(node.shape[1:]) for node in nodes}
    for node in reversed(nodes):
        for source in node.sources:
            reach[source] = reach[source] + np.broadcast_to(
                _reach(node, reach[node], source.shape[1:]), source.shape[1:]
            )
    return reach


def _multiplications(node):
    if node.kind != "weighted":
        return 0.0
    shape = node.sources[0].shape[1:]
    return np.broadcast_to(_reach(node, None, shape), shape).sum()


def _reach(node, beyond, shape):
    """Connections from one unit before `node`, whose own units reach `beyond`."""
    if node.kind in ("relu", "add"):
        return np.ones(shape) if node.kind == "relu" else beyond
    if node.kind == "scale":
        return beyond + 1.0
    if _kind(node.layer) is layers.Dense:
        return np.full(shape, float(node.shape[-1]))
    if _kind(node.layer) is layers.Flatten:
        return beyond.reshape(shape)
    if _kind(node.layer) is layers.GlobalAveragePooling2D:
        return beyond
    rows, columns = (_windows(node, shape, axis) for axis in (0, 1))
    if node.kind == "weighted":
        covered = rows.sum(0)[:, None, None] * columns.sum(0)[:, None]
        depthwise = _kind(node.layer) is layers.DepthwiseConv2D
        return covered * (
            node.layer.depth_multiplier if depthwise else node.layer.filters
        )
    return np.einsum("oh,pw,opc->hwc", rows, columns, beyond)


def _windows(node, shape, axis):
    """(outputs, inputs) along an axis of an image: 1 where a window holds an input."""
    layer, length, count = node.layer, shape[axis], node.shape[1 + axis]
    size = (layer.kernel_size if node.kind == "weighted" else layer.pool_size)[axis]
    dilation = layer.dilation_rate[axis] if node.kind == "weighted" else 1
    span = (count - 1) * layer.strides[axis] + (size - 1) * dilation + 1
    before = max(span - length, 0) // 2 if layer.padding == "same" else 0
    windows = np.zeros((count, length))
    for output in range(count):
        for place in range(size):
            i = output * layer.strides[axis] + place * dilation - before
            if 0 <= i < length:
                windows[output, i] = 1.0
    return windows


@keras.saving.register_keras_serializable("keras_edifice")
class ANN2SNNModel(EdificeModel):
    """A ReLU network that knows how it is to be converted."""

    def convert(self, calibration_inputs, **overrides) -> EdificeModel:
        """The spiking form of this model, trained or not.

        Args:
            calibration_inputs: inputs for λ, some hundreds of examples.
            **overrides: options of `convert` other than those of this model.

        Returns:
            The spiking model.

        Raises:
            TypeError: unknown option, or one of the wrong type.
            ValueError: an option out of range.
        """
        known = inspect.signature(convert).parameters
        options = {k: v for k, v in self.options.items() if k in known}
        return convert(self, calibration_inputs, **{**options, **overrides})


@architecture(
    paper="Diehl et al. 2015, Fast-classifying, high-accuracy spiking deep networks "
    "through weight and threshold balancing, IJCNN",
    kind="vector",
    inputs="(batch, input_size)",
    outputs="(batch, num_classes | output_size)",
    tiny=dict(input_size=5, output_size=3, hidden_sizes=[8, 6], num_timesteps=7),
)
def ann2snn(
    *,
    input_size: Size,
    output_size: Size,
    hidden_sizes: list[Size] = [256, 128],
    num_timesteps: Size = 64,
    threshold: Positive = 1.0,
    percentile: Percentile = 99.9,
    per_channel: bool = False,
    mode: Mode = "threshold",
    reset: Reset = "subtract",
    v_init: Fraction = 0.5,
    input_coding: Coding = "constant",
    batch_norm: BatchNorm = "fold",
    num_classes: Size | None = None,
    classifier_activation: Activation | None = "softmax",
) -> ANN2SNNModel:
    """A ReLU network to train as usual; `model.convert(inputs)` then makes it spike.

    Args:
        input_size: features of each example.
        output_size: width of the last layer, which has no ReLU.
        hidden_sizes: width of each ReLU layer.
        num_timesteps: steps of the spiking network.
        threshold: factor on the largest activation λ that a rate can stand for.
        percentile: of a layer's activations above zero that is λ; 100 clips none.
        per_channel: a λ for each neuron, not for each layer.
        mode: where λ goes when converted: the thresholds or the weights.
        reset: what a spike does to the membrane: takes the threshold off, or sets it
            to zero, which does not converge.
        v_init: membrane at the start as a part of the threshold.
        input_coding: the input as a constant current or as Poisson spikes.
        batch_norm: fold a batch norm into the weights before it, or keep it.
        num_classes: classes of the head; None gives the features.
        classifier_activation: of the head; None gives logits.
    """
    inputs = Input((input_size,), name="inputs")
    x = dense_stack(inputs, hidden_sizes, "relu")
    x = Dense(output_size, name="features")(x)
    if num_classes is not None:
        x = class_scores(x, num_classes, classifier_activation)
    return ANN2SNNModel(inputs, x, name="ann2snn")
