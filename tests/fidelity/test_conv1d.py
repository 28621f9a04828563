import keras
import numpy as np
import torch
from torch import nn

import keras_edifice
from tests.support.close import difference
from tests.support.gradients import gradients
from tests.support.shaking import shake

SIZES, FEATURES = [5, 4], 3


class Chomp(nn.Module):
    """Without the last steps, which a convolution padded on both sides adds."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def forward(self, x):
        return x[..., : -self.steps]


def peer(kernel_size, padding, strides, dilation, norm, pooling):
    """Blocks of layers of PyTorch."""
    blocks, kept = [], (kernel_size - 1) * dilation
    zeros = {"same": kept // 2, "causal": kept, "valid": 0}[padding]
    for inputs, outputs in zip([FEATURES, *SIZES], SIZES, strict=False):
        blocks += [
            nn.Conv1d(
                inputs,
                outputs,
                kernel_size,
                strides,
                padding=zeros,
                dilation=dilation,
                bias=norm is None,
            )
        ]
        blocks += [Chomp(kept)] if padding == "causal" else []
        blocks += [nn.BatchNorm1d(outputs, eps=1e-3)] if norm else []
        blocks += [nn.ReLU()]
        blocks += [nn.MaxPool1d(2)] if pooling else []
    return nn.Sequential(*blocks).eval()


def parts(ours, theirs):
    """(our layer, theirs) of each convolution and normalisation."""
    own = [z for z in ours.layers if z.weights]
    other = [z for z in theirs if isinstance(z, nn.Conv1d | nn.BatchNorm1d)]
    yield from zip(own, other, strict=True)


def pairs_of_weights(ours, theirs):
    """(our variable, their parameter, its transpose), all of them."""
    for own, other in parts(ours, theirs):
        if isinstance(other, nn.Conv1d):
            yield own.kernel, other.weight, (2, 1, 0)
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
        if isinstance(other, nn.BatchNorm1d):
            mean = rng.normal(size=own.moving_mean.shape).astype("float32")
            variance = rng.uniform(0.5, 1.5, mean.shape).astype("float32")
            own.moving_mean.assign(mean)
            own.moving_variance.assign(variance)
            other.running_mean.copy_(torch.tensor(mean))
            other.running_var.copy_(torch.tensor(variance))


def differences(padding="same", strides=1, dilation=1, norm="batch", pooling=None):
    keras.utils.set_random_seed(0)
    options = dict(padding=padding, strides=strides, dilation=dilation)
    options |= dict(norm=norm, pooling=pooling, kernel_size=3)
    ours = shake(
        keras_edifice.build(
            "conv1d",
            embed_size=FEATURES,
            hidden_sizes=SIZES,
            return_sequences=True,
            **options,
        )
    )
    theirs = peer(**options)
    copy_weights(ours, theirs)

    x = np.random.default_rng(0).normal(size=(2, 19, FEATURES)).astype("float32")
    steps = torch.tensor(x.transpose(0, 2, 1), requires_grad=True)
    expected = theirs(steps)
    expected.square().sum().backward()
    forward = difference(ours(x), expected.detach().numpy().transpose(0, 2, 1))

    by_weight, by_input = gradients(
        ours, x, lambda y: keras.ops.sum(keras.ops.square(y))
    )
    by_path = {
        v.path: g for v, g in zip(ours.trainable_variables, by_weight, strict=True)
    }
    pairs = [(by_input, steps.grad.numpy().transpose(0, 2, 1))]
    for variable, parameter, axes in pairs_of_weights(ours, theirs):
        found = by_path[variable.path].transpose(axes)
        pairs.append((found, parameter.grad.numpy()))
    return forward, max(difference(*pair) for pair in pairs)


def test_conv1d_is_the_same_of_layers_of_pytorch(fidelity):
    cases = [
        dict(),
        dict(strides=2),
        dict(dilation=3, padding="valid"),
        dict(dilation=2, padding="causal"),
        dict(norm=None, pooling="max"),
    ]
    forward, gradient = np.max([differences(**case) for case in cases], axis=0)
    reference = "torch.nn Conv1d, BatchNorm1d, ReLU and MaxPool1d"
    fidelity.record("conv1d", reference, forward, gradient)
