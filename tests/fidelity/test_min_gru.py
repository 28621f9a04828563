import keras
import numpy as np
import torch
from minGRU_pytorch.minGRU import minGRU

import keras_edifice
from tests.support.close import difference
from tests.support.gradients import gradients
from tests.support.shaking import shake

HIDDEN, LAYERS = 6, 2


class Stack(torch.nn.Module):
    """Their recurrences in the pre-norm residual stack, with the norms of PyTorch."""

    def __init__(self, kind, expand_factor):
        super().__init__()
        norms = [torch.nn.RMSNorm(HIDDEN, eps=1e-5) for _ in range(LAYERS + 1)]
        self.norms = torch.nn.ModuleList(norms)
        mixers = [kind(HIDDEN, expand_factor) for _ in range(LAYERS)]
        self.mixers = torch.nn.ModuleList(mixers)

    def forward(self, x):
        for norm, mixer in zip(self.norms, self.mixers, strict=False):
            x = x + mixer(norm(x))
        return self.norms[-1](x)


def pairs_of_weights(name, gates, ours, theirs):
    """(our variables, their parameter that holds them one after another), all."""
    for i, mixer in enumerate(theirs.mixers):
        layer = ours.get_layer(f"{name}_{i}")
        yield [ours.get_layer(f"{name}_{i}_norm").gamma], theirs.norms[i].weight
        kernels = [getattr(layer, gate).kernel for gate in ("candidate", *gates)]
        yield kernels, next(mixer.children()).weight
        if layer.out is not None:
            yield [layer.out.kernel], mixer.to_out.weight
    yield [ours.get_layer("final_norm").gamma], theirs.norms[-1].weight


def measured(name, kind, gates, expand_factor):
    """Largest difference of the outputs, and of the gradients."""
    keras.utils.set_random_seed(0)
    ours = keras_edifice.build(
        name,
        embed_size=HIDDEN,
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        expand_factor=expand_factor,
        return_sequences=True,
        window_size=19,
    )
    shake(ours)
    theirs = Stack(kind, expand_factor)
    weights = list(pairs_of_weights(name, gates, ours, theirs))
    assert sum(len(variables) for variables, _ in weights) == len(ours.weights)
    for variables, parameter in weights:
        value = np.concatenate([v.numpy().T for v in variables])
        assert parameter.shape == value.shape
        parameter.data.copy_(torch.tensor(value))
    x = np.random.default_rng(0).normal(size=(3, 19, HIDDEN)).astype("float32")
    by_weight, by_input = gradients(
        ours, x, lambda y: keras.ops.sum(keras.ops.square(y))
    )
    by_weight = {
        v.path: g for v, g in zip(ours.trainable_variables, by_weight, strict=True)
    }
    theirs_x = torch.tensor(x, requires_grad=True)
    outputs = theirs(theirs_x)
    outputs.square().sum().backward()
    pairs = [(by_input, theirs_x.grad.numpy())]
    for variables, parameter in weights:
        found = np.concatenate([by_weight[v.path].T for v in variables])
        pairs.append((found, parameter.grad.numpy()))
    forward = difference(ours(x), outputs.detach().numpy())
    return forward, max(difference(a, b) for a, b in pairs)


def test_min_gru_equals_that_of_min_gru_pytorch(fidelity):
    found = [measured("min_gru", minGRU, ["update_gate"], a) for a in (1.0, 1.5)]
    fidelity.record(
        "min_gru",
        "minGRU-pytorch minGRU, as wide as its input and wider",
        forward=max(forward for forward, _ in found),
        gradient=max(gradient for _, gradient in found),
    )


def test_carried_state_is_that_of_min_gru_pytorch():
    keras.utils.set_random_seed(0)
    ours = keras_edifice.layers.MinGRULayer()
    ours.build((None, None, HIDDEN))
    shake(ours)
    theirs = minGRU(HIDDEN)
    kernels = [ours.candidate.kernel, ours.update_gate.kernel]
    value = np.concatenate([v.numpy().T for v in kernels])
    theirs.to_hidden_and_gate.weight.data.copy_(torch.tensor(value))
    x = np.random.default_rng(0).normal(size=(3, 19, HIDDEN)).astype("float32")
    state = theirs_state = None
    for part in (x[:, :7], x[:, 7:]):
        y, state = ours(part, initial_state=state, return_state=True)
        expected, theirs_state = theirs(torch.tensor(part), theirs_state, True)
        assert difference(y, expected.detach()) < 1e-5
        assert difference(state, theirs_state[:, 0].detach()) < 1e-5
