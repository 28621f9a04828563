"""Inputs of the right shapes for any model, for checks and examples."""

import zlib

import keras
import numpy as np


def sample_inputs(model, batch_size=2, length=7, seed=0):
    """Random inputs for `model`, in the structure that it takes.

    Args:
        model: a functional Keras model.
        batch_size: number of examples.
        length: size of every other axis that the model leaves open.
        seed: of the random numbers.

    Returns:
        NumPy arrays: normal numbers; for integer inputs 0 and 1; ones for masks;
        a symmetric 0/1 matrix without loops for an adjacency.
    """

    def sample(tensor):
        # By name: backends walk through a structure in different orders.
        rng = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
        sizes = [length if size is None else size for size in tensor.shape[1:]]
        shape, name = (batch_size, *sizes), tensor.name
        if "mask" in name:
            return np.ones(shape, tensor.dtype)
        if "adjacency" in name:
            upper = np.triu(rng.integers(0, 2, shape), k=1)
            return (upper + np.swapaxes(upper, -1, -2)).astype(tensor.dtype)
        if "int" in tensor.dtype:
            return rng.integers(0, 2, shape).astype(tensor.dtype)
        return rng.normal(size=shape).astype("float32")

    return keras.tree.map_structure(sample, model.input)
