import keras
import numpy as np
import torch
from torch import nn
from torch_geometric.nn.aggr import DeepSetsAggregation

import keras_edifice
from tests.support.close import difference
from tests.support.gradients import gradients
from tests.support.shaking import shake

rng = np.random.default_rng(0)


def peer():
    phi = nn.Sequential(
        nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 6)
    )
    rho = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    return DeepSetsAggregation(phi, rho)


def test_agrees_with_torch_geometric(fidelity):
    model = shake(
        keras_edifice.build(
            "deep_sets",
            input_dim=3,
            hidden_dim=6,
            output_dim=4,
            phi_sizes=[7, 5],
            rho_sizes=[8],
            use_mask=True,
        )
    )
    network = peer()
    with torch.no_grad():
        ours = zip(model.weights, network.parameters(), strict=True)
        for weight, parameter in ours:
            parameter.copy_(torch.tensor(weight.numpy().T))
    sizes = [5, 1, 3]  # the peer takes the elements of all sets in one list
    x = rng.normal(size=(3, 5, 3)).astype("float32")
    mask = (np.arange(5) < np.array(sizes)[:, None]).astype("float32")
    elements = torch.tensor(x[mask > 0], requires_grad=True)
    y = network(elements, index=torch.arange(3).repeat_interleave(torch.tensor(sizes)))
    inputs = dict(elements=x, set_mask=mask)
    forward = difference(model(inputs), y.detach())

    *theirs, their_input = torch.autograd.grad(
        (y**2).sum(), [*network.parameters(), elements]
    )
    by_weight, by_input = gradients(
        model, inputs, lambda y: keras.ops.sum(keras.ops.square(y))
    )
    differences = [
        difference(g, t.numpy().T) for g, t in zip(by_weight, theirs, strict=True)
    ]
    differences.append(difference(by_input[mask > 0], their_input.numpy()))
    fidelity.record(
        "deep_sets",
        "torch_geometric DeepSetsAggregation",
        forward,
        max(differences),
    )
