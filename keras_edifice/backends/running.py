"""A function of tensors and weights, compiled to be called again and again."""

import keras


def inference(function, variables):
    """The function without gradients, compiled on JAX and TensorFlow.

    Args:
        function: of tensors in nested structures, giving the same.
        variables: the Keras variables that it reads; it sees their present values.
    """
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.function(function, reduce_retracing=True, autograph=False)
    if backend == "torch":
        import torch

        return torch.no_grad()(function)
    return _jax(function, variables)


def _jax(function, variables):
    import jax

    @jax.jit
    def run(values, arguments):
        scope = keras.StatelessScope(zip(variables, values, strict=True))
        with scope:
            return function(*arguments)

    return lambda *arguments: run([v.value for v in variables], arguments)


def let_go():
    """Frees models that nothing refers to any more, and what was compiled for them."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        jax.clear_caches()
    elif backend == "tensorflow":
        _forget_custom_gradients()
    keras.backend.clear_session()  # collects garbage


def _forget_custom_gradients():
    """TensorFlow registers each that it traces, with its graph, and keeps it else."""
    from tensorflow.python.framework.ops import gradient_registry

    registered = gradient_registry._registry
    for name in [name for name in registered if name.startswith("CustomGradient-")]:
        del registered[name]
