"""Run under one backend: prints the multiply-accumulates of all architectures, JSON.

python -m tests.parity.profiles
"""

import json

import keras_edifice
from keras_edifice.backends.signature import shapes
from keras_edifice.profiling import build_without_weights


def counted(name):
    model = build_without_weights(name, **keras_edifice.info(name).tiny)
    axes = {axis for shape in shapes(model) for axis in shape if axis != "batch"}
    sizes = {axis: 32 for axis in axes if isinstance(axis, str)}
    return keras_edifice.profile(model, **sizes).multiply_accumulates


if __name__ == "__main__":
    names = keras_edifice.list_architectures()
    print(json.dumps({name: counted(name) for name in names}))
