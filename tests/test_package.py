"""Rules of the house that hold for every file."""

import ast
import re
from pathlib import Path

import keras
import pytest

import keras_edifice
from keras_edifice.registry import _architectures

PACKAGE = Path(keras_edifice.__file__).parent
TESTS = Path(__file__).parent
ROOT = TESTS.parent
MODULES = sorted(p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py"))
BACKENDS = {"tensorflow", "jax", "jaxlib", "torch", "tf2onnx", "jax2onnx"}
OUTSIDE = {"keras", "numpy", "keras_edifice"}
# Optional parts are imported where they are used. The verbs are loaded by `cli.py`,
# what is named after a backend only under it.
OPTIONAL = {
    "commands.py": {"typer", "rich"},
    "backends/export_jax.py": {"jax"},
    "backends/export_tensorflow.py": {"tensorflow"},
    "backends/export_torch.py": {"torch"},
    "backends/products_jax.py": {"jax"},
    "backends/products_tensorflow.py": {"tensorflow"},
    "backends/products_torch.py": {"torch"},
    "backends/transposed_torch.py": {"torch"},
}


def imports(path, top_level_only=False):
    tree = ast.parse((PACKAGE / path).read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_only_the_backends_folder_imports_a_backend(path):
    if path.parts[0] != "backends":
        assert not BACKENDS & set(imports(path))


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_importing_needs_keras_and_numpy_alone(path):
    import sys

    needed = set(imports(path, top_level_only=True))
    needed -= OPTIONAL.get(str(path), set())
    assert needed <= OUTSIDE | set(sys.stdlib_module_names)


LAYER_MODULES = [
    p
    for p in MODULES
    if len(p.parts) == 2 and p.parts[0] not in ("backends", "benchmark", "comparison")
]


@pytest.mark.parametrize("path", LAYER_MODULES, ids=str)
def test_layers_use_public_keras_alone(path):
    text = (PACKAGE / path).read_text()
    for word in ("keras.src", "Lambda(", "train_step", "keras.backend.backend()"):
        assert word not in text, word


@pytest.mark.parametrize("path", LAYER_MODULES, ids=str)
def test_every_module_has_its_mirrored_test(path):
    if path.name != "__init__.py":
        assert (TESTS / path.parent / f"test_{path.name}").exists()


@pytest.mark.parametrize("name", keras_edifice.list_architectures())
def test_every_architecture_is_compared_with_a_reference(name):
    module = keras_edifice.info(name).builder.__module__.rpartition(".")[2]
    assert (TESTS / "fidelity" / f"test_{module}.py").exists()


@pytest.mark.parametrize("name", keras_edifice.list_architectures())
def test_an_architecture_is_in_the_folder_of_its_family(name):
    entry = _architectures[name]
    assert entry.builder.__module__.split(".")[1] == entry.family


def test_every_layer_can_be_imported_and_is_registered():
    assert "LayerNorm" in keras_edifice.layers.__all__
    for name in keras_edifice.layers.__all__:
        cls = getattr(keras_edifice.layers, name)
        registered = keras.saving.get_registered_name(cls)
        if cls is not keras_edifice.layers.Composite:  # a base, never saved itself
            assert registered == f"keras_edifice>{name}"


@pytest.mark.parametrize("name", keras_edifice.layers.__all__)
def test_layer_docstrings_begin_with_the_shapes(name):
    doc = getattr(keras_edifice.layers, name).__doc__
    assert name == "Composite" or re.match(
        r".*\(.*\) ?-> ?.+|.*->", doc.split("\n")[0]
    ), doc
