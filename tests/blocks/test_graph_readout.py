import keras
import numpy as np
import pytest

from keras_edifice.blocks.graph_readout import MaskNodes, graph_inputs, graph_readout
from tests.support.close import assert_close, to_numpy
from tests.support.shaking import shake

rng = np.random.default_rng(0)


def readout(use_mask=False, **options):
    inputs = {"nodes": keras.Input((None, 4), name="nodes")}
    if use_mask:
        inputs["node_mask"] = keras.Input((None,), name="node_mask")
    x = graph_readout(inputs["nodes"], inputs.get("node_mask"), **options)
    return shake(keras.Model(inputs, x))


def test_inputs_are_named_as_they_are_passed():
    dense = graph_inputs(4, use_mask=True)
    assert list(dense) == ["nodes", "adjacency", "node_mask"]
    sparse = graph_inputs(4, sparse=True, edge_weight=True, edge_mask=True)
    assert list(sparse) == ["nodes", "edge_index", "edge_weight", "edge_mask"]
    assert all(x.name == name for name, x in {**dense, **sparse}.items())
    assert sparse["edge_index"].dtype == "int32"


def test_edge_inputs_need_the_sparse_form():
    with pytest.raises(ValueError, match="need sparse=True"):
        graph_inputs(4, edge_mask=True)


def test_masked_rows_are_zero_even_if_they_are_not_finite():
    x = rng.normal(size=(1, 3, 2)).astype("float32")
    x[0, 2] = np.nan
    y = MaskNodes()(x, np.array([[1, 1, 0]], "float32"))
    assert_close(y, np.concatenate([x[:, :2], np.zeros((1, 1, 2))], 1), 0)


@pytest.mark.parametrize("pool", ["mean", "sum", "max"])
def test_pooled_scores_are_a_network_on_the_pooled_nodes(pool):
    model = readout(
        use_mask=True, pool=pool, num_classes=3, classifier_dims=[5], activation="tanh"
    )
    x = rng.normal(size=(2, 4, 4)).astype("float32")
    mask = np.array([[1, 1, 1, 0], [1, 0, 1, 0]], "float32")
    rows = [x[b][mask[b] > 0].astype("float64") for b in range(2)]
    pooled = np.stack([getattr(np, pool)(row, axis=0) for row in rows])
    w1, b1, w2, b2 = (to_numpy(w) for w in model.get_weights())
    scores = np.exp(np.tanh(pooled @ w1 + b1) @ w2 + b2)
    expected = scores / scores.sum(-1, keepdims=True)
    assert_close(model({"nodes": x, "node_mask": mask}), expected)


def test_without_pooling_every_node_has_scores():
    model = readout(num_classes=3, classifier_dims=[5], classifier_activation=None)
    x = rng.normal(size=(2, 4, 4)).astype("float32")
    kernel, bias = model.get_weights()  # classifier_dims belong to pooled graphs
    assert_close(model({"nodes": x}), x @ kernel + bias)


def test_without_classes_the_features_pass():
    x = rng.normal(size=(2, 4, 4)).astype("float32")
    assert_close(readout()({"nodes": x}), x, 0)
