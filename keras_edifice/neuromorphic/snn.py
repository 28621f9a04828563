"""Spiking network: leaky integrate-and-fire neurons, trained by surrogate gradients.

    U[t] = β U[t-1] + I[t] - S[t-1] θ,    S[t] = H(U[t] - θ),    I[t] = W S_in[t] + b

Layer l+1 sees the spikes of layer l in the same step, and nothing flows back, so each
layer runs over all of time before the next one starts: W multiplies all steps at once
and the loop over time is elementwise. `ops/spikes.py` has the gradient of H.
"""

import math
from typing import Literal

import keras
import numpy as np
from keras import Input, initializers, layers, ops

from keras_edifice.blocks.composite import Composite
from keras_edifice.blocks.dense import Dense
from keras_edifice.model import EdificeModel
from keras_edifice.ops.spikes import spike
from keras_edifice.ops.step_scan import step_scan
from keras_edifice.ops.tracing import exporting
from keras_edifice.options import Fraction, Positive, Size
from keras_edifice.registry import architecture

SILENT = 0.01  # smallest input that charges a latency-coding neuron to its threshold
RESOLUTION = 1e-7  # how far above SILENT an input is told from it


def spiking_dense(units, beta, threshold, name):
    """A Dense layer whose currents let the neurons behind it fire.

    A constant current I charges a neuron to I / (1 - β), so the mean current starts
    at θ (1 - β): a neuron fires where its inputs add anything to that.
    """
    rest = threshold * (1.0 - beta) or threshold
    return Dense(
        units,
        kernel_initializer=initializers.VarianceScaling(2.0 * rest**2, "fan_in"),
        bias_initializer=initializers.Constant(rest),
        name=name,
    )


@keras.saving.register_keras_serializable("keras_edifice")
class LeakyIntegrator(Composite):
    """Currents (batch, time, units) -> membranes of the same shape. Causal, linear.

    U[t] = β U[t-1] + I[t], the read-out that does not spike.

    Args:
        beta: part of the membrane that is left after a step.
        learn_beta: whether β, one for all units, is trained; it is kept in 0 to 1.
    """

    def __init__(self, beta=0.9, learn_beta=False, **kwargs):
        super().__init__(**kwargs)
        self.beta, self.learn_beta = beta, learn_beta

    def build(self, input_shape):
        self.units = input_shape[-1]
        if self.learn_beta:
            initializer = initializers.Constant(self.beta)
            self.decay = self.add_weight((), initializer, name="beta")

    def initial_state(self, batch_size):
        """[membranes], at rest."""
        return [ops.zeros((batch_size, self.units), dtype="float32")]

    def step(self, currents, state):
        """(batch, units), [membranes] -> (membranes, [membranes])."""
        membranes = self._leak() * state[0] + ops.cast(currents, "float32")
        return membranes, [membranes]

    def call(self, currents, initial_state=None):
        state = initial_state or self.initial_state(ops.shape(currents)[0])
        membranes, _ = step_scan(self.step, ops.cast(currents, "float32"), state)
        return ops.cast(membranes, currents.dtype)

    def _leak(self):
        """β, a number or a weight."""
        if not self.learn_beta:
            return self.beta
        return ops.clip(ops.cast(self.decay, "float32"), 0.0, 1.0)

    def compute_output_shape(self, currents_shape, initial_state_shape=None):
        return tuple(currents_shape)


@keras.saving.register_keras_serializable("keras_edifice")
class LIFSpike(LeakyIntegrator):
    """Currents (batch, time, units) -> spikes, 0 or 1, of the same shape. Causal.

    U[t] = β U[t-1] + I[t] - S[t-1] θ ("subtract"), β (1 - S[t-1]) U[t-1] + I[t]
    ("zero"), β U[t-1] + I[t] ("none"). S[t] = H(U[t] - θ).

    Args:
        beta: part of the membrane that is left after a step.
        threshold: membrane above which a neuron fires.
        reset: what a spike does to the membrane: "subtract", "zero" or "none".
        reset_delay: reset in the step after the spike; False resets in the same step.
        surrogate: slope of the gradient: "atan", "fast_sigmoid" or "sigmoid".
        surrogate_slope: how narrow it is; None is 2 for "atan", 25 for the others.
        learn_beta: whether β, one for all units, is trained; it is kept in 0 to 1.
        learn_threshold: whether θ, one for all units, is trained.
        detach_reset: no gradient through the reset.
        recurrent: spikes come back one step later, through a matrix, as currents.
        return_membranes: give (spikes, membranes).
    """

    def __init__(
        self,
        beta=0.9,
        threshold=1.0,
        reset="subtract",
        reset_delay=True,
        surrogate="atan",
        surrogate_slope=None,
        learn_beta=False,
        learn_threshold=False,
        detach_reset=True,
        recurrent=False,
        return_membranes=False,
        **kwargs,
    ):
        super().__init__(beta, learn_beta, **kwargs)
        self.threshold, self.learn_threshold = threshold, learn_threshold
        self.reset, self.reset_delay = reset, reset_delay
        self.surrogate, self.surrogate_slope = surrogate, surrogate_slope
        self.detach_reset, self.recurrent = detach_reset, recurrent
        self.return_membranes = return_membranes

    def build(self, input_shape):
        super().build(input_shape)
        if self.learn_threshold:
            initializer = initializers.Constant(self.threshold)
            self.level = self.add_weight((), initializer, name="threshold")
        if self.recurrent:
            self.feedback = Dense(
                self.units, use_bias=False, dtype=self.dtype_policy, name="feedback"
            )
            self.feedback.build((None, self.units))

    def initial_state(self, batch_size):
        """[membranes, spikes of the step before], at rest and silent."""
        return [ops.zeros((batch_size, self.units), dtype="float32") for _ in range(2)]

    def step(self, currents, state):
        """(batch, units), state -> (spikes, state)."""
        membranes, before = state
        leak, threshold = self._leak(), self._level()
        currents = ops.cast(currents, "float32")
        if self.recurrent:
            currents = currents + ops.cast(self.feedback(before), "float32")
        if self.reset_delay:
            membranes = self._after(before, leak, membranes, threshold) + currents
            spikes = self._fire(membranes - threshold)
        else:
            membranes = leak * membranes + currents
            spikes = self._fire(membranes - threshold)
            membranes = self._after(spikes, 1.0, membranes, threshold)
        return spikes, [membranes, spikes]

    def call(self, currents, initial_state=None):
        state = initial_state or self.initial_state(ops.shape(currents)[0])

        def step(x, state):
            spikes, state = self.step(x, state)
            return ops.concatenate([spikes, state[0]], axis=-1), state

        both, _ = step_scan(step, ops.cast(currents, "float32"), state)
        spikes, membranes = ops.split(ops.cast(both, currents.dtype), 2, axis=-1)
        return (spikes, membranes) if self.return_membranes else spikes

    def _level(self):
        """θ, a number or a weight."""
        if not self.learn_threshold:
            return self.threshold
        return ops.cast(self.level, "float32")

    def _after(self, spikes, leak, membranes, threshold):
        """What leak and reset leave of the membranes."""
        if self.detach_reset:
            spikes = ops.stop_gradient(spikes)
        if self.reset == "subtract":
            return leak * membranes - spikes * threshold
        if self.reset == "zero":
            return leak * ((1.0 - spikes) * membranes)
        return leak * membranes

    def _fire(self, above):
        return spike(above, self.surrogate, self.surrogate_slope)

    def compute_output_shape(self, currents_shape, initial_state_shape=None):
        shape = tuple(currents_shape)
        return (shape, shape) if self.return_membranes else shape


@keras.saving.register_keras_serializable("keras_edifice")
class SpikeEncoding(layers.Layer):
    """(batch, features) -> (batch, num_timesteps, features).

    "constant" repeats the vector. "rate" draws spikes with the inputs as
    probabilities, at inference too; its gradient is that of the mean, which is the
    input. "latency" spikes once, at t = ln(x / (x - 0.01)), the time that a neuron
    takes to charge, scaled so that inputs of 0.01 and below spike in the last step;
    "linear_latency" at t = 1 - x of the last step. All but "constant" take inputs
    outside 0 to 1 as 0 or 1.

    Args:
        encoding: one of the four.
        num_timesteps: number of steps.
        seed: of the spikes that are drawn.
    """

    def __init__(self, encoding, num_timesteps, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.encoding, self.num_timesteps, self.seed = encoding, num_timesteps, seed
        if encoding == "rate":
            self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, x):
        if self.encoding != "constant":
            x = ops.clip(x, 0.0, 1.0)
        if "latency" in self.encoding:
            return self._at(self._spike_times(ops.cast(x, "float32")), x.dtype)
        x = ops.repeat(ops.expand_dims(x, 1), self.num_timesteps, axis=1)
        return self._draw(x) if self.encoding == "rate" else x

    def _draw(self, rates):
        if exporting() == "onnx":
            raise ValueError(
                "encoding='rate' draws random numbers, which an ONNX file cannot; "
                "build the model with encoding='constant' to export it"
            )
        draws = keras.random.uniform(ops.shape(rates), seed=self.seed_generator)
        spikes = ops.cast(draws < ops.cast(rates, "float32"), rates.dtype)
        return ops.stop_gradient(spikes) + (rates - ops.stop_gradient(rates))

    def _spike_times(self, x):
        """Step of each input's only spike, not yet rounded."""
        last = self.num_timesteps - 1
        if self.encoding == "linear_latency":
            return last * (1.0 - ops.maximum(x, SILENT))
        x = ops.maximum(x, SILENT + RESOLUTION)
        longest = math.log((SILENT + RESOLUTION) / RESOLUTION)
        return ops.log(x / (x - SILENT)) * (last / longest)

    def _at(self, times, dtype):
        steps = np.arange(self.num_timesteps, dtype="float32")[:, None]
        times = ops.expand_dims(ops.round(times), 1)  # (b, 1, d)
        return ops.cast(ops.equal(times, ops.convert_to_tensor(steps)), dtype)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.num_timesteps, *input_shape[1:])


@keras.saving.register_keras_serializable("keras_edifice")
class SpikeDecoding(layers.Layer):
    """(batch, time, units) -> (batch, units).

    Of spikes: "rate", their mean, and "first_spike", the number of steps before the
    first one, all steps if there is none. Of membranes: "membrane", their sum over
    the number of steps, "last_membrane" and "max_membrane".

    Args:
        decoding: one of the five.
    """

    def __init__(self, decoding, **kwargs):
        super().__init__(**kwargs)
        self.decoding = decoding

    def call(self, x):
        dtype, x = x.dtype, ops.cast(x, "float32")
        if self.decoding == "first_spike":
            x = ops.sum(_silent_so_far(x), axis=1)
        elif self.decoding == "last_membrane":
            x = x[:, -1]
        elif self.decoding == "max_membrane":
            x = ops.max(x, axis=1)
        else:
            x = ops.mean(x, axis=1)
        return ops.cast(x, dtype)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], *input_shape[2:])


def _silent_so_far(spikes):
    """Product of 1 - S over this and all steps before, by doubling its reach."""
    silent, reach = 1.0 - spikes, 1
    while reach < spikes.shape[1]:
        earlier = ops.pad(
            silent[:, :-reach], [[0, 0], [reach, 0], [0, 0]], constant_values=1.0
        )
        silent, reach = silent * earlier, 2 * reach
    return silent


@architecture(
    paper="Neftci et al. 2019, Surrogate Gradient Learning in Spiking Neural Networks, "
    "arXiv:1901.09948",
    kind="vector",
    inputs="(batch, input_size)",
    outputs="(batch, output_size)",
    tiny=dict(input_size=3, output_size=4, hidden_sizes=[9, 7], num_timesteps=16),
)
def snn(
    *,
    input_size: Size,
    output_size: Size,
    hidden_sizes: list[Size] = [256, 128],
    num_timesteps: Size = 25,
    tau: Positive = 2.0,
    beta: Fraction | None = None,
    threshold: Positive = 1.0,
    reset: Literal["subtract", "zero", "none"] = "subtract",
    reset_delay: bool = True,
    encoding: Literal["constant", "rate", "latency", "linear_latency"]
    | None = "constant",
    decoding: Literal[
        "membrane", "last_membrane", "max_membrane", "rate", "first_spike"
    ] = "membrane",
    surrogate: Literal["atan", "fast_sigmoid", "sigmoid"] = "atan",
    surrogate_slope: Positive | None = None,
    learn_beta: bool = False,
    learn_threshold: bool = False,
    detach_reset: bool = True,
    recurrent: bool = False,
    return_spikes: bool = False,
    seed: int | None = None,
) -> EdificeModel:
    """Layers of leaky integrate-and-fire neurons and a read-out.

    Args:
        input_size: features of each example, or of each step where encoding is None.
        output_size: width of the read-out.
        hidden_sizes: width of each spiking layer.
        num_timesteps: steps that an example is shown for.
        tau: time constant of the membranes in steps, β = exp(-1 / tau).
        beta: part of a membrane that is left after a step, in place of tau.
        threshold: membrane above which a neuron fires.
        reset: what a spike does to the membrane: takes the threshold off, sets it to
            zero, or nothing.
        reset_delay: reset in the step after the spike; False resets in the same step.
        encoding: vector to time: repeat it, draw spikes with its values as rates (in
            inference too, so that ONNX cannot hold it), or spike once, the sooner the
            larger; None takes spike trains (batch, num_timesteps, input_size).
        decoding: time to vector: mean, last or largest membrane of a read-out that
            does not spike, or the rate or the first spike's time of one that does.
        surrogate: slope that stands for the gradient of a spike.
        surrogate_slope: how narrow it is; None is 2 for atan and 25 for the others.
        learn_beta: train β, one for each layer.
        learn_threshold: train the threshold, one for each layer.
        detach_reset: no gradient through the reset.
        recurrent: the spikes of a layer come back to it one step later.
        return_spikes: give a dict of the outputs and, for each layer i, spikes_i and
            membranes_i, (batch, num_timesteps, size); a loss on spikes_i regulates
            how much the layer fires.
        seed: of the spikes that encoding="rate" draws.
    """
    beta = math.exp(-1.0 / tau) if beta is None else beta
    neurons = dict(
        threshold=threshold,
        reset=reset,
        reset_delay=reset_delay,
        surrogate=surrogate,
        surrogate_slope=surrogate_slope,
        learn_threshold=learn_threshold,
        detach_reset=detach_reset,
        recurrent=recurrent,
        return_membranes=True,
    )
    leak = dict(beta=beta, learn_beta=learn_beta)
    shape = (input_size,) if encoding else (num_timesteps, input_size)
    x = inputs = Input(shape, name="inputs")
    encode = SpikeEncoding(encoding or "constant", num_timesteps, seed, name="encoding")
    if encoding not in (None, "constant"):
        x = encode(x)
    traces = {}
    sizes = [*hidden_sizes, output_size]
    for i, size in enumerate(sizes):
        spiking = i < len(hidden_sizes) or decoding in ("rate", "first_spike")
        name = f"dense_{i}"
        x = (
            spiking_dense(size, beta, threshold, name)
            if spiking
            else Dense(size, name=name)
        )(x)
        if i == 0 and encoding == "constant":  # a repeated vector, repeated currents
            x = encode(x)
        if spiking:
            x, membranes = LIFSpike(**leak, **neurons, name=f"spikes_{i}")(x)
            traces |= {f"spikes_{i}": x, f"membranes_{i}": membranes}
        else:
            x = LeakyIntegrator(**leak, name=f"membranes_{i}")(x)
            traces[f"membranes_{i}"] = x
    x = SpikeDecoding(decoding, name="decoding")(x)
    outputs = {"outputs": x, **traces} if return_spikes else x
    return EdificeModel(inputs, outputs, name="snn")
