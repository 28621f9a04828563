import logging
import os
import sys
import warnings

import keras
from keras import layers

import keras_edifice
from keras_edifice.backends import routes


def sequence_model(layer, length=None):
    inputs = keras.Input((length, 3), name="inputs")
    return keras.Model(inputs, layer(inputs))


def test_active_backend_comes_first():
    for format in routes.ROUTES:
        usable = routes.routes(sequence_model(layers.Dense(2)), format)
        own = [route.backend == keras.backend.backend() for route in usable]
        assert own == sorted(own, reverse=True)


def test_every_route_names_a_function_of_its_backend():
    for route in [route for format in routes.ROUTES.values() for route in format]:
        if route.backend == keras.backend.backend():
            module = routes.importlib.import_module(
                f"keras_edifice.backends.export_{route.backend}"
            )
            assert callable(getattr(module, route.exporter))


def test_pytorch_does_not_write_loops_over_an_open_length(monkeypatch):
    # Which packages this environment has is another matter.
    monkeypatch.setattr(routes, "installed", lambda backend: True)
    monkeypatch.setattr(routes, "missing", lambda packages: [])

    def backends(model):
        return {route.backend for route in routes.routes(model, "onnx")}

    assert "torch" not in backends(sequence_model(layers.LSTM(2)))
    assert "torch" in backends(sequence_model(layers.LSTM(2), length=5))
    assert "torch" in backends(sequence_model(layers.Dense(2)))


def test_nothing_is_heard_of_what_is_quiet(capfd):
    with routes.quiet():
        print("printed")
        print("printed", file=sys.stderr)
        os.write(1, b"written")
        os.write(2, b"written")
        warnings.warn("warned", stacklevel=1)
        logging.getLogger("exporter").error("logged")
    assert capfd.readouterr() == ("", "")
    os.write(1, b"heard")
    assert capfd.readouterr().out == "heard"


class Double(layers.Layer):
    def call(self, x):
        return 2.0 * x


def test_definitions_are_those_that_another_process_could_import():
    assert routes._definitions(sequence_model(layers.Dense(2))) == []
    assert routes._definitions(sequence_model(Double())) == [(__name__, "Double")]
    built = keras_edifice.build("mlp", input_size=3, hidden_sizes=[2])
    assert ("keras_edifice.feedforward.mlp", "mlp") in routes._definitions(built)
