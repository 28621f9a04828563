"""Weights that hide nothing: biases away from zero, scales away from one."""

import numpy as np


def shake(model, scale=0.3, seed=0):
    """Adds normal noise to every trainable weight, so that each one matters."""
    rng = np.random.default_rng(seed)
    for weight in model.trainable_variables:
        noise = rng.normal(size=weight.shape) * scale
        weight.assign(weight.numpy() + noise.astype("float32"))
    return model
