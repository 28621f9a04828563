import operator

import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.backends import fused_layers
from keras_edifice.blocks.batch_norm import BatchNorm
from keras_edifice.blocks.convolution import Conv2D, DepthwiseConv2D
from keras_edifice.blocks.dense import Dense
from tests.support.close import assert_close

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="they make calls of PyTorch"
)
rng = np.random.default_rng(0)


def array(*shape):
    return rng.normal(size=shape).astype("float32")


@pytest.mark.parametrize("size, strides, padding", [(2, 2, 0), (3, 2, 1), (3, 1, 1)])
def test_max_pool_is_the_largest_of_each_window(size, strides, padding):
    x = array(2, 7, 9, 3)
    edges = (padding, padding)
    padded = np.pad(x, ((0, 0), edges, edges, (0, 0)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (1, 2))
    expected = windows[:, ::strides, ::strides].max((-2, -1))
    found = fused_layers.max_pool(ops.convert_to_tensor(x), size, strides, padding)
    assert_close(found, expected, 0)


@pytest.mark.parametrize(
    "causal, biased", [(False, False), (False, True), (True, False)]
)
def test_attention_is_the_softmax_of_the_scaled_scores(causal, biased):
    q, k, v = array(2, 5, 3, 4), array(2, 5, 3, 4), array(2, 5, 3, 6)
    bias = array(1, 3, 5, 5) if biased else None
    scores = 0.7 * np.einsum("bthd,bshd->bhts", q, k) + (bias if biased else 0.0)
    if causal:
        scores = np.where(np.tril(np.ones((5, 5), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhts,bshd->bthd", weights, v)
    tensors = [ops.convert_to_tensor(x) for x in (q, k, v)]
    bias = None if bias is None else ops.convert_to_tensor(bias)
    assert_close(fused_layers.attention(*tensors, 0.7, bias, causal), expected)


FUSED = {
    "addmm": (lambda: Dense(2), (3, 5, 4)),
    "nn.functional.conv2d": (lambda: Conv2D(2, 3, padding="same"), (2, 5, 5, 4)),
    "nn.functional.batch_norm": (lambda: BatchNorm(), (3, 4)),
}


@pytest.mark.parametrize("name", FUSED)
def test_layers_make_the_call_of_pytorch_where_they_run(name, monkeypatch):
    import torch

    make, shape = FUSED[name]
    layer, x = make(), ops.convert_to_tensor(array(*shape))
    layer.build(shape)
    expected = layer(x)
    function, calls = operator.attrgetter(name)(torch), []

    def counted(*arguments, **options):
        calls.append(name)
        return function(*arguments, **options)

    monkeypatch.setattr(f"torch.{name}", counted)
    assert_close(layer(x), expected, 0)
    assert calls == [name]
    monkeypatch.setattr("keras_edifice.backends.fused_layers.runs_now", lambda x: False)
    assert_close(layer(x), expected)  # as Keras computes it


def test_affine_is_the_product_and_its_gradient_lies_as_the_kernel():
    import torch

    x, kernel, bias = (
        torch.as_tensor(array(*size)) for size in ((3, 5, 4), (4, 2), (2,))
    )
    kernel.requires_grad_()
    for b in (bias, None):
        y = fused_layers.affine(x, kernel, b)
        expected = np.einsum("bti,io->bto", x.numpy(), kernel.detach().numpy())
        assert_close(y, expected + (0 if b is None else b.numpy()))
    (gradient,) = torch.autograd.grad(y.square().sum(), kernel)
    assert gradient.stride() == kernel.stride()
    assert_close(gradient, 2 * np.einsum("bti,bto->io", x, y.detach()))


def test_depthwise_filters_come_in_groups():
    x = array(2, 5, 5, 3)
    ours = DepthwiseConv2D(3, depth_multiplier=2)
    theirs = keras.layers.DepthwiseConv2D(3, depth_multiplier=2)
    for layer in (ours, theirs):
        layer.build(x.shape)
    theirs.set_weights(ours.get_weights())
    assert_close(ours(x), theirs(x))
