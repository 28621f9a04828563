import keras
import numpy as np
import torch
from s5 import S5

import keras_edifice
from tests.support.close import difference
from tests.support.gradients import gradients
from tests.support.shaking import shake

HIDDEN, STATE, LAYERS, LENGTH = 6, 4, 2, 13


class Block(torch.nn.Module):
    """A norm, their state space and the gate of the paper, which they leave out."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(HIDDEN, eps=1e-5)
        self.s5 = S5(HIDDEN, state_width=STATE)
        self.gate = torch.nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        g = torch.nn.functional.gelu(self.s5(self.norm(x)))
        return x + g * torch.sigmoid(self.gate(g))


def pairs_of_weights(ours, theirs):
    """(our variables, their parameter); two variables are a complex parameter."""
    for i, block in enumerate(theirs[:-1]):
        own, seq = ours.get_layer(f"s5_{i}"), block.s5.seq
        norm = ours.get_layer(f"s5_{i}_norm")
        yield [norm.gamma], block.norm.weight
        yield [norm.beta], block.norm.bias
        yield [own.Lambda_real, own.Lambda_imag], seq.Lambda
        yield [own.B_real, own.B_imag], seq.B
        yield [own.C_real, own.C_imag], seq.C
        yield [own.D], seq.D
        yield [own.log_step], seq.log_step
        yield [own.gate.kernel], block.gate.weight
        yield [own.gate.bias], block.gate.bias
    final = ours.get_layer("final_norm")
    yield [final.gamma], theirs[-1].weight
    yield [final.beta], theirs[-1].bias


def as_theirs(variables, arrays, parameter):
    """Our arrays in the axes and the dtype of theirs."""
    if len(arrays) == 1:
        return arrays[0].T if variables[0].name == "kernel" else arrays[0]
    if parameter.is_complex():
        return arrays[0] + 1j * arrays[1]
    return np.stack(arrays, axis=-1)


def test_s5_equals_that_of_s5_pytorch(fidelity):
    keras.utils.set_random_seed(0)
    ours = shake(
        keras_edifice.build(
            "s5",
            **dict(embed_size=HIDDEN, hidden_size=HIDDEN, num_layers=LAYERS),
            **dict(state_size=STATE, conj_sym=False, return_sequences=True),
            **dict(dt_min=0.05, dt_max=0.5),  # the state changes within the window
            window_size=LENGTH,
        )
    )
    theirs = torch.nn.Sequential(
        *(Block() for _ in range(LAYERS)), torch.nn.LayerNorm(HIDDEN, eps=1e-5)
    )
    weights = list(pairs_of_weights(ours, theirs))
    assert sum(len(own) for own, _ in weights) == len(ours.trainable_variables)
    for own, parameter in weights:
        value = as_theirs(own, [v.numpy() for v in own], parameter)
        assert parameter.shape == value.shape
        parameter.data.copy_(torch.tensor(value.copy()))
    x, r = np.random.default_rng(0).normal(size=(2, 3, LENGTH, HIDDEN))
    x, r = x.astype("float32"), r.astype("float32")
    by_weight, by_input = gradients(
        ours, x, lambda y: keras.ops.sum(keras.ops.multiply(y, r))
    )
    by_weight = {
        v.path: g for v, g in zip(ours.trainable_variables, by_weight, strict=True)
    }
    theirs_x = torch.tensor(x, requires_grad=True)
    y = theirs(theirs_x)
    (y * torch.tensor(r)).sum().backward()
    differences = [difference(by_input, theirs_x.grad.numpy())]
    for own, parameter in weights:
        found = as_theirs(own, [by_weight[v.path] for v in own], parameter)
        expected = parameter.grad.numpy()
        for part in (np.real, np.imag):
            differences.append(difference(part(found), part(expected)))
    fidelity.record(
        "s5",
        "s5-pytorch S5",
        forward=difference(ours(x), y.detach().numpy()),
        gradient=max(differences),
    )
