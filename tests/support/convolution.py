"""Convolutions and units of convolution, normalisation, activation in float64."""

import numpy as np

from tests.support.close import to_numpy


def values(model):
    """Path of each weight -> its value."""
    return {w.path: to_numpy(w) for w in model.weights}


def padded(x, size, strides, padding):
    """Zeros around the sides of x: "symmetric", "same" as TensorFlow, or "valid"."""
    widths = [(0, 0)]
    for side in x.shape[1:3]:
        total = max((-(-side // strides) - 1) * strides + size - side, 0)
        before = {"symmetric": size // 2, "same": total // 2, "valid": 0}[padding]
        after = {"symmetric": size // 2, "same": total - before, "valid": 0}[padding]
        widths.append((before, after))
    return np.pad(x, [*widths, (0, 0)])


def convolve(x, kernel, strides=1, padding="symmetric", depthwise=False):
    """x (b, h, w, c) by a kernel (k, k, c, d), or (k, k, c, 1) for each channel."""
    size = kernel.shape[0]
    x = padded(x, size, strides, padding)
    rows, columns = ((side - size) // strides + 1 for side in x.shape[1:3])
    y = 0.0
    for i in range(size):
        below = x[:, i : i + strides * rows : strides]
        for j in range(size):
            places, k = below[:, :, j : j + strides * columns : strides], kernel[i, j]
            y = y + (places * k[:, 0] if depthwise else places @ k)
    return y


def batch_norm(x, w, name, epsilon=1e-5):
    """With the moving statistics, as at inference."""
    scale = w[f"{name}/gamma"] / np.sqrt(w[f"{name}/moving_variance"] + epsilon)
    return (x - w[f"{name}/moving_mean"]) * scale + w[f"{name}/beta"]


def conv_unit(
    x, w, name, strides=1, activation=None, padding="symmetric", epsilon=1e-5
):
    """The unit of this name in a model; a depthwise one has "depthwise" in it."""
    kernel = w[f"{name}_conv/kernel"]
    y = convolve(x, kernel, strides, padding, depthwise="depthwise" in name)
    y = batch_norm(y, w, f"{name}_norm", epsilon)
    return activation(y) if activation else y


def shake_statistics(model, seed=1):
    """Moves the normalisations' averages away from zero and one. Returns the model."""
    rng = np.random.default_rng(seed)
    for weight in model.non_trainable_variables:
        if weight.name == "moving_mean":
            weight.assign(0.3 * rng.normal(size=weight.shape))
        if weight.name == "moving_variance":
            weight.assign(rng.uniform(0.5, 2.0, size=weight.shape))
    return model
