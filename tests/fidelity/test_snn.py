import keras
import numpy as np
import pytest
import snntorch
import torch
from snntorch import spikegen, surrogate

import keras_edifice
from keras_edifice.neuromorphic.snn import LIFSpike, SpikeEncoding
from tests.support.close import difference
from tests.support.gradients import gradients

rng = np.random.default_rng(0)

SURROGATES = dict(
    atan=lambda: surrogate.atan(2.0),
    fast_sigmoid=lambda: surrogate.fast_sigmoid(25.0),
    sigmoid=lambda: surrogate.sigmoid(25.0),
)


def total(outputs):
    flat = keras.tree.flatten(outputs)
    return sum(keras.ops.sum(keras.ops.square(y)) for y in flat)


def peer_layer(x, spike_grad="atan", recurrent=None, **options):
    """(spikes, membranes) of snntorch over (batch, time, units), and its neuron."""
    options = dict(beta=0.9, threshold=1.0, reset_mechanism="subtract", **options)
    options["spike_grad"] = SURROGATES[spike_grad]()
    if recurrent is None:
        neuron = snntorch.Leaky(**options)
    else:
        neuron = snntorch.RLeaky(linear_features=x.shape[-1], **options)
        neuron.recurrent.weight.data = torch.tensor(recurrent.T)
        neuron.recurrent.bias.data.zero_()
    mem, spk = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0])
    spikes, membranes = [], []
    for t in range(x.shape[1]):
        state = (mem,) if recurrent is None else (spk, mem)
        spk, mem = neuron(x[:, t], *state)
        spikes.append(spk)
        membranes.append(mem)
    return torch.stack(spikes, 1), torch.stack(membranes, 1), neuron


def compare(layer, x, **options):
    """(forward, gradient) differences of a layer and snntorch."""
    theirs = torch.tensor(x, requires_grad=True)
    spikes, membranes, neuron = peer_layer(theirs, **options)
    wanted = [theirs] + ([neuron.recurrent.weight] if "recurrent" in options else [])
    wanted += [neuron.beta, neuron.threshold] if options.get("learn_beta") else []
    by_input, *by_weight = torch.autograd.grad(total([spikes, membranes]), wanted)
    ours = layer(x)
    weights, inputs = gradients(layer, x, total)
    if "recurrent" in options:
        by_weight[0] = by_weight[0].T
        weights = weights[-1:] + weights[:-1]
    assert spikes.sum() > 10
    forward = max(
        difference(a, b.detach())
        for a, b in zip(ours, (spikes, membranes), strict=True)
    )
    backward = [difference(inputs, by_input)]
    backward += [difference(a, b) for a, b in zip(weights, by_weight, strict=True)]
    return forward, max(backward)


def layer_for(x, **options):
    layer = LIFSpike(beta=0.9, return_membranes=True, **options)
    layer.build(x.shape)
    return layer


@pytest.mark.parametrize("spike_grad", list(SURROGATES))
@pytest.mark.parametrize("reset", ["subtract", "zero", "none"])
def test_layer_with_every_reset_and_surrogate(reset, spike_grad):
    x = rng.normal(0.3, 0.5, size=(4, 30, 6)).astype("float32")
    theirs = torch.tensor(x, requires_grad=True)
    neuron = snntorch.Leaky(
        beta=0.9, reset_mechanism=reset, spike_grad=SURROGATES[spike_grad]()
    )
    mem, trace = torch.zeros(4, 6), []
    for t in range(30):
        spk, mem = neuron(theirs[:, t], mem)
        trace.append((spk, mem))
    spikes, membranes = (torch.stack(parts, 1) for parts in zip(*trace, strict=True))
    layer = layer_for(x, reset=reset, surrogate=spike_grad)
    ours = layer(x)
    assert difference(ours[0], spikes.detach()) == 0
    assert difference(ours[1], membranes.detach()) < 1e-5
    (expected,) = torch.autograd.grad(total([spikes, membranes]), [theirs])
    assert difference(gradients(layer, x, total)[1], expected) < 1e-4


def test_reset_in_the_same_step():
    # Currents below the threshold: above it the peer resets twice.
    x = rng.uniform(0.0, 0.9, size=(4, 30, 6)).astype("float32")
    for reset in ("subtract", "zero"):
        layer = layer_for(x, reset=reset, reset_delay=False, detach_reset=False)
        theirs = torch.tensor(x, requires_grad=True)
        neuron = snntorch.Leaky(
            beta=0.9,
            reset_mechanism=reset,
            reset_delay=False,
            spike_grad=surrogate.atan(2.0),
        )
        mem, trace = torch.zeros(4, 6), []
        for t in range(30):
            spk, mem = neuron(theirs[:, t], mem)
            trace.append((spk, mem))
        spikes, membranes = (torch.stack(p, 1) for p in zip(*trace, strict=True))
        ours = layer(x)
        assert difference(ours[0], spikes.detach()) == 0
        assert difference(ours[1], membranes.detach()) < 1e-5
        (expected,) = torch.autograd.grad(total([spikes, membranes]), [theirs])
        assert difference(gradients(layer, x, total)[1], expected) < 1e-4


def test_recurrent_layer_and_learned_neuron():
    x = rng.normal(0.3, 0.5, size=(4, 20, 6)).astype("float32")
    layer = layer_for(x, learn_beta=True, learn_threshold=True)
    forward, gradient = compare(layer, x, learn_beta=True, learn_threshold=True)
    assert max(forward, gradient) < 1e-4
    kernel = rng.normal(0.0, 0.3, size=(6, 6)).astype("float32")
    layer = layer_for(x, recurrent=True)
    layer.feedback.kernel.assign(kernel)
    assert max(compare(layer, x, recurrent=kernel)) < 1e-4


@pytest.mark.parametrize("linear", [False, True])
def test_latency_encoding(linear):
    x = np.concatenate([[[0.0, 1.0, 0.0101, 0.5]], rng.uniform(size=(9, 4))])
    x = x.astype("float32")
    expected = spikegen.latency(
        torch.tensor(x), num_steps=25, normalize=True, linear=linear
    )
    encoding = "linear_latency" if linear else "latency"
    ours = SpikeEncoding(encoding, 25)(x)
    assert difference(ours, expected.transpose(0, 1)) == 0


def test_network(fidelity):
    model = keras_edifice.build(
        "snn", input_size=5, output_size=3, hidden_sizes=[16, 12], beta=0.9
    )
    random = np.random.default_rng(1)
    for weight in model.trainable_variables:
        weight.assign(0.4 * random.normal(size=weight.shape))
    x = random.normal(size=(6, 5)).astype("float32")
    theirs = torch.tensor(x, requires_grad=True)
    dense = [torch.nn.Linear(a, b) for a, b in ((5, 16), (16, 12), (12, 3))]
    for layer, kernel, bias in zip(
        dense, model.weights[::2], model.weights[1::2], strict=True
    ):
        layer.weight.data = torch.tensor(kernel.numpy().T)
        layer.bias.data = torch.tensor(bias.numpy())
    neurons = [
        snntorch.Leaky(
            beta=0.9, threshold=1.0, reset_mechanism=r, spike_grad=surrogate.atan(2.0)
        )
        for r in ("subtract", "subtract", "none")
    ]
    states, read_out = [neuron.reset_mem() for neuron in neurons], []
    for _ in range(25):
        signal = theirs
        for i, (layer, neuron) in enumerate(zip(dense, neurons, strict=True)):
            signal, states[i] = neuron(layer(signal), states[i])
        read_out.append(states[-1])
    expected = torch.stack(read_out, 1).mean(1)
    wanted = [p for layer in dense for p in (layer.weight, layer.bias)]
    *by_weight, by_input = torch.autograd.grad(total(expected), [*wanted, theirs])
    weights, inputs = gradients(model, x, total)
    by_weight = [g.T if g.ndim == 2 else g for g in by_weight]
    backward = [difference(a, b) for a, b in zip(weights, by_weight, strict=True)]
    fidelity.record(
        "snn",
        "snntorch.Leaky",
        forward=difference(model(x), expected.detach()),
        gradient=max(difference(inputs, by_input), *backward),
    )
