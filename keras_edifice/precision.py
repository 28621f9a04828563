"""A model again in float32: what exports are made of."""

import keras

_LOW = ("mixed_bfloat16", "mixed_float16", "bfloat16", "float16")


def in_float32(model):
    """`model` itself if it computes in float32, else a copy of it that does.

    Every dtype policy of the configuration becomes float32 and the weights are
    copied. Quantised layers stay quantised.
    """
    if not any(_is_low(layer) for layer in model._flatten_layers()):
        return model
    config = _raised(keras.saving.serialize_keras_object(model))
    config.pop("compile_config", None)  # losses and metrics are not needed
    classes = {type(part).__name__: type(part) for part in model._flatten_layers()}
    copy = keras.saving.deserialize_keras_object(config, classes, safe_mode=False)
    copy.set_weights(model.get_weights())
    return copy


def _is_low(layer):
    return layer.compute_dtype in _LOW or layer.variable_dtype in _LOW


def _raised(config):
    """A configuration with float32 where it names a dtype or policy of 16 bits."""
    if isinstance(config, dict):
        return {key: _raised(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return type(config)(_raised(value) for value in config)
    return "float32" if isinstance(config, str) and config in _LOW else config
