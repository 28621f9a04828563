import importlib
import types

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_edifice
from keras_edifice import registry
from keras_edifice.backends import routes
from keras_edifice.backends.artefacts import RUN
from keras_edifice.exporting import export
from keras_edifice.model import EdificeModel
from keras_edifice.samples import sample_inputs
from tests.support.close import difference
from tests.support.shaking import shake

FORMATS = ["onnx", "saved_model"]


def mlp():
    return keras_edifice.build("mlp", **keras_edifice.info("mlp").tiny)


def image():
    inputs = keras.Input((12, 12, 3), name="image")
    x = layers.Conv2D(4, 3, strides=2, padding="same")(inputs)
    x = layers.AveragePooling2D(2)(layers.ReLU()(layers.BatchNormalization()(x)))
    return EdificeModel(inputs, layers.Dense(2)(layers.Flatten()(x)), name="image")


def recurrent():
    inputs = keras.Input((None, 4))  # without a name, as many write it
    return keras.Model(inputs, layers.LSTM(5)(inputs), name="recurrent")


def bidirectional():
    inputs = keras.Input((None, 4), name="inputs")
    both = layers.Bidirectional(layers.LSTM(3, return_sequences=True))
    return keras.Model(inputs, both(inputs), name="bidirectional")


def attention():
    inputs = keras.Input((None, 4), name="inputs")
    x = layers.MultiHeadAttention(2, 3)(inputs, inputs)
    return EdificeModel(inputs, ops.cumsum(x, axis=1) + inputs, name="attention")


def parts():
    inputs = {
        "numbers": keras.Input((3,), name="numbers"),
        "codes": keras.Input((2,), name="codes", dtype="int32"),
    }
    x = layers.Dense(5)(inputs["numbers"])
    x = x + layers.Flatten()(layers.Embedding(2, 5)(inputs["codes"]))[:, :5]
    return EdificeModel(inputs, {"once": x, "again": 2.0 * x}, name="parts")


@keras.saving.register_keras_serializable("test_exporting")
class Neighbours(layers.Layer):
    """nodes (b, n, f), adjacency (b, n, n) -> (b, n, units)."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.dense = layers.Dense(units, name="dense")

    def build(self, nodes_shape, adjacency_shape):
        self.dense.build(nodes_shape)

    def call(self, nodes, adjacency):
        return ops.matmul(adjacency, self.dense(nodes))

    def compute_output_shape(self, nodes_shape, adjacency_shape):
        return (*nodes_shape[:-1], self.units)


@pytest.fixture
def graph(monkeypatch):
    axes = {"nodes": ["batch", "n", "f"], "adjacency": ["batch", "n", "n"]}
    entry = types.SimpleNamespace(axes=lambda: axes, builder=graph)
    monkeypatch.setitem(registry._architectures, "toy_graph", entry)
    nodes = keras.Input((None, 3), name="nodes")
    adjacency = keras.Input((None, None), name="adjacency")
    x = Neighbours(4)(nodes, adjacency)
    model = EdificeModel({"nodes": nodes, "adjacency": adjacency}, x, name="graph")
    return model.describe("toy_graph", {})


def target(folder, format):
    return folder / ("model.onnx" if format == "onnx" else "model")


def difference_at_other_sizes(model, path, format, folder):
    """Of model and artefact at a batch size and a length that `export` did not try."""
    inputs = sample_inputs(model, batch_size=4, length=11, seed=1)
    flat = [np.asarray(x) for x in keras.tree.flatten(inputs)]
    (actual,) = RUN[format](model, str(path), [flat], str(folder))
    expected = keras.tree.flatten(model.predict_on_batch(inputs))
    return max(map(difference, actual, expected))


@pytest.mark.parametrize(
    ("build", "format"),
    [
        *((build, format) for build in (mlp, image, parts) for format in FORMATS),
        *((build, "onnx") for build in (attention, recurrent, bidirectional)),
    ],
)
def test_artefact_gives_the_numbers_of_the_model(build, format, tmp_path):
    model, path = shake(build()), target(tmp_path, format)
    assert export(model, path, format) <= 1e-4
    assert list(tmp_path.iterdir()) == [path]
    assert difference_at_other_sizes(model, path, format, tmp_path) <= 1e-4


@pytest.mark.parametrize("format", FORMATS)
def test_inputs_share_an_open_size(graph, format, tmp_path):
    path = target(tmp_path, format)
    assert export(shake(graph), path, format) <= 1e-4
    assert difference_at_other_sizes(graph, path, format, tmp_path) <= 1e-4


def test_shared_open_size_is_written_by_the_active_backend(
    graph, monkeypatch, tmp_path
):
    own_routes_only(monkeypatch)
    assert export(graph, tmp_path / "model.onnx") <= 1e-4


def test_mixed_precision_is_written_in_float32(tmp_path):
    exact = shake(mlp())
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        mixed = mlp()
    finally:
        keras.config.set_dtype_policy("float32")
    mixed.set_weights(exact.get_weights())
    path = tmp_path / "model.onnx"
    assert export(mixed, path) <= 1e-4
    assert difference_at_other_sizes(exact, path, "onnx", tmp_path) <= 1e-4


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
def test_int8_model_is_written(tmp_path):
    inputs = keras.Input((4,), name="inputs")
    model = keras.Model(inputs, layers.Dense(3)(layers.Dense(6)(inputs)), name="int8")
    model.quantize("int8")
    assert export(model, tmp_path / "model.onnx") <= 1e-4


@keras.saving.register_keras_serializable("test_exporting")
class Noise(layers.Layer):
    """Adds noise, at inference too."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed_generator = keras.random.SeedGenerator(0)

    def call(self, x):
        return x + keras.random.normal(ops.shape(x), seed=self.seed_generator)

    def compute_output_shape(self, input_shape):
        return input_shape


def one_layer(layer, name="one_layer"):
    inputs = keras.Input((4,), name="inputs")
    return keras.Model(inputs, layer(inputs), name=name)


@pytest.mark.parametrize("format", FORMATS)
def test_random_draws_at_inference_are_refused(format, tmp_path):
    with pytest.raises(ValueError, match="draws random ones at inference"):
        export(one_layer(Noise()), target(tmp_path, format), format)
    assert not any(tmp_path.iterdir())


def test_model_that_gives_nan_is_refused(tmp_path):
    model = one_layer(layers.Dense(2, kernel_initializer="zeros"))
    model.layers[-1].bias.assign([0.0, float("nan")])
    with pytest.raises(ValueError, match="gives NaN"):
        export(model, tmp_path / "model.onnx")


def own_routes_only(monkeypatch):
    """Exports without other backends. Returns the module of the exporters."""
    active, usual = keras.backend.backend(), routes.routes
    monkeypatch.setattr(
        routes,
        "routes",
        lambda *args: [route for route in usual(*args) if route.backend == active],
    )
    return importlib.import_module(f"keras_edifice.backends.export_{active}")


def first_exporter(monkeypatch, wrap):
    """Wraps the exporter of ONNX that comes first, and leaves no other."""
    exporters = own_routes_only(monkeypatch)
    first = routes.routes(one_layer(layers.Dense(2)), "onnx")[0]
    monkeypatch.setattr(routes, "routes", lambda *args: [first])
    original = getattr(exporters, first.exporter)
    monkeypatch.setattr(exporters, first.exporter, wrap(original))
    return first


def of_another_model(original):
    """An exporter that writes a model with other weights."""

    def write(model, path):
        other = keras.models.clone_model(model)
        other.set_weights([weight + 1.0 for weight in model.get_weights()])
        original(other, path)

    return write


def test_wrong_file_is_refused_and_the_older_one_stays(monkeypatch, tmp_path):
    first_exporter(monkeypatch, of_another_model)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"older")
    with pytest.raises(ValueError, match="the result differs by") as caught:
        export(one_layer(layers.Dense(2)), path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"older"


def test_failing_exporter_leaves_nothing(monkeypatch, tmp_path):
    def interrupted(original):
        def write(model, path):
            original(model, path)
            raise OSError("the disk\nis full")

        return write

    first_exporter(monkeypatch, interrupted)
    with pytest.raises(ValueError, match="one_layer .* the disk is full"):
        export(one_layer(layers.Dense(2)), tmp_path / "model.onnx")
    assert not any(tmp_path.iterdir())


def test_next_route_is_taken_where_one_is_wrong(monkeypatch, tmp_path):
    first = first_exporter(monkeypatch, of_another_model)
    right = {"tensorflow": "jax", "jax": "tensorflow", "torch": "tensorflow"}
    others = [r for r in routes.ROUTES["onnx"] if r.backend == right[first.backend]]
    monkeypatch.setattr(routes, "routes", lambda *args: [first, *others])
    model, path = shake(one_layer(layers.Dense(2))), tmp_path / "model.onnx"
    assert export(model, path) <= 1e-4
    assert difference_at_other_sizes(model, path, "onnx", tmp_path) <= 1e-4


def test_layers_of_other_modules_are_known_to_other_backends(monkeypatch, tmp_path):
    (tmp_path / "their_layers.py").write_text(
        "import keras\n"
        "class Double(keras.layers.Layer):\n"
        "    def call(self, x):\n"
        "        return 2.0 * x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    double = importlib.import_module("their_layers").Double()
    active, usual = keras.backend.backend(), routes.routes
    monkeypatch.setattr(
        routes, "routes", lambda *a: [r for r in usual(*a) if r.backend != active][:1]
    )
    assert export(one_layer(double), tmp_path / "model.onnx") <= 1e-4


@keras.saving.register_keras_serializable("test_exporting")
class Witness(layers.Layer):
    """Notes which export it is traced for."""

    seen = set()

    def call(self, x):
        self.seen.add(keras_edifice.ops.tracing.exporting())
        return x + 1.0

    def compute_output_shape(self, input_shape):
        return input_shape


def test_layers_know_that_they_are_exported(monkeypatch, tmp_path):
    own_routes_only(monkeypatch)
    model = one_layer(Witness())
    Witness.seen.clear()
    assert export(model, tmp_path / "model.onnx", verify=False) is None
    assert Witness.seen == {"onnx"}


def test_older_saved_model_is_replaced(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "saved_model.pb").write_bytes(b"older")
    (path / "older.txt").write_text("older")
    export(one_layer(layers.Dense(2)), path, "saved_model")
    assert not (path / "older.txt").exists()
    assert (path / "saved_model.pb").read_bytes() != b"older"


def test_method_of_the_model_exports_quietly(capfd, tmp_path):
    mlp().export(tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").is_file()
    assert capfd.readouterr() == ("", "")


def test_arguments_are_checked(tmp_path):
    model = one_layer(layers.Dense(2))
    with pytest.raises(ValueError, match="'onnx' or 'saved_model', received 'tflite'"):
        export(model, tmp_path / "model", "tflite")
    with pytest.raises(TypeError, match="functional Keras model, received Dense"):
        export(layers.Dense(2), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="there is no folder .*missing; make it"):
        export(model, tmp_path / "missing" / "model.onnx")
    with pytest.raises(ValueError, match="is a folder; name an ONNX file"):
        export(model, tmp_path)
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(ValueError, match="folder of other things"):
        export(model, tmp_path, "saved_model")
    with pytest.raises(ValueError, match="is a file; a SavedModel is a folder"):
        export(model, tmp_path / "notes.txt", "saved_model")
    assert (tmp_path / "notes.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("format", "extra"), [("onnx", "onnx"), ("saved_model", "tensorflow")]
)
def test_missing_packages_are_named_with_the_command(
    format, extra, monkeypatch, tmp_path
):
    monkeypatch.setattr(routes, "missing", list)
    with pytest.raises(ImportError, match=rf"pip install .*\[{extra}\]"):
        export(one_layer(layers.Dense(2)), tmp_path / "model", format)
