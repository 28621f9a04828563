"""Exports and results of a model while JAX is the backend."""

import functools

import jax
import keras
import numpy as np

from keras_edifice.backends.signature import shapes, specs


def jax2tf(model, path):
    """Writes a SavedModel. It cannot be trained further.

    Without the gradient more operators can be written: valid, strided and depthwise
    convolutions fail while the gradient of an unknown size is traced.
    """
    polymorphic = [f"({', '.join(map(str, shape))})" for shape in shapes(model)]
    keras.Model.export(
        model,
        path,
        "tf_saved_model",
        verbose=False,
        input_signature=[specs(model)],
        jax2tf_kwargs={
            "with_gradient": False,
            "polymorphic_shapes": [
                keras.tree.pack_sequence_as(model.input, polymorphic)
            ],
        },
    )


def jax2onnx(model, path):
    """Writes ONNX."""
    import jax2onnx

    def call(*flat):
        packed = keras.tree.pack_sequence_as(model.input, flat)
        return tuple(keras.tree.flatten(model(packed, training=False)))

    jax2onnx.to_onnx(
        call,
        inputs=[
            jax.ShapeDtypeStruct(tuple(shape), np.dtype(x.dtype))
            for shape, x in zip(shapes(model), model.inputs, strict=True)
        ],
        input_names=[x.name for x in model.inputs],
        return_mode="file",
        output_path=path,
    )


# The few runs of a check are shorter than the passes that would make them faster.
_QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def predict(model, batches):
    """Outputs of the model, flat, for each batch of inputs."""

    @functools.partial(jax.jit, compiler_options=_QUICK)
    def call(trainable, state, inputs):
        return model.stateless_call(trainable, state, inputs, training=False)

    trainable = [v.value for v in model.trainable_variables]
    state = [v.value for v in model.non_trainable_variables]
    results = []
    with jax.default_matmul_precision("highest"):
        for x in batches:
            y, state = call(trainable, state, x)
            results.append([np.asarray(y) for y in keras.tree.flatten(y)])
    return results
