import keras
import numpy as np
import torch

import keras_edifice
from keras_edifice.backends.fused_recurrence import FusedRecurrence
from tests.support.close import difference
from tests.support.gradients import gradients
from tests.support.shaking import shake

EMBED, HIDDEN, LAYERS = 5, 6, 2


def copied(ours, bidirectional):
    """torch.nn.LSTM with our weights, and its parameters in the order of ours."""
    theirs = torch.nn.LSTM(
        EMBED, HIDDEN, LAYERS, batch_first=True, bidirectional=bidirectional
    )
    suffixes = [f"l{i}" for i in range(LAYERS)]
    if bidirectional:
        suffixes = [s + way for s in suffixes for way in ("", "_reverse")]
    names = [
        f"{part}_{suffix}"
        for suffix in suffixes
        for part in ("weight_ih", "weight_hh", "bias_ih")
    ]
    rng = np.random.default_rng(1)
    for name, weight in zip(names, ours.get_weights(), strict=True):
        if "bias" in name:  # they have two biases, whose sum is ours
            other = rng.normal(size=weight.shape).astype("float32")
            hidden = getattr(theirs, name.replace("ih", "hh"))
            hidden.data.copy_(torch.tensor(other))
            weight = weight - other
        parameter = getattr(theirs, name)
        assert parameter.shape == weight.T.shape
        parameter.data.copy_(torch.tensor(weight.T.copy()))
    return theirs, [getattr(theirs, name) for name in names]


def measured(bidirectional):
    keras.utils.set_random_seed(0)
    ours = shake(
        keras_edifice.build(
            "lstm",
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
    pairs += [(a, p.grad.numpy().T) for a, p in zip(by_weight, parameters, strict=True)]
    forward = difference(ours(x), outputs.detach().numpy())
    return forward, max(difference(a, b) for a, b in pairs)


def test_lstm_equals_that_of_torch_in_one_and_both_directions(fidelity, monkeypatch):
    # Else PyTorch's loop would be compared with itself.
    monkeypatch.setattr(FusedRecurrence, "_fusible", lambda *_: False)
    one, both = measured(bidirectional=False), measured(bidirectional=True)
    fidelity.record(
        "lstm",
        "torch.nn.LSTM, in one and in both directions",
        forward=max(one[0], both[0]),
        gradient=max(one[1], both[1]),
    )
