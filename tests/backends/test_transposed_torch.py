import keras
import numpy as np
import pytest

from tests.support.close import assert_close

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="a function of PyTorch"
)
rng = np.random.default_rng(0)


def test_values_and_gradient_are_those_of_the_transpose_and_lie_in_order():
    import torch

    from keras_edifice.backends.transposed_torch import Transposed

    matrix = torch.tensor(rng.normal(size=(3, 5)), requires_grad=True)
    factors = torch.tensor(rng.normal(size=(5, 3)))
    found = Transposed.apply(matrix)
    assert found.is_contiguous()
    assert_close(found, matrix.detach().numpy().T, 0)
    (found * factors).sum().backward()
    assert matrix.grad.is_contiguous()
    assert_close(matrix.grad, factors.numpy().T, 0)
