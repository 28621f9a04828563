"""The ways to write an artefact: which backend writes which format, by what."""

import contextlib
import importlib
import importlib.util
import io
import logging
import warnings
from dataclasses import dataclass

import keras

from keras_edifice.backends import child
from keras_edifice.backends.selection import installed
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


def routes(format: str) -> list[Route]:
    """Usable routes to a format: those of the active backend, then the others."""
    active = keras.backend.backend()
    usable = [
        route
        for route in ROUTES[format]
        if installed(route.backend) and not missing(route.packages)
    ]
    return sorted(usable, key=lambda route: route.backend != active)


def missing(packages) -> list[str]:
    """Those of the packages that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def write(model, format, exporter, path):
    """Writes by an exporter of the active backend."""
    backend = keras.backend.backend()
    module = importlib.import_module(f"{__package__}.export_{backend}")
    with quiet(), export_scope(format):
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
        modules=_modules(model),
    )


@contextlib.contextmanager
def quiet():
    """Without the prints, logs and warnings of exporters."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        logging.disable(level)


def _modules(model):
    """Modules that register the classes of the model's layers, where importable."""
    from keras_edifice.registry import info

    modules = {type(part).__module__ for part in [model, *model._flatten_layers()]}
    with contextlib.suppress(ValueError, TypeError):  # it has no known architecture
        modules.add(info(getattr(model, "architecture", None)).builder.__module__)
    return sorted(m for m in modules if m.split(".")[0] not in ("keras", "__main__"))
