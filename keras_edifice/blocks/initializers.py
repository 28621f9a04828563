"""Initialisers of transformers for images."""

from keras.initializers import RandomNormal, TruncatedNormal, VarianceScaling


def matrix_initializer(kind, parts=1):
    """For the kernel of a dense layer. A new one for each layer.

    Args:
        kind: "xavier", uniform as in the code of Dosovitskiy et al. 2020;
            "truncated", normal with deviation 0.02 as in Touvron et al. 2020; or
            "lecun", normal with variance 1 / fan_in as in Tolstikhin et al. 2021.
        parts: number of square matrices that the kernel fuses, side by side; each is
            initialised as if it stood alone.

    Raises:
        ValueError: unknown kind.
    """
    if kind == "xavier":
        return VarianceScaling((1 + parts) / 2, "fan_avg", "uniform")
    if kind == "truncated":
        return TruncatedNormal(stddev=0.02)
    if kind == "lecun":
        return VarianceScaling(1.0, "fan_in", "truncated_normal")
    raise ValueError(
        f"initializer must be one of 'xavier', 'truncated', 'lecun', received {kind!r}"
    )


def mlp_bias_initializer(kind):
    """For the biases of a channel MLP."""
    return RandomNormal(stddev=1e-6) if kind == "xavier" else "zeros"
