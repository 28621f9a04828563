"""The products of a computation on PyTorch: tensors without values, counted calls."""

import math

import keras
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from keras_edifice.backends.products import unknown_steps

_aten = torch.ops.aten

FORMULAS = {
    _aten.dot: lambda a, b, **_: 2 * a[0],
    _aten.mv: lambda a, b, **_: 2 * a[0] * a[1],
    _aten.addmv: lambda x, a, b, **_: 2 * a[0] * a[1],
    _aten.mkldnn_rnn_layer: lambda x, kernel, recurrent, *_, **__: (
        2 * math.prod(x[:2]) * (math.prod(kernel) + math.prod(recurrent))
    ),
}
"""What PyTorch's counter leaves out: products with vectors, and the recurrence of CPUs.
Two operations for each multiply-accumulate, from the shapes."""


def count(function, inputs):
    """The adapter of `products.py`."""
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with keras.device("cpu"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with fake:  # not around the call: the constants of layers keep their values
            tensors = [keras.ops.zeros(x.shape, dtype=x.dtype) for x in inputs]
        try:
            with counter:
                outputs = function(tensors)
        except DataDependentOutputException as error:
            raise unknown_steps() from error
    return counter.get_total_flops() // 2, outputs
