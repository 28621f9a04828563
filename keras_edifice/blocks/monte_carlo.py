"""The base of models whose layers draw: many predictions of one input."""

import keras
from keras import ops

from keras_edifice.model import EdificeModel


class MonteCarloModel(EdificeModel):
    """A chain of layers, those with a method `sample(x, seed)` being random.

    `sample` takes (draws, batch, features), each draw with randomness of its own.
    """

    def draw(self, x, num_samples, seed=None):
        """Random predictions for the same inputs.

        Args:
            x: (batch, features).
            num_samples: number of draws; all of them are computed at once.
            seed: makes the result repeatable; None continues the layers' own draws.

        Returns:
            Array (num_samples, batch, outputs). Layers that do not draw run as at
            inference.
        """
        if num_samples < 1:
            raise ValueError(
                f"num_samples must be at least 1, received {num_samples}; draw more"
            )
        self._check_shapes(x)
        generator = None if seed is None else keras.random.SeedGenerator(seed)
        h = ops.repeat(ops.expand_dims(ops.convert_to_tensor(x), 0), num_samples, 0)
        for layer in self.layers:
            if hasattr(layer, "sample"):
                h = layer.sample(h, generator)
            elif not isinstance(layer, keras.layers.InputLayer):
                y = layer(ops.reshape(h, (-1, *h.shape[2:])))
                h = ops.reshape(y, (num_samples, -1, *y.shape[1:]))
        return ops.convert_to_numpy(ops.cast(h, "float32"))

    def draw_probabilities(self, x, num_samples, seed=None):
        """`draw` for a classifier: a head that gives logits is followed by softmax."""
        draws = self.draw(x, num_samples, seed)
        if self.options.get("classifier_activation") in (None, "linear"):
            draws = ops.convert_to_numpy(ops.softmax(ops.convert_to_tensor(draws), -1))
        return draws

    @property
    def classifies(self):
        """Whether the outputs are scores of classes."""
        return self.options.get("num_classes") is not None
