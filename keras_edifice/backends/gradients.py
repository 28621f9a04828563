"""The gradient of a function, which Keras leaves to each backend.

Each function has the signature (function, args, cotangent) -> (value, gradients); use
it through `keras_edifice.ops.gradients`. All three can be differentiated again.
"""

import keras


def backend_vjp(function, args, cotangent):
    """(function(*args), gradients of sum(function(*args) * cotangent) in each arg)."""
    run = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}
    return run[keras.backend.backend()](function, args, cotangent)


def _tensorflow(function, args, cotangent):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(args)
        value = function(*args)
    zero = tf.UnconnectedGradients.ZERO
    return value, tape.gradient(value, args, cotangent, unconnected_gradients=zero)


def _jax(function, args, cotangent):
    import jax

    value, pull_back = jax.vjp(function, *args)
    return value, list(pull_back(cotangent))


def _torch(function, args, cotangent):
    import torch

    again = torch.is_grad_enabled()  # then the gradient is itself part of the graph
    with torch.enable_grad():
        # A view is not on the path from one argument to another computed from it.
        args = [
            x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
            for x in args
        ]
        value = function(*args)
        if not value.requires_grad:  # constant in every argument
            return value, [torch.zeros_like(x) for x in args]
        gradients = torch.autograd.grad(
            value, args, cotangent, create_graph=again, allow_unused=True
        )
    pairs = zip(gradients, args, strict=True)
    gradients = [torch.zeros_like(x) if g is None else g for g, x in pairs]
    return (value, gradients) if again else (value.detach(), gradients)
