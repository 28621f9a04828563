"""Functions of tensors, compiled where that is the faster way to run them once."""

import keras


def compiled(function):
    """On JAX the function compiled whole: its operations compile one by one else."""
    if keras.backend.backend() != "jax":
        return function
    import jax

    return jax.jit(function)
