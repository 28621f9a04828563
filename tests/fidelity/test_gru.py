import keras
import numpy as np
import torch

import keras_edifice
from keras_edifice.backends.fused_recurrence import FusedRecurrence
from tests.support.close import difference
from tests.support.gradients import gradients
from tests.support.shaking import shake

EMBED, HIDDEN, LAYERS = 5, 6, 2


def in_our_order(rows):
    """Their rows r, z, n as our columns z, r, n."""
    r, z, n = np.split(rows.T, 3, axis=-1)
    return np.concatenate([z, r, n], axis=-1)


def in_their_order(columns):
    z, r, n = np.split(columns, 3, axis=-1)
    return np.concatenate([r, z, n], axis=-1).T


def copied(ours, bidirectional):
    """torch.nn.GRU with our weights, and its parameters in the order of ours."""
    theirs = torch.nn.GRU(
        EMBED, HIDDEN, LAYERS, batch_first=True, bidirectional=bidirectional
    )
    suffixes = [f"l{i}" for i in range(LAYERS)]
    if bidirectional:
        suffixes = [s + way for s in suffixes for way in ("", "_reverse")]
    weights, groups = iter(ours.get_weights()), []
    for suffix in suffixes:
        kernel, recurrent, (bias, recurrent_bias) = (next(weights) for _ in range(3))
        for part, ours_part in {
            "weight_ih": kernel,
            "weight_hh": recurrent,
            "bias_ih": bias,
            "bias_hh": recurrent_bias,
        }.items():
            parameter = getattr(theirs, f"{part}_{suffix}")
            value = in_their_order(ours_part)
            assert parameter.shape == value.shape
            parameter.data.copy_(torch.tensor(value.copy()))
            groups.append(parameter)
    assert next(weights, None) is None
    return theirs, groups


def gradients_of(parameters):
    """Those of `copied`, as our weights: the two biases stand in one."""
    found = iter(in_our_order(p.grad.numpy()) for p in parameters)
    for kernel in found:
        yield kernel
        yield next(found)
        yield np.stack([next(found), next(found)])


def measured(bidirectional):
    keras.utils.set_random_seed(0)
    ours = shake(
        keras_edifice.build(
            "gru",
            embed_size=EMBED,
            hidden_size=HIDDEN,
            num_layers=LAYERS,
            bidirectional=bidirectional,
            return_sequences=True,
            window_size=None,
        )
    )
    theirs, parameters = copied(ours, bidirectional)
    x = np.random.default_rng(0).normal(size=(3, 11, EMBED)).astype("float32")
    by_weight, by_input = gradients(
        ours, x, lambda y: keras.ops.sum(keras.ops.square(y))
    )
    theirs_x = torch.tensor(x, requires_grad=True)
    outputs = theirs(theirs_x)[0]
    outputs.square().sum().backward()
    pairs = [(by_input, theirs_x.grad.numpy())]
    pairs += zip(by_weight, gradients_of(parameters), strict=True)
    forward = difference(ours(x), outputs.detach().numpy())
    return forward, max(difference(a, b) for a, b in pairs)


def test_gru_equals_that_of_torch_in_one_and_both_directions(fidelity, monkeypatch):
    # Else PyTorch's loop would be compared with itself.
    monkeypatch.setattr(FusedRecurrence, "_fusible", lambda *_: False)
    one, both = measured(bidirectional=False), measured(bidirectional=True)
    fidelity.record(
        "gru",
        "torch.nn.GRU, in one and in both directions",
        forward=max(one[0], both[0]),
        gradient=max(one[1], both[1]),
    )
