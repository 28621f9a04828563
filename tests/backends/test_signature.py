import types

import keras

from keras_edifice import registry
from keras_edifice.backends.signature import open_axes, shapes, specs
from keras_edifice.model import EdificeModel


def graph():
    nodes = keras.Input((None, 6), name="nodes")
    adjacency = keras.Input((None, None), name="adjacency")
    inputs = {"nodes": nodes, "adjacency": adjacency}
    return EdificeModel(inputs, keras.ops.matmul(adjacency, nodes), name="graph")


def test_declared_axes_of_one_name_are_one_size(monkeypatch):
    axes = {"nodes": ["batch", "n", "f"], "adjacency": ["batch", "n", "n"]}
    entry = types.SimpleNamespace(axes=lambda: axes)
    monkeypatch.setitem(registry._architectures, "toy_graph", entry)
    model = graph().describe("toy_graph", {})
    assert shapes(model) == [["batch", "n", "n"], ["batch", "n", 6]]


def test_undeclared_axes_are_sizes_of_their_own():
    assert shapes(graph()) == [
        ["batch", "size_0_1", "size_0_2"],
        ["batch", "size_1_1", 6],
    ]


def test_axis_that_is_no_name_gets_one(monkeypatch):
    entry = types.SimpleNamespace(axes=lambda: {"x": ["batch", "2 * size", "size"]})
    monkeypatch.setitem(registry._architectures, "toy", entry)
    x = keras.Input((None, None), name="inputs")
    model = EdificeModel(x, x * 2.0, name="toy").describe("toy", {})
    assert shapes(model) == [["batch", "size_0_1", "size"]]


def test_unknown_architecture_declares_nothing():
    model = graph().describe("not_registered", {})
    assert shapes(model)[1] == ["batch", "size_1_1", 6]


def test_specs_keep_structure_shape_type_and_name():
    found = specs(graph())
    assert list(found) == ["nodes", "adjacency"]
    assert found["nodes"].shape == (None, None, 6)
    assert (found["nodes"].name, found["nodes"].dtype) == ("nodes", "float32")


def test_open_axes_are_those_besides_the_batch():
    x = keras.Input((3,), name="inputs")
    assert open_axes(graph())
    assert not open_axes(keras.Model(x, x * 2.0))
