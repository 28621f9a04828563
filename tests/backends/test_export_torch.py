import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_edifice.backends import routes
from keras_edifice.backends.artefacts import run_onnx
from keras_edifice.ops.tracing import export_scope, static_length
from tests.support.close import assert_close

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="exporters of PyTorch"
)
rng = np.random.default_rng(0)


@ops.custom_gradient
def tripled(x):
    return 3.0 * x, lambda x, upstream: 5.0 * upstream  # how PyTorch calls it


@keras.saving.register_keras_serializable("test_export_torch")
class Tripled(layers.Layer):
    def call(self, x):
        return tripled(x)

    def compute_output_shape(self, input_shape):
        return input_shape


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_both_exporters_leave_batch_and_length_open(exporter, tmp_path):
    inputs = keras.Input((None, 4), name="inputs")
    model = keras.Model(inputs, ops.cumsum(layers.Dense(3)(inputs), axis=1))
    path = str(tmp_path / "model.onnx")
    routes.write(model, "onnx", exporter, path)
    for shape in ((1, 1, 4), (3, 7, 4), (2, 40, 4)):
        x = rng.normal(size=shape).astype("float32")
        ((y,),) = run_onnx(model, path, [[x]], None)
        assert_close(y, model(x))


def test_tracing_goes_into_operations_with_a_gradient_of_their_own(tmp_path):
    inputs = keras.Input((4,), name="inputs")
    model = keras.Model(inputs, Tripled()(inputs))
    path = str(tmp_path / "model.onnx")
    routes.write(model, "onnx", "torchscript", path)
    x = rng.normal(size=(3, 4)).astype("float32")
    ((y,),) = run_onnx(model, path, [[x]], None)
    assert_close(y, 3.0 * x)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_traced_take_follows_open_sizes(axis, tmp_path):
    x = keras.Input((None, 5, 2), name="x")
    order = keras.Input((3,), name="order", dtype="int32")
    model = keras.Model([x, order], ops.take(x, order[0] - 1, axis=axis))
    path = str(tmp_path / "model.onnx")
    routes.write(model, "onnx", "torchscript", path)
    for shape in ((2, 7, 5, 2), (4, 3, 5, 2)):
        values = rng.normal(size=shape).astype("float32")
        indices = np.repeat([[1, 0, 2]], shape[0], axis=0).astype("int32")  # -1 too
        ((y,),) = run_onnx(model, path, [[values, indices]], None)
        assert_close(y, np.take(values, indices[0] - 1, axis=axis), 0)


@pytest.mark.parametrize("axis", [1, -2])
def test_traced_take_along_an_axis_follows_open_sizes(axis, tmp_path):
    x = keras.Input((None, 2), name="x")
    order = keras.Input((3, 1), name="order", dtype="int32")
    model = keras.Model([x, order], ops.take_along_axis(x, order - 1, axis=axis))
    path = str(tmp_path / "model.onnx")
    routes.write(model, "onnx", "torchscript", path)
    for shape in ((2, 7, 2), (4, 3, 2)):
        values = rng.normal(size=shape).astype("float32")
        indices = rng.integers(0, 3, (shape[0], 3, 1)).astype("int32")  # -1 too
        ((y,),) = run_onnx(model, path, [[values, indices]], None)
        assert_close(y, np.take_along_axis(values, indices - 1, axis=1), 0)


@pytest.mark.parametrize("length", [5, None])
def test_a_fixed_length_is_known_while_tracing(length, tmp_path):
    seen = []

    @keras.saving.register_keras_serializable("test_export_torch")
    class Probe(layers.Layer):
        def call(self, x):
            seen.append((static_length(x), static_length(x, 0)))
            return 2.0 * x

        def compute_output_shape(self, input_shape):
            return input_shape

    inputs = keras.Input((length, 3))
    model = keras.Model(inputs, Probe()(inputs))
    routes.write(model, "onnx", "torchscript", str(tmp_path / "model.onnx"))
    assert set(seen) == {(length, None)}


def test_operations_are_as_before_after_an_export(tmp_path):
    import torch

    inputs = keras.Input((4,), name="inputs")
    model = keras.Model(inputs, Tripled()(inputs))
    routes.write(model, "onnx", "torchscript", str(tmp_path / "model.onnx"))
    with export_scope("onnx"):
        x = torch.ones(2, requires_grad=True)
        (gradient,) = torch.autograd.grad(tripled(x).sum(), x)
    assert_close(gradient, [5.0, 5.0])
