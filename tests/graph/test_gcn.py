import keras
import numpy as np
import pytest

import keras_edifice
from keras_edifice.graph.gcn import GraphConvolution, NormalizeAdjacency
from keras_edifice.ops.tracing import export_scope
from tests.support.close import assert_close, to_numpy
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake

rng = np.random.default_rng(0)


def random_graph(batch=2, nodes=6, features=4, loops=True):
    """Node features and a symmetric adjacency, some loops among the edges."""
    upper = np.triu(rng.integers(0, 2, (batch, nodes, nodes)), 0 if loops else 1)
    adjacency = np.maximum(upper, upper.swapaxes(1, 2)).astype("float32")
    x = rng.normal(size=(batch, nodes, features)).astype("float32")
    return {"nodes": x, "adjacency": adjacency}


def edge_list(adjacency, padding=2):
    """(sender, receiver) of each entry of a batch of matrices; -1 fills up."""
    lists = [np.argwhere(a > 0)[:, ::-1] for a in adjacency]
    longest = max(map(len, lists)) + padding
    index = np.full((len(lists), longest, 2), -1, "int32")
    for b, pairs in enumerate(lists):
        index[b, : len(pairs)] = pairs
    return index


def reference(x, adjacency, weights, activation=np.tanh):
    """Eq. 2 in float64, for every convolution with a bias."""
    n = adjacency.shape[-1]
    a = np.asarray(adjacency, "float64").copy()
    a[:, np.arange(n), np.arange(n)] = 1.0
    d = a.sum(-1)
    a = a / np.sqrt(d[:, :, None] * d[:, None, :])
    weights = [np.asarray(w, "float64") for w in weights]
    for kernel, bias in convolutions(weights):
        x = activation(a @ x @ kernel + bias)
    return x


def convolutions(weights):
    """(kernel, bias) of each layer, whichever Keras lists first."""
    pairs = zip(weights[::2], weights[1::2], strict=True)
    return [(a, b) if a.ndim == 2 else (b, a) for a, b in pairs]


def small(**options):
    given = dict(input_dim=4, hidden_dims=[7, 3], activation="tanh") | options
    keras.utils.set_random_seed(0)
    return shake(keras_edifice.build("gcn", **given))


def test_output_is_the_equation():
    model, x = small(), random_graph()
    assert_close(model(x), reference(**named(x), weights=model.get_weights()))


def named(x):
    return dict(x=x["nodes"], adjacency=x["adjacency"])


def test_gradient_is_that_of_the_equation():
    model, x = small(), random_graph(1, 4)
    x = {"adjacency": x["adjacency"], "nodes": x["nodes"]}
    reordered = keras.tree.flatten(x)  # by key: the adjacency comes first
    assert reordered[0] is x["adjacency"]
    by_weight, by_adjacency = gradients(model, x, lambda y: keras.ops.sum(y * y))
    weights = model.get_weights()
    expected = numerical_gradient(
        lambda a: np.square(reference(x["nodes"], a, weights)).sum(), x["adjacency"]
    )
    assert_close(by_adjacency, expected, 1e-4)
    for i, gradient in enumerate(by_weight):
        expected = numerical_gradient(
            lambda w, i=i: np.square(
                reference(**named(x), weights=[*weights[:i], w, *weights[i + 1 :]])
            ).sum(),
            weights[i],
        )
        assert_close(gradient, expected, 1e-4)


def test_nodes_may_come_in_any_order():
    model, x = small(num_classes=3), random_graph()
    order = rng.permutation(6)
    moved = {
        "nodes": x["nodes"][:, order],
        "adjacency": x["adjacency"][:, order][:, :, order],
    }
    assert_close(model(moved), to_numpy(model(x))[:, order])


@pytest.mark.parametrize("form", [None, "onnx"], ids=["segments", "one-hot"])
@pytest.mark.parametrize("normalize", ["sym", "row", None])
def test_dense_and_sparse_forms_agree(form, normalize):
    dense = small(normalize=normalize, num_classes=3)
    sparse = keras_edifice.build("gcn", **{**dense.options, "sparse": True})
    sparse.set_weights(dense.get_weights())
    x = random_graph()
    edges = {"nodes": x["nodes"], "edge_index": edge_list(x["adjacency"])}
    with export_scope(form):
        y = sparse(edges)
    assert_close(y, dense(x))


def test_sparse_form_trains_as_the_dense_one():
    x, y = random_graph(4), rng.normal(size=(4, 6, 3)).astype("float32")
    edges = {"nodes": x["nodes"], "edge_index": edge_list(x["adjacency"])}
    dense = small()
    sparse = keras_edifice.build("gcn", **{**dense.options, "sparse": True})
    sparse.set_weights(dense.get_weights())
    for model, data in ((dense, x), (sparse, edges)):
        model.compile("sgd", "mse")
        model.fit(data, y, batch_size=2, epochs=2, shuffle=False, verbose=0)
    for a, b in zip(sparse.get_weights(), dense.get_weights(), strict=True):
        assert_close(a, b)


def test_weights_and_masks_of_edges_are_those_of_the_matrix():
    x = random_graph(loops=False)
    index = edge_list(x["adjacency"])
    weight = rng.uniform(0.5, 2.0, index.shape[:2]).astype("float32")
    mask = (rng.uniform(size=index.shape[:2]) < 0.7).astype("float32")
    matrix = np.zeros_like(x["adjacency"])
    for b, e in np.ndindex(index.shape[:2]):
        if index[b, e, 0] >= 0 and mask[b, e]:
            matrix[b, index[b, e, 1], index[b, e, 0]] = weight[b, e]
    dense = small()
    options = dict(sparse=True, use_edge_weight=True, use_edge_mask=True)
    sparse = keras_edifice.build("gcn", **{**dense.options, **options})
    sparse.set_weights(dense.get_weights())
    edges = dict(nodes=x["nodes"], edge_index=index, edge_weight=weight, edge_mask=mask)
    assert_close(sparse(edges), dense({"nodes": x["nodes"], "adjacency": matrix}))


def test_equal_features_on_a_regular_graph_give_equal_rows():
    ring = np.roll(np.eye(6), 1, 0) + np.roll(np.eye(6), -1, 0)
    x = np.repeat(rng.normal(size=(1, 1, 4)), 6, 1).astype("float32")
    y = to_numpy(small()({"nodes": x, "adjacency": ring[None].astype("float32")}))
    assert_close(y, np.repeat(y[:, :1], 6, 1), 1e-6)


def test_normalised_adjacency_is_symmetric_with_spectrum_within_one():
    adjacency = random_graph(8)["adjacency"]
    normal = to_numpy(NormalizeAdjacency()(adjacency))
    assert_close(normal, normal.swapaxes(1, 2), 1e-6)
    spectrum = np.linalg.eigvalsh(normal)
    assert np.abs(spectrum).max() < 1 + 1e-6
    assert_close(spectrum[:, -1], np.ones(8), 1e-6)  # D^½ 1 is an eigenvector


def test_loops_are_set_and_not_added():
    bare = random_graph(loops=False)["adjacency"]
    twice = bare + 2.0 * np.eye(6, dtype="float32")
    assert_close(NormalizeAdjacency()(twice), NormalizeAdjacency()(bare), 0)
    improved = NormalizeAdjacency(normalize=None, improved=True)(bare)
    assert_close(np.einsum("bii->bi", to_numpy(improved)), np.full((2, 6), 2.0))


def test_isolated_node_is_transformed_alone():
    layer = GraphConvolution(3)
    x = random_graph()
    x["adjacency"][:, 2] = x["adjacency"][:, :, 2] = 0.0
    normal = NormalizeAdjacency()(x["adjacency"])
    layer.build(x["nodes"].shape)
    shake(layer)
    kernel, bias = layer.transform.get_weights()[0], to_numpy(layer.bias)
    y = to_numpy(layer(x["nodes"], adjacency=normal))
    assert_close(y[:, 2], x["nodes"][:, 2] @ kernel + bias)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_as_many_layers_see_as_many_hops(layers):
    path = np.eye(8, k=1) + np.eye(8, k=-1)
    x = {"nodes": rng.normal(size=(1, 8, 4)), "adjacency": path[None]}
    x = {k: v.astype("float32") for k, v in x.items()}
    model = small(hidden_dims=[5] * layers)
    before = to_numpy(model(x))
    x["nodes"][:, 0] += 1.0
    moved = np.abs(to_numpy(model(x)) - before).max(-1)[0]
    assert (moved[: layers + 1] > 1e-6).all()
    assert (moved[layers + 1 :] == 0).all()


def test_rows_receive():
    cycle = np.roll(np.eye(3), 1, 0)[None].astype("float32")  # 0 -> 1 -> 2 -> 0
    x = {"nodes": rng.normal(size=(1, 3, 4)).astype("float32"), "adjacency": cycle}
    model = small(hidden_dims=[5])
    before = to_numpy(model(x))
    x["nodes"][:, 0] += 1.0
    moved = np.abs(to_numpy(model(x)) - before).max(-1)[0]
    assert moved[1] > 1e-6
    assert moved[2] == 0


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("pool", [None, "mean", "sum", "max"])
def test_padding_changes_nothing(pool, sparse):
    small_graph = random_graph(1, 4)
    padded = {
        "nodes": np.pad(small_graph["nodes"], [[0, 0], [0, 3], [0, 0]], "reflect"),
        "adjacency": np.ones((1, 7, 7), "float32"),
    }
    padded["adjacency"][:, :4, :4] = small_graph["adjacency"]
    mask = np.array([[1, 1, 1, 1, 0, 0, 0]], "float32")
    plain = small(num_classes=3, pool=pool, sparse=sparse)
    masked = keras_edifice.build("gcn", **{**plain.options, "use_mask": True})
    masked.set_weights(plain.get_weights())
    if sparse:
        for x in (small_graph, padded):
            x["edge_index"] = edge_list(x.pop("adjacency"))
    y = to_numpy(masked({**padded, "node_mask": mask}))
    expected = to_numpy(plain(small_graph))
    if pool is None:
        assert_close(y[:, 4:], np.zeros((1, 3, 3)), 0)
        y = y[:, :4]
    assert_close(y, expected)


def test_empty_graph_pools_to_finite_scores():
    model = small(num_classes=3, pool="max", use_mask=True)
    x = {**random_graph(), "node_mask": np.zeros((2, 6), "float32")}
    assert_close(to_numpy(model(x)).sum(-1), np.ones(2))


def test_head_of_the_paper_is_a_convolution():
    x = random_graph()
    features = small(hidden_dims=[7, 3], head="conv")
    classes = small(hidden_dims=[7], num_classes=3, head="conv")
    assert [layer.name for layer in classes.layers if "conv" in layer.name] == [
        "conv_0",
        "conv_1",
    ]
    assert classes.get_layer("conv_1").activation is None
    logits = small(
        hidden_dims=[7], num_classes=3, head="conv", classifier_activation=None
    )
    logits.set_weights(features.get_weights())
    classes.set_weights(features.get_weights())
    assert_close(np.tanh(to_numpy(logits(x))), features(x))
    scores = np.exp(to_numpy(logits(x)))
    assert_close(classes(x), scores / scores.sum(-1, keepdims=True))


def test_dropout_is_on_the_input_of_each_layer():
    model = small(dropout=0.5, hidden_dims=[7, 3], num_classes=2)
    names = [layer.name for layer in model.layers if "dropout" in layer.name]
    assert names == ["dropout_0", "dropout_1", "dropout_head"]
    x = random_graph()
    assert_close(model(x), model(x), 0)
    # One feature, nodes without neighbours: a row is all dropped or all doubled.
    model = small(input_dim=1, hidden_dims=[7], dropout=0.5, activation="linear")
    x = {"nodes": np.ones((1, 40, 1), "float32"), "adjacency": np.zeros((1, 40, 40))}
    kernel, bias = convolutions(model.get_weights())[0]
    rows = (to_numpy(model(x, training=True)) - bias)[0]
    dropped = np.abs(rows).max(-1) < 1e-6
    assert 5 < dropped.sum() < 35
    assert_close(rows[~dropped], np.repeat(2 * kernel, (~dropped).sum(), 0))


def test_penalty_is_on_the_first_layer_alone():
    model, l2 = small(l2=0.5), 0.5
    kernel = model.get_layer("conv_0").transform.get_weights()[0]
    assert len(model.losses) == 1
    assert_close(model.losses[0], l2 / 2 * np.square(kernel).sum())


def test_sample_weight_picks_the_nodes_that_train():
    x, model = random_graph(), small(num_classes=3)
    labels = rng.integers(0, 3, (2, 6))
    train = np.zeros((2, 6), "float32")
    train[:, :2] = 1.0
    other = np.where(train > 0, labels, 2 - labels)
    losses = []
    for y in (labels, other):
        model.compile("sgd", "sparse_categorical_crossentropy")
        losses += [model.evaluate(x, y, sample_weight=train, verbose=0)]
    assert losses[0] == losses[1]


def test_initial_biases_are_zero_and_kernels_glorot():
    model = keras_edifice.build("gcn", input_dim=300, hidden_dims=[200])
    layer = model.get_layer("conv_0")
    kernel = layer.transform.get_weights()[0]
    assert_close(layer.bias, np.zeros(200), 0)
    limit = np.sqrt(6 / 500)
    assert limit * 0.99 < np.abs(kernel).max() <= limit


def test_graph_classifier_of_the_registry():
    model = keras_edifice.classifier("gcn", 3, input_dim=4, pool="mean")
    y = to_numpy(model(random_graph()))
    assert y.shape == (2, 3)
    assert_close(y.sum(-1), np.ones(2))
    nodes = keras_edifice.classifier("gcn", 3, input_dim=4)
    assert nodes(random_graph()).shape == (2, 6, 3)


def test_sparse_form_with_masks_is_exported(tmp_path):
    model = small(sparse=True, use_mask=True, use_edge_mask=True, pool="mean")
    assert keras_edifice.export(model, tmp_path / "model.onnx", "onnx") < 1e-4


def test_inputs_of_the_sparse_form_are_refused_by_the_dense_one():
    with pytest.raises(ValueError, match="need sparse=True"):
        keras_edifice.build("gcn", input_dim=4, use_edge_weight=True)


def test_published_sizes():
    cora = dict(input_dim=1433, hidden_dims=[16], num_classes=7, head="conv")
    assert keras_edifice.build("gcn", **cora).count_params() == 23_063
    bare = keras_edifice.build("gcn", use_bias=False, **cora)
    assert bare.count_params() == 23_040
