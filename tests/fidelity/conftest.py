"""The table of architecture, reference and difference that the fidelity tests fill."""

import json
import os
from pathlib import Path

import pytest

LIMIT = 1e-4
"""Largest relative difference from the reference, in float32."""


class Fidelity:
    """Checks measured differences and keeps them for the table."""

    def __init__(self, folder):
        self.folder = folder

    def record(self, architecture, reference, forward, gradient):
        """Asserts that both differences are within the limit, then keeps them."""
        assert 0 <= forward <= LIMIT, (
            f"{architecture}: forward differs by {forward:.1e}"
        )
        assert 0 <= gradient <= LIMIT, (
            f"{architecture}: gradient differs by {gradient:.1e}"
        )
        row = dict(
            architecture=architecture,
            reference=reference,
            forward=float(forward),
            gradient=float(gradient),
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{architecture}.json").write_text(json.dumps(row))


@pytest.fixture
def fidelity():
    """Records how far an architecture is from its independent implementation."""
    return Fidelity(Path(os.environ.get("FIDELITY_RESULTS", "build/fidelity")))
