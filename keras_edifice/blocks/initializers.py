"""Initialisers of transformers for images."""

from keras.initializers import RandomNormal, TruncatedNormal, VarianceScaling


def matrix_initializer(kind, parts=1):
    """For the kernel of a dense layer. A new one for each layer.

    Args:
        kind: "xavier", uniform as in the code of Dosovitskiy et al. 2020, or
            "truncated", normal with deviation 0.02 as in Touvron et al. 2020.
        parts: number of square matrices that the kernel fuses, side by side; each is
            initialised as if it stood alone.

    Raises:
        ValueError: unknown kind.
    """
    if kind == "xavier":
        return VarianceScaling((1 + parts) / 2, "fan_avg", "uniform")
    if kind == "truncated":
        return TruncatedNormal(stddev=0.02)
    raise ValueError(
        f"initializer must be one of 'xavier', 'truncated', received {kind!r}"
    )


def mlp_bias_initializer(kind):
    """For the biases of a channel MLP."""
    return RandomNormal(stddev=1e-6) if kind == "xavier" else "zeros"
