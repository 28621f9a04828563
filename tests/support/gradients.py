"""Gradients of a scalar in the weights and in an input, on the active backend."""

import keras
import numpy as np


def gradients(model, inputs, loss, training=False):
    """d loss(model(inputs)) in the trainable weights and in the inputs.

    Args:
        model: a built model or layer.
        inputs: array or structure of arrays (float arrays are differentiated).
        loss: function of the outputs, in keras.ops, giving a scalar.
        training: passed to the call.

    Returns:
        (list of arrays in the order of `model.trainable_variables`, None where the
        loss does not depend on one; array of the first float input's gradient).
    """
    flat = keras.tree.flatten(inputs)
    first = next(i for i, x in enumerate(flat) if np.asarray(x).dtype.kind == "f")
    run = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}
    return run[keras.backend.backend()](model, inputs, flat, first, loss, training)


def _tensorflow(model, inputs, flat, first, loss, training):
    import tensorflow as tf

    flat = [tf.convert_to_tensor(x) for x in flat]
    weights = [v.value for v in model.trainable_variables]
    with tf.GradientTape() as tape:
        tape.watch(flat[first])
        packed = keras.tree.pack_sequence_as(inputs, flat)
        value = loss(model(packed, training=training))
    *by_weight, by_input = tape.gradient(value, [*weights, flat[first]])
    return [None if g is None else _dense(g) for g in by_weight], _dense(by_input)


def _dense(gradient):
    import tensorflow as tf

    return None if gradient is None else tf.convert_to_tensor(gradient).numpy()


def _jax(model, inputs, flat, first, loss, training):
    import jax

    flat = [jax.numpy.asarray(x) for x in flat]  # Keras refuses a mix with arrays
    fixed = [v.value for v in model.non_trainable_variables]

    def value(weights, x):
        packed = keras.tree.pack_sequence_as(
            inputs, [*flat[:first], x, *flat[first + 1 :]]
        )
        variables = [*model.trainable_variables, *model.non_trainable_variables]
        values = [*weights, *fixed]
        # Not `stateless_call`, which wants every layer to take `training`.
        with keras.StatelessScope(zip(variables, values, strict=True)):
            return loss(model(packed, training=training))

    weights = [v.value for v in model.trainable_variables]
    x = flat[first]
    by_weight, by_input = jax.jit(jax.grad(value, argnums=(0, 1)))(weights, x)
    return [np.asarray(g) for g in by_weight], np.asarray(by_input)


def _torch(model, inputs, flat, first, loss, training):
    import torch

    flat = [torch.as_tensor(x) for x in flat]
    flat[first] = flat[first].clone().requires_grad_(True)
    weights = [v.value for v in model.trainable_variables]
    packed = keras.tree.pack_sequence_as(inputs, flat)
    value = loss(model(packed, training=training))
    wanted = [*weights, flat[first]]
    found = torch.autograd.grad(value, wanted, allow_unused=True)
    *by_weight, by_input = [None if g is None else g.numpy() for g in found]
    return by_weight, by_input
