"""Stochastic depth: whole residual branches are dropped, example by example.

    y = x · b / (1 - p),    b ~ Bernoulli(1 - p) for each example

Huang et al. 2016, Deep Networks with Stochastic Depth, arXiv:1603.09382, eq. 2; the
division keeps the expectation, so that nothing is scaled at inference.
"""

import keras
from keras import layers, ops


@keras.saving.register_keras_serializable("keras_edifice")
class DropPath(layers.Layer):
    """(batch, ...) -> the same, or zeros for a dropped example; identity at inference.

    Args:
        rate: probability that the branch of an example is dropped.
        seed: of the random numbers.
    """

    per_step = True

    def __init__(self, rate, seed=None, **kwargs):
        super().__init__(**kwargs)
        if not 0 <= rate < 1:
            raise ValueError(f"rate must be >= 0 and < 1, received {rate!r}")
        self.rate, self.seed = rate, seed
        self.seed_generator = keras.random.SeedGenerator(seed) if rate else None
        self.supports_masking = True

    def call(self, x, training=False):
        if not training or self.rate == 0:
            return x
        shape = (ops.shape(x)[0],) + (1,) * (len(x.shape) - 1)
        draw = keras.random.uniform(shape, dtype="float32", seed=self.seed_generator)
        kept = ops.cast(draw >= self.rate, "float32") / (1 - self.rate)
        return x * ops.cast(kept, x.dtype)

    def compute_output_shape(self, input_shape):
        return input_shape


def drop_path_rates(largest, depth):
    """Rates that grow linearly from 0 at the first of `depth` blocks to `largest`."""
    return [largest * i / max(depth - 1, 1) for i in range(depth)]
