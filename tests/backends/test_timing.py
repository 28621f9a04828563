import gc

import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.backends.timing import forward, forward_and_backward

BACKEND = keras.backend.backend()
MB = 2**20


def peak_of(run):
    peak = run.peak_bytes()
    if peak is None:
        pytest.skip(f"this build of {BACKEND} has no record of its memory")
    return peak


def test_peak_of_a_product_is_its_result():
    x = np.ones((1024, 512), "float32")
    run = forward(lambda x: ops.matmul(x, ops.ones((512, 1024))), [x])
    # XLA's product may lay an argument out anew, 2 MB
    assert 4 * MB <= peak_of(run) <= 6 * MB


def test_peak_with_the_gradient_has_what_the_way_back_needs():
    x = np.full((512, 1024), 0.5, "float32")

    def function(x):
        return ops.matmul(ops.tanh(x), ops.transpose(ops.tanh(x)))

    with_gradient = peak_of(forward_and_backward(function, [x]))
    assert peak_of(forward(function, [x])) < with_gradient <= 16 * MB


def test_memory_does_not_add_up_over_calls():
    x = np.ones(MB // 4, "float32")
    run = forward(lambda x: ops.sort(x * 2.0), [x])
    first = peak_of(run)
    for _ in range(3):
        run.call()
    assert peak_of(run) == first


def test_what_an_earlier_call_left_hides_nothing():
    def function(x):
        gc.collect()
        y = ops.sort(x * 2.0)
        left = [y]
        left.append(left)  # nothing but a search for cycles frees it
        return y

    run = forward(function, [np.ones(MB // 4, "float32")])
    first = peak_of(run)
    for _ in range(3):
        assert peak_of(run) == first
