"""Exports and results of a model while TensorFlow is the backend."""

import contextlib
import functools
import os

import keras
import numpy as np
import tensorflow as tf

from keras_edifice.backends.signature import specs


def saved_model(model, path):
    """Writes a SavedModel."""
    keras.Model.export(
        model, path, "tf_saved_model", verbose=False, input_signature=[specs(model)]
    )


def tf2onnx(model, path):
    """Writes ONNX.

    tf2onnx copies the graph before each of its passes, in case it fails, which takes
    as long as all else: only where one fails does it do so here.
    """
    export = functools.partial(
        keras.Model.export,
        model,
        path,
        "onnx",
        verbose=False,
        input_signature=[specs(model)],
    )
    try:
        with _without_copies():
            export()
    except Exception:  # a pass raises anything
        export()


@contextlib.contextmanager
def _without_copies():
    from tf2onnx import constants

    name = constants.ENV_TF2ONNX_CATCH_ERRORS
    before = os.environ.get(name)
    os.environ[name] = "FALSE"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def predict(model, batches):
    """Outputs of the model, flat, for each batch of inputs."""
    with _full_float32():
        return [
            [np.asarray(y) for y in keras.tree.flatten(model(x, training=False))]
            for x in batches
        ]


def run_saved_model(path, batches):
    """Outputs of a SavedModel, flat, for each batch: a flat list of inputs."""
    loaded = tf.saved_model.load(path)  # its variables live as long as this name
    endpoint = loaded.serve
    (structure,), _ = endpoint.concrete_functions[0].structured_input_signature
    results = []
    with _full_float32():
        for flat in batches:
            packed = tf.nest.pack_sequence_as(structure, flat)
            results.append([y.numpy() for y in tf.nest.flatten(endpoint(packed))])
    return results


class _full_float32:
    """Keeps TensorFlow from rounding float32 products on a GPU."""

    def __enter__(self):
        self._enabled = tf.config.experimental.tensor_float_32_execution_enabled()
        tf.config.experimental.enable_tensor_float_32_execution(False)

    def __exit__(self, *_):
        tf.config.experimental.enable_tensor_float_32_execution(self._enabled)
