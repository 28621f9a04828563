import keras
import numpy as np
import pytest

from keras_edifice.ops import step_scan as module
from keras_edifice.ops.step_scan import step_scan
from tests.support.close import assert_close

rng = np.random.default_rng(0)


def step(x, state):
    total, count = state
    total = 0.5 * total + keras.ops.tanh(x)
    return total * count, [total, count + 1.0]


def test_scan_is_the_loop():
    x = rng.normal(size=(2, 5, 3)).astype("float32")
    state = [rng.normal(size=(2, 3)).astype("float32"), np.ones((2, 3), "float32")]
    outputs, final = step_scan(
        step,
        keras.ops.convert_to_tensor(x),
        [keras.ops.convert_to_tensor(s) for s in state],
    )
    total, count = (s.astype("float64") for s in state)
    for t in range(5):
        total = 0.5 * total + np.tanh(x[:, t].astype("float64"))
        assert_close(outputs[:, t], total * count)
        count = count + 1
    assert_close(final[0], total)
    assert_close(final[1], count)


def test_an_open_length_from_pytorch_says_what_to_do(monkeypatch):
    monkeypatch.setattr(module, "COMPILES_LOOPS", False)
    monkeypatch.setattr(module, "static_length", lambda x: None)
    with pytest.raises(ValueError, match="for a fixed length only, received an unkn"):
        step_scan(step, keras.ops.ones((2, 5, 3)), [])


def test_a_step_without_state_is_applied_to_each():
    x = rng.normal(size=(2, 5, 3)).astype("float32")
    outputs, state = step_scan(
        lambda x, state: (x + 1.0, state), keras.ops.convert_to_tensor(x), []
    )
    assert state == []
    assert_close(outputs, x + 1.0, 1e-6)
