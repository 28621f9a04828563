"""Neural-network architectures, true to their papers, for Keras 3.

>>> import keras_edifice
>>> model = keras_edifice.build("mamba", embed_size=64, hidden_size=128)
"""

from keras_edifice.backends.selection import select_backend as _select_backend

__version__ = "0.1.0"

_unusable = _select_backend()

if _unusable is None:
    from keras_edifice.registry import (
        architecture,
        build,
        classifier,
        info,
        list_architectures,
        list_families,
        load_all,
        load_plugins,
        search,
    )

    load_all()

    from keras_edifice import layers
    from keras_edifice.comparison import compare
    from keras_edifice.exporting import export
    from keras_edifice.model import EdificeModel
    from keras_edifice.profiling import Profile, profile
    from keras_edifice.streaming import StreamingModel, streaming

    __all__ = [
        "EdificeModel",
        "Profile",
        "StreamingModel",
        "architecture",
        "build",
        "classifier",
        "compare",
        "export",
        "info",
        "layers",
        "list_architectures",
        "list_families",
        "profile",
        "search",
        "streaming",
    ]

    load_plugins()
else:

    def __getattr__(name):
        raise ImportError(_unusable)
