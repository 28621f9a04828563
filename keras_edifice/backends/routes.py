"""The ways to write an artefact: which backend writes which format, by what."""

import contextlib
import importlib
import importlib.util
import io
import logging
import os
import warnings
from dataclasses import dataclass

import keras

from keras_edifice.backends import child
from keras_edifice.backends.selection import installed
from keras_edifice.backends.signature import open_axes
from keras_edifice.ops.tracing import export_scope


@dataclass(frozen=True)
class Route:
    """A function of `export_<backend>.py`, with the packages that it needs."""

    backend: str
    exporter: str
    packages: tuple[str, ...]

    def __str__(self):
        return f"{self.exporter} on {self.backend}"


ROUTES = {
    "onnx": [
        Route("tensorflow", "tf2onnx", ("onnx", "tf2onnx")),
        Route("jax", "jax2onnx", ("onnx", "jax2onnx")),
        Route("torch", "torchscript", ("onnx", "onnxscript")),
        Route("torch", "dynamo", ("onnx", "onnxscript")),
    ],
    "saved_model": [
        Route("tensorflow", "saved_model", ("tensorflow",)),
        Route("jax", "jax2tf", ("tensorflow",)),
    ],
}
"""Format -> the routes that can write it."""


def routes(model, format: str) -> list[Route]:
    """Usable routes for a model: those of the active backend, then the others."""
    active = keras.backend.backend()
    usable = [
        route
        for route in ROUTES[format]
        if installed(route.backend)
        and not missing(route.packages)
        and not (route.backend == "torch" and _loops_over_an_open_axis(model))
    ]
    return sorted(usable, key=lambda route: route.backend != active)


def _loops_over_an_open_axis(model):
    """Whether Keras unrolls a loop over time on PyTorch: the length would be frozen."""
    layers = model._flatten_layers()
    return open_axes(model) and any(isinstance(x, keras.layers.RNN) for x in layers)


def missing(packages) -> list[str]:
    """Those of the packages that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def write(model, format, exporter, path):
    """Writes by an exporter of the active backend."""
    backend = keras.backend.backend()
    module = importlib.import_module(f"{__package__}.export_{backend}")
    fixed = backend == "torch" and not open_axes(model)
    with quiet(), export_scope(format, only_batch_open=fixed):
        getattr(module, exporter)(model, path)


def write_in_child(model, route, format, path, saved):
    """Writes in a process of the route's backend, through the file `saved`."""
    with quiet():
        model.save(saved)
    child.request(
        route.backend,
        "export",
        model=saved,
        format=format,
        exporter=route.exporter,
        path=path,
        definitions=_definitions(model),
    )


@contextlib.contextmanager
def quiet():
    """Without the prints, logs and warnings of exporters, those of C++ included."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            _closed_stream(1),
            _closed_stream(2),
        ):
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def _closed_stream(number):
    """Sends what this process writes to a stream, by number, to nowhere."""
    kept = os.dup(number)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, number)
        os.close(kept)


def _definitions(model):
    """(module, name) of the classes of the model's layers, and of its builder."""
    from keras_edifice.registry import info

    found = [type(part) for part in [model, *model._flatten_layers()]]
    with contextlib.suppress(ValueError, TypeError):  # it has no known architecture
        found.append(info(getattr(model, "architecture", None)).builder)
    named = {(x.__module__, x.__name__) for x in found}
    return sorted(x for x in named if x[0].split(".")[0] not in ("keras", "__main__"))
