import os
import sys

import pytest

from keras_edifice.backends import selection


@pytest.fixture
def fresh(monkeypatch):
    """As if nothing were chosen or imported; gives the dict of what is installed."""
    monkeypatch.delitem(sys.modules, "keras")
    monkeypatch.setenv("KERAS_BACKEND", "")  # so that the old value comes back
    monkeypatch.delenv("KERAS_BACKEND")
    monkeypatch.setattr(selection, "picked", None)
    here = dict.fromkeys(selection.BACKENDS, True)
    monkeypatch.setattr(selection, "installed", here.get)
    return here


def test_the_first_installed_backend_is_picked(fresh):
    fresh["jax"] = False
    assert selection.select_backend() is None
    assert selection.picked == os.environ["KERAS_BACKEND"] == "torch"


def test_a_wish_wins(fresh, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    assert selection.select_backend() is None
    assert selection.picked is None
    assert os.environ["KERAS_BACKEND"] == "tensorflow"


def test_a_wish_that_is_not_installed_is_told(fresh, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    fresh["torch"] = False
    line = selection.select_backend()
    assert line == (
        "KERAS_BACKEND is 'torch', but that package is not installed; "
        'run: pip install "keras_edifice[torch]"'
    )


def test_no_backend_at_all_is_told(fresh):
    fresh.update(dict.fromkeys(fresh, False))
    line = selection.select_backend()
    assert "jax, torch, tensorflow, found none; run: pip install" in line
    assert "\n" not in line


def test_an_imported_keras_is_left_alone(fresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "keras", object())
    fresh.update(dict.fromkeys(fresh, False))
    assert selection.select_backend() is None and selection.picked is None
