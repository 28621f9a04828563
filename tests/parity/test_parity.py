import os
import subprocess
import sys

import numpy as np
import pytest

import keras_edifice
from tests.support.close import difference

BACKENDS = ("tensorflow", "jax", "torch")
LIMIT = 1e-4


def start(verb, folder, backend):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.parity.outputs", verb, str(folder)],
        env={**os.environ, "KERAS_BACKEND": backend},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    _, errors = process.communicate()
    assert process.returncode == 0, errors


@pytest.fixture(scope="session")
def outputs(tmp_path_factory):
    """Folder with each backend's outputs of the models that one of them saved."""
    folder = tmp_path_factory.mktemp("parity")
    finish(start("make", folder, "jax"))
    for process in [start("run", folder, backend) for backend in BACKENDS]:
        finish(process)
    return folder


def load(outputs, backend, name):
    with np.load(outputs / backend / f"{name}.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("name", keras_edifice.list_architectures())
@pytest.mark.parametrize("backend", ["tensorflow", "torch"])
def test_same_weights_give_the_same_outputs(name, backend, outputs):
    expected = load(outputs, "jax", name)
    found = load(outputs, backend, name)
    assert found.keys() == expected.keys() and found
    for key, y in found.items():
        assert np.isfinite(y).all()
        assert np.abs(expected[key]).max() > 0
        assert difference(y, expected[key]) <= LIMIT
