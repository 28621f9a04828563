"""The model class that every architecture returns."""

import json

import keras

from keras_edifice.backends.functional_torch import FreesIntermediates
from keras_edifice.ops.tracing import export_scope


@keras.saving.register_keras_serializable("keras_edifice")
class EdificeModel(FreesIntermediates, keras.Model):
    """A functional model that knows the architecture and the options it came from.

    Use it as any Keras model. Subclasses define `compute_loss` where an architecture
    has an objective of its own; they read the options from `self.options`.

    Attributes:
        architecture: name of the architecture, or None.
        options: the options it was built with, defaults included.
    """

    # Keras sees a functional model only if the arguments have these two names.
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.architecture = None
        self._options = "{}"  # JSON: Keras would wrap a dict to track its contents

    @property
    def options(self) -> dict:
        """The options this model was built with, defaults included."""
        return json.loads(self._options)

    def describe(self, architecture: str, options: dict):
        """Notes where the model comes from. Returns the model."""
        self.architecture, self._options = architecture, json.dumps(options)
        return self

    def get_config(self):
        config = super().get_config()
        return {**config, "architecture": self.architecture, "options": self.options}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        origin = config.pop("architecture", None), config.pop("options", {})
        return super().from_config(config, custom_objects).describe(*origin)

    def __call__(self, inputs, *args, **kwargs):
        self._check_shapes(inputs)
        return super().__call__(inputs, *args, **kwargs)

    def compute_mask(self, inputs, previous_mask=None):
        return None  # a mask travels through the layers, which mark the outputs

    def stateless_call(self, trainable, non_trainable, inputs, *args, **kwargs):
        self._check_shapes(inputs)  # `fit` and `predict` come this way on JAX
        return super().stateless_call(trainable, non_trainable, inputs, *args, **kwargs)

    def _check_shapes(self, inputs):
        received = keras.tree.flatten(inputs)
        if len(received) != len(self.inputs):
            return  # Keras names the inputs that are missing
        for expected, x in zip(self.inputs, received, strict=True):
            shape = getattr(x, "shape", None)
            if shape is None or _fits(expected.shape, tuple(shape)):
                continue
            raise ValueError(
                f"{self.name} expected {expected.name} of shape "
                f"{_readable(expected.shape)}, received {_readable(shape)}; "
                "reshape the data or build the model with other sizes"
            )

    def fit(self, x=None, y=None, **kwargs):
        """Trains as `keras.Model.fit`; layers that ask learn the number of examples."""
        size = _num_examples(x, kwargs.get("validation_split", 0.0))
        for layer in self._flatten_layers():
            if size is not None and hasattr(layer, "set_num_examples"):
                layer.set_num_examples(size)
        return super().fit(x, y, **kwargs)

    def export(self, filepath, format="onnx", **kwargs):
        """Writes ONNX or SavedModel by `keras_edifice.export`, others as Keras does."""
        if format in ("onnx", "saved_model", "tf_saved_model"):
            from keras_edifice.exporting import export

            return export(self, filepath, format.removeprefix("tf_"), **kwargs)
        with export_scope(format):
            return super().export(filepath, format=format, **kwargs)


def _fits(expected, shape):
    """Whether Keras would take `shape`; it adds or drops a last axis of size one."""
    if len(shape) == len(expected) + 1 and shape[-1] == 1:
        shape = shape[:-1]
    elif len(shape) == len(expected) - 1 and expected[-1] == 1:
        shape = (*shape, 1)
    return len(shape) == len(expected) and all(
        want is None or type(size) is not int or want == size
        for want, size in zip(expected[1:], shape[1:], strict=True)
    )


def _readable(shape):
    sizes = ["batch", *("any" if size is None else str(size) for size in shape[1:])]
    return f"({', '.join(sizes)})" if shape else "()"


def _num_examples(x, validation_split):
    """Examples that an epoch trains on; None if `x` does not say."""
    leaf = next(iter(keras.tree.flatten(x)), None) if x is not None else None
    shape = getattr(leaf, "shape", None)
    return max(1, int(shape[0] * (1.0 - validation_split))) if shape else None
