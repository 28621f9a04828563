"""Every public layer of the package by its class name.

>>> from keras_edifice.layers import MambaBlock
"""

import inspect
import sys

import keras


def _public_layers():
    package = __name__.rpartition(".")[0]
    for name, module in sorted(sys.modules.items()):
        if not name.startswith(f"{package}."):
            continue
        for cls in list(vars(module).values()):
            if (
                inspect.isclass(cls)
                and issubclass(cls, keras.layers.Layer)
                and not issubclass(cls, keras.Model)
                and cls.__module__ == name
                and not cls.__name__.startswith("_")
            ):
                yield cls


__all__ = []  # filled below from the modules that are loaded
for _layer in _public_layers():
    globals()[_layer.__name__] = _layer
    __all__ += [_layer.__name__]
