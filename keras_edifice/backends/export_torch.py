"""Exports and results of a model while PyTorch is the backend."""

import contextlib

import keras
import torch

from keras_edifice.backends.signature import shapes
from keras_edifice.ops.tracing import exporting
from keras_edifice.samples import sample_inputs


class _Flat(torch.nn.Module):
    """The model as a function of flat tensors, which both exporters understand."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *flat):
        packed = keras.tree.pack_sequence_as(self.model.input, flat)
        return tuple(keras.tree.flatten(self.model(packed, training=False)))


_CustomGradient = type(keras.ops.custom_gradient(lambda x: (x, lambda g: g)))


@contextlib.contextmanager
def _forward_only():
    """Operations with a gradient of their own become what they compute.

    Exporters cannot look into them otherwise. Other threads keep their gradients.
    """
    with_gradient = _CustomGradient.__call__

    def call(self, *args, **kwargs):
        if exporting():
            return self.forward_fn(*args, **kwargs)[0]
        return with_gradient(self, *args, **kwargs)

    _CustomGradient.__call__ = call
    try:
        yield
    finally:
        _CustomGradient.__call__ = with_gradient


@_forward_only()
def torchscript(model, path):
    """Writes ONNX by tracing. Sizes that the model reads as numbers are frozen."""
    names = [x.name for x in model.inputs]
    torch.onnx.register_custom_op_symbolic("aten::ravel", _ravel, opset_version=9)
    torch.onnx.export(
        _Flat(model),
        _example(model),
        path,
        input_names=names,
        dynamic_axes={
            name: _open_axes(shape)
            for name, shape in zip(names, shapes(model), strict=True)
        },
        dynamo=False,
    )


@_forward_only()
def dynamo(model, path):
    """Writes ONNX by `torch.export`. Slower; takes operators that tracing does not."""
    dims = {}
    dynamic = tuple(
        {
            axis: dims.setdefault(name, torch.export.Dim(name))
            for axis, name in _open_axes(shape).items()
        }
        for shape in shapes(model)
    )
    torch.onnx.export(
        _Flat(model),
        _example(model),
        path,
        input_names=[x.name for x in model.inputs],
        dynamic_shapes=(dynamic,),
        dynamo=True,
        verbose=False,
    )


def predict(model, batches):
    """Outputs of the model, flat, for each batch of inputs."""
    results = []
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        for x in batches:
            outputs = keras.tree.flatten(model(x, training=False))
            results.append([keras.ops.convert_to_numpy(y) for y in outputs])
    return results


def _ravel(graph, x):
    """What tracing writes for `torch.ravel`, which is inside `keras.ops.take`."""
    flat = graph.op("Constant", value_t=torch.tensor([-1]))
    return graph.op("Reshape", x, flat)


def _example(model):
    # Sizes above one: a size of one would be frozen as a broadcast.
    inputs = keras.tree.flatten(sample_inputs(model, batch_size=2, length=5))
    return tuple(keras.ops.convert_to_tensor(x) for x in inputs)


def _open_axes(shape):
    return {axis: size for axis, size in enumerate(shape) if isinstance(size, str)}
