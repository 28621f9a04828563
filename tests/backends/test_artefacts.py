import keras
import numpy as np
import onnx

from keras_edifice.backends.artefacts import run_onnx
from tests.support.close import assert_close


def test_inputs_go_by_name_where_the_file_has_fewer(tmp_path):
    a, b = (keras.Input((2,), name=name) for name in "ab")
    model = keras.Model([a, b], a + 0.0 * b)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Neg", ["b"], ["y"])],
        "only_b",
        [value("b", onnx.TensorProto.FLOAT, [None, 2])],
        [value("y", onnx.TensorProto.FLOAT, [None, 2])],
    )
    opset = onnx.helper.make_opsetid("", 17)
    file = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    onnx.save(file, tmp_path / "only_b.onnx")
    batch = [np.ones((3, 2), "float32"), np.full((3, 2), 5.0, "float32")]
    ((y,),) = run_onnx(model, str(tmp_path / "only_b.onnx"), [batch], None)
    assert_close(y, -batch[1])
