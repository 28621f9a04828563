import os

import keras
import numpy as np
import pytest

from keras_edifice.backends.artefacts import RUN

if keras.backend.backend() != "tensorflow":
    pytest.skip("for TensorFlow alone", allow_module_level=True)

from keras_edifice.backends import export_tensorflow


class Broken:
    def optimize(self, graph, iteration):
        raise RuntimeError("this pass is broken")


@pytest.mark.parametrize("passes", [{}, {"broken": Broken}], ids=["whole", "broken"])
def test_a_broken_pass_is_left_out(passes, tmp_path, monkeypatch):
    from tf2onnx import optimizer

    known = optimizer._get_optimizers()
    monkeypatch.setattr(optimizer, "_get_optimizers", lambda: {**passes, **known})
    monkeypatch.delenv("TF2ONNX_CATCH_ERRORS", raising=False)
    x = keras.Input((3,))
    model = keras.Model(x, keras.layers.Dense(2)(x))
    path = str(tmp_path / "model.onnx")
    export_tensorflow.tf2onnx(model, path)
    data = np.arange(6.0, dtype="float32").reshape(2, 3)
    ((found,),) = RUN["onnx"](model, path, [[data]], tmp_path)
    np.testing.assert_allclose(found, model(data), atol=1e-6)
    assert "TF2ONNX_CATCH_ERRORS" not in os.environ
