import keras
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import OlmoHybridConfig
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import (
    OlmoHybridGatedDeltaNet,
)

import keras_edifice
from tests.support.close import difference
from tests.support.gradients import gradients
from tests.support.shaking import shake

HIDDEN, KEY, VALUE, LAYERS = 12, 4, 6, 2
MATRICES = ("q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj", "o_proj")


def peer_of(layer):
    """The layer of transformers with the weights of ours."""
    config = OlmoHybridConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        linear_num_key_heads=layer.num_heads,
        linear_num_value_heads=layer.value_heads,
        linear_key_head_dim=KEY,
        linear_value_head_dim=VALUE,
        linear_conv_kernel_dim=4,
        linear_allow_neg_eigval=layer.allow_neg_eigval,
    )
    peer = OlmoHybridGatedDeltaNet(config, 0)
    for name, _, parameter, value in pairs_of_weights(layer, peer):
        assert parameter.shape == value.shape, name
        parameter.data.copy_(torch.tensor(value))
    convs = np.concatenate([conv.kernel.numpy().T for conv in layer.convs])
    peer.conv1d.weight.data.copy_(torch.tensor(convs[:, None]))
    return peer


def pairs_of_weights(layer, peer):
    """(name, our variable, their parameter, our value as theirs), but convolutions."""
    for name in MATRICES:
        kernel = getattr(layer, name).kernel
        yield name, kernel, getattr(peer, name).weight, kernel.numpy().T.copy()
    for name in ("A_log", "dt_bias"):
        vector = getattr(layer, name)
        yield name, vector, getattr(peer, name), vector.numpy()
    gamma = layer.o_norm.gamma
    yield "o_norm", gamma, peer.o_norm.weight, gamma.numpy()


def theirs(x, peers, w):
    """The whole model: residual branches around the peers and feed-forwards."""

    def norm(x, name):
        return F.rms_norm(x, (HIDDEN,), w[f"{name}/gamma"], 1e-5)

    for i, peer in enumerate(peers):
        x = x + peer(norm(x, f"gated_delta_net_{i}_norm"))
        normed = norm(x, f"ffn_{i}_norm")
        gate, up = (normed @ w[f"ffn_{i}/{part}/kernel"] for part in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[f"ffn_{i}/down/kernel"]
    return norm(x, "final_norm")


def gradients_by_path(layers, peers):
    """Gradients in the weights of their layers, by the paths of ours."""
    for layer, peer in zip(layers, peers, strict=True):
        for _, variable, parameter, _ in pairs_of_weights(layer, peer):
            gradient = parameter.grad.numpy()
            yield variable.path, gradient.T if gradient.ndim == 2 else gradient
        sizes = [conv.kernel.shape[1] for conv in layer.convs]
        parts = torch.split(peer.conv1d.weight.grad[:, 0], sizes)
        for conv, part in zip(layer.convs, parts, strict=True):
            yield conv.kernel.path, part.numpy().T


@pytest.mark.parametrize(
    "options",
    [{"num_v_heads": 4, "allow_neg_eigval": True}, {}],
    ids=["grouped", "default"],
)
def test_gated_delta_net_equals_that_of_transformers(options, fidelity):
    keras.utils.set_random_seed(0)
    ours = shake(
        keras_edifice.build(
            "gated_delta_net",
            embed_size=HIDDEN,
            hidden_size=HIDDEN,
            num_heads=2,
            head_dim=KEY,
            expand_v=VALUE / KEY,
            num_layers=LAYERS,
            chunk_size=8,
            return_sequences=True,
            window_size=19,
            **options,
        )
    )
    layers = [ours.get_layer(f"gated_delta_net_{i}") for i in range(LAYERS)]
    peers = [peer_of(layer) for layer in layers]
    w = {
        v.path: torch.tensor(v.numpy(), requires_grad=True)
        for v in ours.trainable_variables
    }
    x, r = np.random.default_rng(0).normal(size=(2, 3, 19, HIDDEN)).astype("float32")
    # Not the sum of squares: after a norm it hardly depends on anything.
    by_weight, by_input = gradients(
        ours, x, lambda y: keras.ops.sum(keras.ops.multiply(y, r))
    )
    x_theirs = torch.tensor(x, requires_grad=True)
    outputs = theirs(x_theirs, peers, w)
    (outputs * torch.tensor(r)).sum().backward()
    expected = {path: z.grad.numpy() for path, z in w.items() if z.grad is not None}
    expected |= dict(gradients_by_path(layers, peers))
    pairs = [(by_input, x_theirs.grad.numpy())]
    pairs += [
        (gradient, expected[variable.path])
        for variable, gradient in zip(ours.trainable_variables, by_weight, strict=True)
    ]
    fidelity.record(
        "gated_delta_net",
        "transformers OlmoHybridGatedDeltaNet",
        forward=difference(ours(x), outputs.detach().numpy()),
        gradient=max(difference(a, b) for a, b in pairs),
    )
