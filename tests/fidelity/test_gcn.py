import keras
import numpy as np
import torch
from torch_geometric.nn import DenseGCNConv, GCNConv

import keras_edifice
from tests.support.close import difference
from tests.support.gradients import gradients
from tests.support.shaking import shake

rng = np.random.default_rng(0)
WIDTHS, NODES = [6, 5, 3], 7


def ours_and_weights(**options):
    model = shake(
        keras_edifice.build("gcn", input_dim=6, hidden_dims=[5, 3], **options)
    )
    layers = [model.get_layer(f"conv_{i}") for i in range(2)]
    return model, [(c.transform.kernel, c.bias) for c in layers]


def copy(theirs, weights):
    for conv, (kernel, bias) in zip(theirs, weights, strict=True):
        conv.lin.weight.data = torch.tensor(kernel.numpy().T.copy())
        conv.bias.data = torch.tensor(bias.numpy().copy())


def compare(ours, weights, x, theirs, run):
    """Largest differences (forward, gradient); the input is x["nodes"]."""
    nodes = torch.tensor(x["nodes"], requires_grad=True)
    y = nodes
    for conv in theirs:
        y = torch.relu(run(conv, y))
    y.square().sum().backward()
    structure = {"a": x["nodes"], **{f"z_{k}": v for k, v in x.items() if k != "nodes"}}

    class Call:  # the nodes first, for `gradients` differentiates the first input
        trainable_variables = ours.trainable_variables

        def __call__(self, given, training):
            named = {k.removeprefix("z_"): v for k, v in given.items() if k != "a"}
            return ours({"nodes": given["a"], **named}, training=training)

    by_weight, by_nodes = gradients(
        Call(), structure, lambda y: keras.ops.sum(keras.ops.square(y))
    )
    found = {
        v.path: g for v, g in zip(ours.trainable_variables, by_weight, strict=True)
    }
    pairs = [(by_nodes, nodes.grad.numpy())]
    for conv, (kernel, bias) in zip(theirs, weights, strict=True):
        pairs += [(found[kernel.path], conv.lin.weight.grad.numpy().T)]
        pairs += [(found[bias.path], conv.bias.grad.numpy())]
    forward = difference(ours(x), y.detach().numpy())
    return forward, max(difference(a, b) for a, b in pairs)


def test_gcn_equals_torch_geometric(fidelity):
    adjacency = rng.integers(0, 2, (2, NODES, NODES)).astype("float32")  # directed
    adjacency[:, range(NODES), range(NODES)] = rng.integers(0, 2, (2, NODES))
    nodes = rng.normal(size=(2, NODES, 6)).astype("float32")
    measured = []
    for improved in (False, True):
        ours, weights = ours_and_weights(improved=improved)
        theirs = [
            DenseGCNConv(a, b, improved=improved)
            for a, b in zip(WIDTHS, WIDTHS[1:], strict=False)
        ]
        copy(theirs, weights)
        x = {"nodes": nodes, "adjacency": adjacency}
        target = torch.tensor(adjacency)
        measured += [compare(ours, weights, x, theirs, lambda c, h: c(h, target))]  # noqa: B023
    ours, weights = ours_and_weights(sparse=True, use_edge_weight=True)
    theirs = [GCNConv(a, b) for a, b in zip(WIDTHS, WIDTHS[1:], strict=False)]
    copy(theirs, weights)
    pairs = np.argwhere(adjacency[0] * (1 - np.eye(NODES)) > 0)[:, ::-1]
    index = np.ascontiguousarray(pairs)[None].astype("int32")  # (sender, receiver)
    edge_weight = rng.uniform(0.5, 2.0, index.shape[:2]).astype("float32")
    x = {"nodes": nodes[:1], "edge_index": index, "edge_weight": edge_weight}
    edges = torch.tensor(index[0].T.copy()).long()
    run = lambda c, h: c(h[0], edges, torch.tensor(edge_weight[0]))[None]  # noqa: E731
    measured += [compare(ours, weights, x, theirs, run)]
    fidelity.record(
        "gcn",
        "torch_geometric DenseGCNConv and GCNConv",
        forward=max(forward for forward, _ in measured),
        gradient=max(gradient for _, gradient in measured),
    )
