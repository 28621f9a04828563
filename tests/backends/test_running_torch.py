import keras
import numpy as np
import pytest

from keras_edifice.backends.running_torch import kept, runs_now

on_torch = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="only PyTorch runs layers one by one"
)


def test_arrays_and_symbolic_tensors_do_not_run():
    assert not runs_now(np.ones(3))
    assert not runs_now(keras.Input((3,)))


@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="there its tensors run, see below"
)
def test_tensors_of_other_backends_do_not_run():
    assert not runs_now(keras.ops.ones(3))


@on_torch
def test_tensors_run_but_not_without_values_nor_in_a_trace():
    import torch

    assert runs_now(torch.ones(3))
    assert not runs_now(torch.ones(3, device="meta"))
    seen = []

    def function(x):
        seen.append(runs_now(x))
        return 2 * x

    torch.jit.trace(function, torch.ones(3), check_trace=False)
    assert seen == [False]


@on_torch
def test_a_result_is_kept_in_inference_until_a_weight_changes():
    import torch

    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    calls = []

    def arranged():
        calls.append(None)
        weight = keras.ops.convert_to_tensor(layer.kernel)
        return kept(layer, [weight], lambda: weight.t().contiguous())

    def made():
        before = layer.__dict__.get("_kept")
        found = arranged()
        np.testing.assert_array_equal(found.detach().numpy().T, layer.kernel.numpy())
        return layer.__dict__.get("_kept") is not before

    assert not made()  # with gradients nothing is kept
    with torch.no_grad():
        assert made()
        assert not made()
        layer.kernel.assign(layer.kernel + 1.0)
        assert made()
        assert not made()
    assert len(calls) == 5
