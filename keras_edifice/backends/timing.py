"""A function with its gradient, compiled as `fit` would compile it, run to its end."""

import keras
import numpy as np


def forward(function, arrays):
    """A callable that computes function(*arrays) and waits for the result."""
    run = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}
    return run[keras.backend.backend()](function, arrays, False)


def forward_and_backward(function, arrays):
    """The same with the gradient of the sum of the results in every float array.

    Args:
        function: of tensors, giving one tensor.
        arrays: its arguments.
    """
    run = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}
    return run[keras.backend.backend()](function, arrays, True)


def _is_float(array):
    return np.asarray(array).dtype.kind == "f"


def _tensorflow(function, arrays, backward):
    import tensorflow as tf

    tensors = [tf.convert_to_tensor(x) for x in arrays]

    @tf.function
    def run(*tensors):
        watched = [x for x in tensors if x.dtype.is_floating]
        with tf.GradientTape() as tape:
            tape.watch(watched)
            value = function(*tensors)
            total = tf.reduce_sum(value)
        return tape.gradient(total, watched) if backward else value

    def wait():
        for x in tf.nest.flatten(run(*tensors)):
            x.numpy()

    return wait


def _jax(function, arrays, backward):
    import jax

    tensors = [jax.numpy.asarray(x) for x in arrays]
    run = function
    if backward:
        places = tuple(i for i, x in enumerate(arrays) if _is_float(x))
        run = jax.grad(lambda *x: function(*x).sum(), argnums=places)
    run = jax.jit(run)
    return lambda: jax.block_until_ready(run(*tensors))


def _torch(function, arrays, backward):
    import torch

    tensors = [torch.as_tensor(x) for x in arrays]
    if not backward:

        def run():
            with torch.no_grad():
                function(*tensors)

        return run
    watched = [x.requires_grad_() for x in tensors if x.is_floating_point()]
    return lambda: torch.autograd.grad(function(*tensors).sum(), watched)
