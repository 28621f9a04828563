"""Models as ONNX files and TensorFlow SavedModels, run before they are handed over.

The exporter of the active backend writes first. Where it cannot, or where the file
gives other numbers than the model, another exporter does, if need be in a process
under another backend (`backends/routes.py`).
"""

import importlib
import os
import tempfile
from pathlib import Path

import keras
import numpy as np

from keras_edifice.backends import routes
from keras_edifice.backends.artefacts import RUN
from keras_edifice.backends.selection import install_command
from keras_edifice.backends.signature import open_axes
from keras_edifice.precision import in_float32
from keras_edifice.samples import sample_inputs

TOLERANCE = 1e-4
"""Largest accepted difference, relative to the largest output (at least 1)."""

BATCH_SIZES = 1, 3
LENGTHS = 7, 40


def export(
    model: keras.Model, path, format: str = "onnx", verify: bool = True
) -> float | None:
    """Writes a model for inference elsewhere, without the code that made it.

    Open sizes (the batch, a sequence's length) stay open. Models of mixed precision
    are written in float32. What is at `path` is replaced, and only on success.

    Args:
        model: a functional Keras model.
        path: of the ONNX file or of the SavedModel's folder.
        format: "onnx" or "saved_model".
        verify: run the result on random inputs, at two batch sizes and at two lengths
            where the length is open, and compare it with the model. Without, an
            exporter may freeze a length unnoticed.

    Returns:
        The largest difference between artefact and model, relative to the largest
        output or 1; None without `verify`.

    Raises:
        TypeError: the model is not a functional Keras model.
        ValueError: unknown format; unusable path; no exporter wrote a file that gives
            the model's numbers. Nothing is left behind.
        ImportError: a package is missing; the message has the command.
    """
    _check(model, format, verify)
    path = _usable(Path(path), format)
    with routes.quiet():
        model = in_float32(model)
    batches, expected = _expected(model) if verify else (None, None)
    failures = []
    for route in routes.routes(model, format):
        with tempfile.TemporaryDirectory(
            prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True
        ) as folder:
            try:
                artefact = _write(model, route, format, folder, path.name)
                difference = None
                if verify:
                    results = RUN[format](model, artefact, batches, folder)
                    difference = _largest_difference(results, expected)
                    if not difference <= TOLERANCE:
                        raise ValueError(f"the result differs by {difference:.1e}")
            except Exception as error:  # exporters raise anything
                failures.append(f"{route}: {_one_line(error)}")
                continue
            _put_in_place(Path(artefact), path)
            return difference
    raise ValueError(_why(model, format, failures))


def _check(model, format, verify):
    if format not in routes.ROUTES:
        raise ValueError(f"format must be 'onnx' or 'saved_model', received {format!r}")
    if not isinstance(model, keras.Model) or not getattr(model, "inputs", None):
        raise TypeError(
            "export takes a functional Keras model, received "
            f"{type(model).__name__}; build it with keras.Model(inputs, outputs)"
        )
    backend = keras.backend.backend()
    needed = ["onnxruntime"] if format == "onnx" and verify else []
    needed += [
        package
        for route in routes.ROUTES[format]
        if route.backend == backend or format == "saved_model"
        for package in route.packages
    ]
    missing = routes.missing(dict.fromkeys(needed))
    if missing:
        extra = "onnx" if format == "onnx" else "tensorflow"
        raise ImportError(
            f"exporting {format} from {backend} needs {', '.join(missing)}; "
            f"run: {install_command(extra)}"
        )


def _usable(path, format):
    """The path, if the artefact may be put there."""
    path = path.absolute()
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent}; make it first")
    if format == "onnx" and path.is_dir():
        raise ValueError(f"{path} is a folder; name an ONNX file, such as model.onnx")
    if format == "saved_model" and path.exists():
        if not path.is_dir():
            raise ValueError(
                f"{path} is a file; a SavedModel is a folder, name another"
            )
        if any(path.iterdir()) and not (path / "saved_model.pb").is_file():
            raise ValueError(
                f"{path} is a folder of other things than a SavedModel; name another"
            )
    return path


def _expected(model):
    """Batches of flat inputs, and the model's outputs on them."""
    backend = keras.backend.backend()
    exporter = importlib.import_module(f"{routes.__package__}.export_{backend}")
    sizes = {x.shape[0] for x in model.inputs} - {None} or BATCH_SIZES
    lengths = LENGTHS if open_axes(model) else LENGTHS[:1]
    samples = [
        sample_inputs(model, batch_size, length)
        for batch_size in sizes
        for length in lengths
    ]
    try:
        first, *outputs = exporter.predict(model, [samples[0], *samples])
    except Exception as error:
        raise ValueError(
            f"{model.name} was not exported: it does not run on random inputs "
            f"({_one_line(error)}); make it run at batch sizes {BATCH_SIZES}"
            f"{f' and lengths {LENGTHS}' if open_axes(model) else ''} first"
        ) from error
    if any(np.isnan(y).any() for flat in outputs for y in flat):
        raise ValueError(
            f"{model.name} was not exported: it gives NaN on random inputs, so the "
            "result cannot be compared; look at its weights, or pass verify=False"
        )
    if _largest_difference([first], outputs[:1]) > TOLERANCE:
        raise ValueError(
            f"{model.name} was not exported: it gives other numbers each time, as it "
            "draws random ones at inference; make the noise an input of the model"
        )
    return [_flat_inputs(model, x) for x in samples], outputs


def _flat_inputs(model, inputs):
    return [
        np.asarray(x, expected.dtype)
        for x, expected in zip(keras.tree.flatten(inputs), model.inputs, strict=True)
    ]


def _write(model, route, format, folder, name):
    """Writes by a route, here or in a child process; the path of the artefact."""
    target = Path(folder, "artefact")
    target.mkdir()
    path = str(target / name)
    if route.backend == keras.backend.backend():
        routes.write(model, format, route.exporter, path)
    else:
        saved = str(Path(folder, "model.keras"))
        routes.write_in_child(model, route, format, path, saved)
    return path


def _largest_difference(results, expected):
    """The largest over all batches and outputs."""
    differences = [
        _difference(actual, wanted)
        for flat, wanted_flat in zip(results, expected, strict=True)
        for actual, wanted in zip(flat, wanted_flat, strict=True)
    ]
    return float(np.max(differences))  # NaN if one of them is


def _difference(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    if actual.shape != expected.shape:
        raise ValueError(f"gives the shape {actual.shape}, not {expected.shape}")
    a, b = actual.astype("float64"), expected.astype("float64")
    gap = np.abs(np.subtract(a, b, where=a != b, out=np.zeros_like(b)))
    finite = np.abs(b[np.isfinite(b)])
    return gap.max(initial=0.0) / finite.max(initial=1.0)


def _put_in_place(artefact, path):
    """Moves the artefact, and files written beside it, to where it was asked for."""
    replaced = artefact.parent.parent / "replaced"
    if path.is_dir():  # a folder cannot be overwritten in one step
        os.replace(path, replaced)
    try:
        for part in sorted(
            artefact.parent.iterdir(), key=lambda part: part == artefact
        ):
            os.replace(part, path.parent / part.name)
    except OSError:
        if replaced.exists():
            os.replace(replaced, path)
        raise


def _one_line(error, limit=200):
    _, _, text = str(error).rpartition("Exception encountered:")  # Keras' own cause
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]}..."


def _why(model, format, failures):
    fix = "give the open lengths a fixed size or " if open_axes(model) else ""
    return (
        f"{model.name} was not exported to {format}: {'; '.join(failures)}; "
        f"{fix}replace the layers that these messages name"
    )
