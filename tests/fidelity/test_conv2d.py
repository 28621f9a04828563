import keras
import numpy as np
import torch
from torch import nn

import keras_edifice
from tests.support.close import difference
from tests.support.gradients import gradients
from tests.support.shaking import shake

SIZES, CHANNELS = [8, 4], 4


def peer(kernel_size, padding, strides, dilation, groups, norm, pooling):
    """Blocks of layers of PyTorch."""
    blocks = []
    zeros = (kernel_size - 1) * dilation // 2 if padding == "same" else 0
    for inputs, outputs in zip([CHANNELS, *SIZES], SIZES, strict=False):
        blocks += [
            nn.Conv2d(
                inputs,
                outputs,
                kernel_size,
                strides,
                padding=zeros,
                dilation=dilation,
                groups=groups,
                bias=norm is None,
            )
        ]
        blocks += [nn.BatchNorm2d(outputs, eps=1e-3)] if norm else []
        blocks += [nn.ReLU()]
        if pooling:
            blocks += [nn.MaxPool2d(2) if pooling == "max" else nn.AvgPool2d(2)]
    return nn.Sequential(*blocks).eval()


def parts(ours, theirs):
    """(our layer, theirs) of each convolution and normalisation."""
    own = [z for z in ours.layers if z.weights]
    other = [z for z in theirs if isinstance(z, nn.Conv2d | nn.BatchNorm2d)]
    yield from zip(own, other, strict=True)


def pairs_of_weights(ours, theirs):
    """(our variable, their parameter, its transpose), all of them."""
    for own, other in parts(ours, theirs):
        if isinstance(other, nn.Conv2d):
            yield own.kernel, other.weight, (3, 2, 0, 1)
            if other.bias is not None:
                yield own.bias, other.bias, (0,)
        else:
            yield own.gamma, other.weight, (0,)
            yield own.beta, other.bias, (0,)


def copy_weights(ours, theirs):
    weights = list(pairs_of_weights(ours, theirs))
    assert len(weights) == len(ours.trainable_variables)
    for variable, parameter, axes in weights:
        value = torch.tensor(variable.numpy().transpose(axes).copy())
        assert parameter.shape == value.shape
        parameter.data = value
    rng = np.random.default_rng(1)
    for own, other in parts(ours, theirs):
        if isinstance(other, nn.BatchNorm2d):
            mean = rng.normal(size=own.moving_mean.shape).astype("float32")
            variance = rng.uniform(0.5, 1.5, mean.shape).astype("float32")
            own.moving_mean.assign(mean)
            own.moving_variance.assign(variance)
            other.running_mean.copy_(torch.tensor(mean))
            other.running_var.copy_(torch.tensor(variance))


def differences(
    padding="same", strides=1, dilation=1, groups=1, norm="batch", pooling=None
):
    keras.utils.set_random_seed(0)
    options = dict(padding=padding, strides=strides, dilation=dilation, groups=groups)
    options |= dict(norm=norm, pooling=pooling, kernel_size=3)
    ours = shake(
        keras_edifice.build(
            "conv2d", input_channels=CHANNELS, hidden_sizes=SIZES, **options
        )
    )
    theirs = peer(**options)
    copy_weights(ours, theirs)

    x = np.random.default_rng(0).normal(size=(2, 13, 14, CHANNELS)).astype("float32")
    pixels = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    expected = theirs(pixels)
    expected.square().sum().backward()
    forward = difference(ours(x), expected.detach().numpy().transpose(0, 2, 3, 1))

    by_weight, by_input = gradients(
        ours, x, lambda y: keras.ops.sum(keras.ops.square(y))
    )
    by_path = {
        v.path: g for v, g in zip(ours.trainable_variables, by_weight, strict=True)
    }
    pairs = [(by_input, pixels.grad.numpy().transpose(0, 2, 3, 1))]
    for variable, parameter, axes in pairs_of_weights(ours, theirs):
        found = by_path[variable.path].transpose(axes)
        pairs.append((found, parameter.grad.numpy()))
    return forward, max(difference(*pair) for pair in pairs)


def test_conv2d_is_the_same_of_layers_of_pytorch(fidelity):
    cases = [
        dict(),
        dict(strides=2),
        dict(dilation=2, padding="valid"),
        dict(groups=2, pooling="avg"),
        dict(groups=4, norm=None, pooling="max"),
    ]
    forward, gradient = np.max([differences(**case) for case in cases], axis=0)
    reference = "torch.nn Conv2d, BatchNorm2d, ReLU, MaxPool2d and AvgPool2d"
    fidelity.record("conv2d", reference, forward, gradient)
