"""The base of layers that are made of other layers."""

import inspect

import keras
from keras import layers


class Composite(layers.Layer):
    """A layer with sub-layers, whose quantised sub-layers survive saving.

    Quantising a model changes the dtype policy of single sub-layers. The config has
    to name them, or a saved model is rebuilt with float weights. Sub-layers are made
    with `dtype=self.dtype_policy`; then the map below reaches them.

    Constructor arguments are kept as attributes of the same names: the config.
    """

    def get_config(self):
        arguments = inspect.signature(type(self).__init__).parameters
        own = [name for name in arguments if name not in ("self", "kwargs")]
        config = super().get_config()
        config |= {name: _plain(getattr(self, name)) for name in own}
        quantized = {
            layer.path: _policy(layer, layer.path)
            for layer in self._flatten_layers(include_self=False)
            if layer.quantization_mode is not None
        }
        if quantized:
            default = _policy(self, self.path)
            config["dtype"] = keras.dtype_policies.DTypePolicyMap(default, quantized)
        return config


def _policy(layer, path):
    """The dtype policy of a layer, which may hold a map of them after loading."""
    policy = layer.dtype_policy
    is_map = isinstance(policy, keras.dtype_policies.DTypePolicyMap)
    return policy[path] if is_map else policy


def _plain(value):
    """Without the wrappers that Keras puts around lists and dicts."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
