import keras
import numpy as np
import torch
from pytorch_tcn import TCN

import keras_edifice
from tests.support.close import difference
from tests.support.gradients import gradients
from tests.support.shaking import shake

FEATURES = 3


def convolution_weights(own, other):
    """(our variable, their parameter, its transpose) of one convolution."""
    yield own.bias, other.bias, (0,)
    if hasattr(other, "parametrizations"):
        gain, direction = other.parametrizations.weight.parameters()
        yield own.gain, gain, (0,)
        yield own.weights[0], direction, (2, 1, 0)
    else:
        yield own.weights[0], other.weight, (2, 1, 0)


def pairs_of_weights(ours, theirs):
    for i, block in enumerate(theirs.network):
        for part, other in enumerate([block.conv1, block.conv2], 1):
            yield from convolution_weights(
                ours.get_layer(f"block_{i}_{part}_conv"), other
            )
        if block.downsample is not None:
            shortcut = ours.get_layer(f"block_{i}_shortcut")
            yield shortcut.kernel, block.downsample.weight, (1, 0)
            yield shortcut.bias, block.downsample.bias, (0,)


def differences(hidden_sizes, kernel_size, norm="weight", **options):
    keras.utils.set_random_seed(0)
    ours = shake(
        keras_edifice.build(
            "tcn",
            embed_size=FEATURES,
            hidden_sizes=hidden_sizes,
            kernel_size=kernel_size,
            norm=norm,
            return_sequences=True,
            **options,
        ),
        0.1,
    )
    theirs = TCN(
        FEATURES,
        hidden_sizes,
        kernel_size,
        causal=True,
        use_norm="weight_norm" if norm else None,
        input_shape="NLC",
        **options,
    ).eval()
    weights = list(pairs_of_weights(ours, theirs))
    assert len(weights) == len(ours.weights) == len(list(theirs.parameters()))
    for variable, parameter, axes in weights:
        value = variable.numpy().transpose(axes)
        parameter.data = torch.tensor(value.copy()).reshape(parameter.shape)

    x = np.random.default_rng(0).normal(size=(2, 25, FEATURES)).astype("float32")
    theirs_x = torch.tensor(x, requires_grad=True)
    expected = theirs(theirs_x)
    expected.square().sum().backward()
    forward = difference(ours(x), expected.detach().numpy())

    by_weight, by_input = gradients(
        ours, x, lambda y: keras.ops.sum(keras.ops.square(y))
    )
    by_path = {
        v.path: g for v, g in zip(ours.trainable_variables, by_weight, strict=True)
    }
    pairs = [(by_input, theirs_x.grad.numpy())]
    for variable, parameter, axes in weights:
        found = by_path[variable.path].transpose(axes)
        pairs.append((found, parameter.grad.numpy().reshape(found.shape)))
    return forward, max(difference(*pair) for pair in pairs)


def test_tcn_equals_that_of_pytorch_tcn(fidelity):
    cases = [
        dict(hidden_sizes=[3, 5, 5, 4], kernel_size=3),
        dict(hidden_sizes=[4, 4], kernel_size=2, dilations=[3, 1]),
        dict(hidden_sizes=[4, 4, 4], kernel_size=4, norm=None),
    ]
    forward, gradient = np.max([differences(**case) for case in cases], axis=0)
    reference = "pytorch-tcn TCN, with and without weight normalisation"
    fidelity.record("tcn", reference, forward, gradient)
