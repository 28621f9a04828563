import keras
import numpy as np
import pytest

from keras_edifice.ops import graph
from keras_edifice.ops.tracing import export_scope
from tests.support.close import assert_close

rng = np.random.default_rng(0)
BATCH, NODES, EDGES = 3, 5, 11


def edges():
    """Edges without repetition: one masked, one negative, none to the last node."""
    pairs = [(s, r) for s in range(NODES) for r in range(NODES - 1)]
    index = np.stack([rng.permutation(pairs)[:EDGES] for _ in range(BATCH)])
    index[:, -1] = -1
    mask = np.ones((BATCH, EDGES), "float32")
    mask[:, 3] = 0.0
    return index.astype("int32"), mask


def exists(index, mask, b, e):
    return mask[b, e] > 0 and min(index[b, e]) >= 0


def reference_reduce(values, index, mask, reduction):
    out = np.zeros((BATCH, NODES, values.shape[-1]))
    numpy = dict(sum=np.sum, mean=np.mean, max=np.max, min=np.min)[reduction]
    for b in range(BATCH):
        for n in range(NODES):
            rows = [
                values[b, e].astype("float64")
                for e in range(EDGES)
                if exists(index, mask, b, e) and index[b, e, 1] == n
            ]
            if rows:
                out[b, n] = numpy(rows, axis=0)
    return out


@pytest.mark.parametrize("form", [None, "onnx"], ids=["segments", "one-hot"])
@pytest.mark.parametrize("reduction", graph.REDUCTIONS)
def test_messages_are_reduced_at_their_receivers(reduction, form):
    index, mask = edges()
    values = rng.normal(size=(BATCH, EDGES, 4)).astype("float32") - 2.0
    nodes = np.zeros((BATCH, NODES, 1), "float32")
    with export_scope(form):
        y = graph.segment_reduce(
            keras.ops.convert_to_tensor(values),
            keras.ops.convert_to_tensor(index[..., 1]),
            keras.ops.convert_to_tensor(nodes),
            reduction,
            keras.ops.convert_to_tensor(mask),
        )
    expected = reference_reduce(values, index, mask, reduction)
    assert (expected == 0).all(-1).any()  # a node without edges is among them
    assert_close(y, expected)


@pytest.mark.parametrize("form", [None, "onnx"], ids=["segments", "one-hot"])
def test_softmax_is_over_the_edges_of_a_receiver(form):
    index, mask = edges()
    scores = rng.normal(size=(BATCH, EDGES, 2)).astype("float32") * 40
    nodes = np.zeros((BATCH, NODES, 1), "float32")
    with export_scope(form):
        y = keras.ops.convert_to_numpy(
            graph.segment_softmax(
                *map(keras.ops.convert_to_tensor, (scores, index[..., 1], nodes, mask))
            )
        )
    expected = np.zeros(scores.shape)
    for b in range(BATCH):
        for e in range(EDGES):
            same = [
                f
                for f in range(EDGES)
                if exists(index, mask, b, f) and index[b, f, 1] == index[b, e, 1]
            ]
            if exists(index, mask, b, e):
                top = scores[b, same].max(0).astype("float64")
                total = np.exp(scores[b, same] - top).sum(0)
                expected[b, e] = np.exp(scores[b, e] - top) / total
    assert_close(y, expected)


@pytest.mark.parametrize("form", [None, "onnx"], ids=["segments", "one-hot"])
def test_gathering_takes_rows_of_the_same_example(form):
    nodes = rng.normal(size=(BATCH, NODES, 4)).astype("float32")
    index = rng.integers(0, NODES, (BATCH, EDGES)).astype("int32")
    with export_scope(form):
        y = graph.gather_nodes(*map(keras.ops.convert_to_tensor, (nodes, index)))
    assert_close(y, np.stack([nodes[b, index[b]] for b in range(BATCH)]), 1e-6)


@pytest.mark.parametrize("reduction", graph.REDUCTIONS)
def test_dense_messages_are_reduced_over_what_the_mask_keeps(reduction):
    values = rng.normal(size=(2, 4, 6, 3)).astype("float32") - 2.0
    mask = rng.integers(0, 2, (2, 4, 6)).astype("float32")
    mask[0, 1] = 0.0
    numpy = dict(sum=np.sum, mean=np.mean, max=np.max, min=np.min)[reduction]
    expected = np.zeros((2, 4, 3))
    for b, i in np.ndindex(2, 4):
        kept = values[b, i][mask[b, i] > 0].astype("float64")
        if len(kept):
            expected[b, i] = numpy(kept, axis=0)
    y = graph.masked_reduce(
        *map(keras.ops.convert_to_tensor, (values, mask)), 2, reduction
    )
    assert_close(y, expected)


def test_masked_softmax_gives_zeros_to_a_row_without_entries():
    scores = rng.normal(size=(2, 3, 4)).astype("float32")
    mask = np.ones((2, 3, 4), "float32")
    mask[0, 1], mask[1, 2, :2] = 0.0, 0.0
    y = keras.ops.convert_to_numpy(
        graph.masked_softmax(*map(keras.ops.convert_to_tensor, (scores, mask)))
    )
    assert_close(y[0, 1], np.zeros(4), 0)
    assert_close(y[1, 2, 2:].sum(), 1.0)
    assert_close(y[1, 2, :2], np.zeros(2), 0)


@pytest.mark.parametrize("normalize", ["sym", "row", None])
@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("improved", [True, False])
def test_edges_and_matrix_are_normalised_alike(normalize, loops, improved):
    index, mask = edges()
    weight = rng.uniform(0.5, 2.0, size=(BATCH, EDGES)).astype("float32")
    node_mask = np.ones((BATCH, NODES), "float32")
    node_mask[0, 2] = 0.0
    adjacency = np.zeros((BATCH, NODES, NODES), "float32")
    for b, e in np.ndindex(BATCH, EDGES):
        if exists(index, mask, b, e):
            adjacency[b, index[b, e, 1], index[b, e, 0]] = weight[b, e]
    x = rng.normal(size=(BATCH, NODES, 3)).astype("float32")
    options = dict(normalize=normalize, add_self_loops=loops, improved=improved)
    tensors = map(keras.ops.convert_to_tensor, (x, index, weight, mask, node_mask))
    x, index, weight, mask, node_mask = tensors
    coefficients = graph.normalize_edges(x, index, weight, mask, node_mask, **options)
    sparse = graph.propagate_edges(x, index, *coefficients)
    matrix = graph.normalize_adjacency(
        keras.ops.convert_to_tensor(adjacency), node_mask=node_mask, **options
    )
    assert_close(sparse, graph.propagate(x, matrix))


def test_padding_edges_reach_no_node_of_another_example():
    index = np.full((2, 3), -1, "int32")
    values = np.ones((2, 3, 1), "float32")
    nodes = np.zeros((2, 4, 1), "float32")
    y = graph.segment_reduce(*map(keras.ops.convert_to_tensor, (values, index, nodes)))
    assert_close(y, np.zeros((2, 4, 1)), 0)
