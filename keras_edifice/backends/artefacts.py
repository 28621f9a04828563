"""Exported files at work: onnxruntime, and TensorFlow in whatever process has it."""

import os

import keras

from keras_edifice.backends import arrays, child


def onnx_session(model, path):
    """A function from flat inputs to flat outputs, by onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"]
    )
    taken = [x.name for x in session.get_inputs()]
    names = [x.name for x in model.inputs]
    if len(taken) == len(names):  # those that had no name got one
        names = taken

    def run(flat):
        given = dict(zip(names, flat, strict=True))
        return session.run(None, {name: given[name] for name in taken})

    return run


def run_onnx(model, path, batches, folder):
    """Outputs of an ONNX file, flat, for each batch: a flat list of inputs."""
    return [*map(onnx_session(model, path), batches)]


def run_saved_model(model, path, batches, folder):
    """Outputs of a SavedModel, flat, for each batch: a flat list of inputs."""
    if keras.backend.backend() == "tensorflow":
        from keras_edifice.backends.export_tensorflow import run_saved_model

        return run_saved_model(path, batches)
    inputs, outputs = (os.path.join(folder, f"{x}.npz") for x in ("inputs", "outputs"))
    arrays.save(inputs, batches)
    child.request(
        "tensorflow", "run_saved_model", path=path, inputs=inputs, outputs=outputs
    )
    return arrays.load(outputs)


RUN = {"onnx": run_onnx, "saved_model": run_saved_model}
