import json
import os
import subprocess
import sys

import pytest

import keras_edifice

BACKENDS = ("tensorflow", "jax", "torch")
UNUSED = {"titans"}
"""Compute what is not needed in the end, such as the update after the last token."""


@pytest.fixture(scope="session")
def counts():
    """Backend -> architecture -> multiply-accumulates."""
    processes = {
        backend: subprocess.Popen(
            [sys.executable, "-m", "tests.parity.profiles"],
            env={**os.environ, "KERAS_BACKEND": backend},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for backend in BACKENDS
    }
    found = {}
    for backend, process in processes.items():
        text, errors = process.communicate()
        assert process.returncode == 0, errors
        found[backend] = json.loads(text)
    return found


@pytest.mark.parametrize("name", keras_edifice.list_architectures())
def test_backends_count_the_same_products(name, counts):
    tensorflow, jax, torch = (counts[backend][name] for backend in BACKENDS)
    assert tensorflow == jax > 0
    assert torch > jax if name in UNUSED else torch == jax
