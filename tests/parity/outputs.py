"""Run under one backend: makes the models, or writes the outputs of made ones.

python -m tests.parity.outputs make FOLDER
python -m tests.parity.outputs run FOLDER
"""

import sys
from pathlib import Path

import keras
import numpy as np

import keras_edifice
from keras_edifice.samples import sample_inputs
from tests.support.shaking import shake


def make(folder):
    for name in keras_edifice.list_architectures():
        keras.utils.set_random_seed(5)
        model = keras_edifice.build(name, **keras_edifice.info(name).tiny)
        shake(model).save(folder / f"{name}.keras")


def run(folder):
    target = folder / keras.backend.backend()
    target.mkdir()
    for name in keras_edifice.list_architectures():
        model = keras.saving.load_model(folder / f"{name}.keras", safe_mode=True)
        outputs = model.predict(sample_inputs(model, seed=6), verbose=0)
        named = outputs if isinstance(outputs, dict) else {"outputs": outputs}
        np.savez(target / f"{name}.npz", **named)


if __name__ == "__main__":
    {"make": make, "run": run}[sys.argv[1]](Path(sys.argv[2]))
