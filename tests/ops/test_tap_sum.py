import numpy as np
import pytest
from keras import ops

from keras_edifice.ops import tap_sum as module
from keras_edifice.ops.tap_sum import tap_sum
from tests.support.applied import assert_same_gradients
from tests.support.close import assert_close

rng = np.random.default_rng(0)


def reference(x, kernel, dilation):
    steps = x.shape[1] - (len(kernel) - 1) * dilation
    y = np.zeros((x.shape[0], steps, x.shape[2]))
    for t in range(steps):
        for j, weights in enumerate(kernel):
            y[:, t] += weights * x[:, t + j * dilation]
    return y


@pytest.mark.parametrize("own_gradient", [False, True])
@pytest.mark.parametrize(("taps", "dilation"), [(1, 1), (4, 1), (3, 2)])
def test_output_and_gradient_are_the_sum(taps, dilation, own_gradient, monkeypatch):
    monkeypatch.setattr(module, "SLICES_BACK_SLOWLY", own_gradient)
    x = rng.normal(size=(2, 5 + (taps - 1) * dilation, 3)).astype("float32")
    kernel = rng.normal(size=(taps, 3)).astype("float32")
    found = tap_sum(ops.convert_to_tensor(x), ops.convert_to_tensor(kernel), dilation)
    assert_close(found, reference(x, kernel, dilation))
    assert_same_gradients(
        lambda x, kernel: tap_sum(x, kernel, dilation),
        lambda x, kernel: reference(x, kernel, dilation),
        [x, kernel],
    )
