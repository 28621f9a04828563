"""A process under another backend that exports saved models and runs SavedModels.

`child.py` starts it. Every line of the standard input is a job, every line of the
standard output that begins with `MARK` is its reply, both in JSON.
"""

import contextlib
import gc
import importlib
import json
import os
import sys

import keras

from keras_edifice.backends import arrays
from keras_edifice.backends.child import MARK
from keras_edifice.backends.routes import write
from keras_edifice.backends.running import let_go


def export(model, format, exporter, path, definitions, **_):
    """Exports a `.keras` file of layers whose definitions are (module, name)."""
    classes = {}
    for module, name in definitions:
        with contextlib.suppress(Exception):  # loading names the class that is missing
            definition = getattr(importlib.import_module(module), name)
            if isinstance(definition, type):
                classes[name] = definition
    loaded = keras.saving.load_model(model, classes, compile=False, safe_mode=False)
    write(loaded, format, exporter, path)


def run_saved_model(path, inputs, outputs, **_):
    """Runs a SavedModel on arrays of an `.npz` file, named <batch>.<input>."""
    from keras_edifice.backends.export_tensorflow import run_saved_model

    arrays.save(outputs, run_saved_model(path, arrays.load(inputs)))


JOBS = {"export": export, "run_saved_model": run_saved_model}


def main():
    """Answers jobs until the input ends."""
    jobs, replies = _private_streams()
    gc.collect()
    gc.freeze()  # what was imported stays: `let_go` need not look through it
    for line in jobs:
        job = json.loads(line)
        sys.path += [place for place in job["sys_path"] if place not in sys.path]
        try:
            JOBS[job.pop("job")](**job)
            reply = {}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(f"\n{MARK}{json.dumps(reply)}\n")
        replies.flush()
        let_go()


def _private_streams():
    """The streams of jobs and replies; what else is printed goes to the errors."""
    jobs, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return os.fdopen(jobs, encoding="utf-8"), os.fdopen(replies, "w", encoding="utf-8")
