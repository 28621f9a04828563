import importlib.metadata

import keras

from keras_edifice.backends.versions import version


def test_a_version_is_that_of_the_distribution():
    assert version("keras") == keras.__version__
    assert version("sklearn") == importlib.metadata.version("scikit-learn")


def test_what_is_not_installed_has_none():
    assert version("no_such_package") is None


def test_a_package_without_a_distribution_is_unknown(tmp_path, monkeypatch):
    (tmp_path / "loose_package.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert version("loose_package") == "unknown"
