import keras
import numpy as np
import torch

import keras_edifice
from tests.support.close import difference
from tests.support.gradients import gradients
from tests.support.shaking import shake


def peer(sizes, width):
    layers = []
    for size in sizes:
        layers += [
            torch.nn.Linear(width, size),
            torch.nn.LayerNorm(size),
            torch.nn.ReLU(),
        ]
        width = size
    return torch.nn.Sequential(*layers)


def test_mlp_equals_a_stack_of_torch(fidelity):
    sizes = [12, 8, 6]
    ours = shake(
        keras_edifice.build("mlp", input_size=7, hidden_sizes=sizes, layer_norm=True)
    )
    theirs = peer(sizes, 7)
    for parameter, weight in zip(theirs.parameters(), ours.get_weights(), strict=True):
        value = torch.tensor(weight.T.copy())
        assert parameter.shape == value.shape
        parameter.data.copy_(value)
    x = np.random.default_rng(0).normal(size=(5, 7)).astype("float32")
    by_weight, by_input = gradients(
        ours, x, lambda y: keras.ops.sum(keras.ops.square(y))
    )
    theirs_x = torch.tensor(x, requires_grad=True)
    outputs = theirs(theirs_x)
    outputs.square().sum().backward()
    pairs = [(by_input, theirs_x.grad.numpy())]
    pairs += [
        (a, p.grad.numpy().T)
        for a, p in zip(by_weight, theirs.parameters(), strict=True)
    ]
    fidelity.record(
        "mlp",
        "torch.nn.Sequential of Linear, LayerNorm, ReLU",
        forward=difference(ours(x), outputs.detach().numpy()),
        gradient=max(difference(a, b) for a, b in pairs),
    )
