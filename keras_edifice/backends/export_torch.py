"""Exports and results of a model while PyTorch is the backend."""

import contextlib

import keras
import torch
from keras.src.backend.torch import numpy as keras_numpy

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
_gradient, _take = _CustomGradient.__call__, keras_numpy.take
_take_along = keras_numpy.take_along_axis


def _forward_only(self, *args, **kwargs):
    """An operation with a gradient of its own; exporters cannot look into those."""
    if exporting():
        return self.forward_fn(*args, **kwargs)[0]
    return _gradient(self, *args, **kwargs)


def _take_any_length(x, indices, axis=None):
    """`keras.ops.take` without the `squeeze` that asks whether a length is one."""
    if axis is None or not exporting():
        return _take(x, indices, axis)
    x, indices = map(keras.ops.convert_to_tensor, (x, indices))
    axis %= x.ndim
    indices = torch.where(indices < 0, indices + x.shape[axis], indices).long()
    rows = torch.index_select(x, axis, indices.reshape(-1))
    return rows.reshape(x.shape[:axis] + indices.shape + x.shape[axis + 1 :])


def _gather_along(x, indices, axis=None):
    """`keras.ops.take_along_axis` by `torch.gather`, which tracing has a form for."""
    if axis is None or not exporting():
        return _take_along(x, indices, axis)
    x, indices = map(keras.ops.convert_to_tensor, (x, indices))
    axis %= x.ndim
    indices = torch.where(indices < 0, indices + x.shape[axis], indices).long()
    sizes = [*x.shape[:axis], indices.shape[axis], *x.shape[axis + 1 :]]
    return torch.gather(x, axis, indices.expand(sizes))


@contextlib.contextmanager
def _traceable():
    """Operations of Keras in forms that exporters take; other threads see no change."""
    _CustomGradient.__call__, keras_numpy.take = _forward_only, _take_any_length
    keras_numpy.take_along_axis = _gather_along
    try:
        yield
    finally:
        _CustomGradient.__call__, keras_numpy.take = _gradient, _take
        keras_numpy.take_along_axis = _take_along


@_traceable()
def torchscript(model, path):
    """Writes ONNX by tracing. Sizes that the model reads as numbers are frozen."""
    names = [x.name for x in model.inputs]
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


@_traceable()
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


def _example(model):
    # Sizes above one: a size of one would be frozen as a broadcast.
    inputs = keras.tree.flatten(sample_inputs(model, batch_size=2, length=5))
    return tuple(keras.ops.convert_to_tensor(x) for x in inputs)


def _open_axes(shape):
    return {axis: size for axis, size in enumerate(shape) if isinstance(size, str)}
