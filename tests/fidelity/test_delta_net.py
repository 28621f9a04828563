import importlib.util
from pathlib import Path

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

HIDDEN, HEADS, LAYERS = 12, 3, 2
PARTS = "qkv"


def naive_file():
    """The plain file of the package, which itself needs a GPU's compiler."""
    folder = importlib.util.find_spec("fla").submodule_search_locations[0]
    path = Path(folder) / "ops" / "delta_rule" / "naive.py"
    spec = importlib.util.spec_from_file_location("fla_naive_delta_rule", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


delta_rule_recurrence = naive_file().delta_rule_recurrence


def rms_norm(x, scale):
    return F.rms_norm(x, x.shape[-1:], scale, 1e-6)


def mixer(x, w, name):
    """One layer around the recurrence of the package, which scales q by itself."""
    streams = []
    for part in PARTS:
        z = x @ w[f"{name}/{part}_proj/kernel"]
        kernel = w[f"{name}/{part}_conv/kernel"].T[:, None]
        z = F.conv1d(F.pad(z.mT, (3, 0)), kernel, groups=kernel.shape[0]).mT
        streams.append(F.silu(z).unflatten(2, (HEADS, -1)).transpose(1, 2))
    q, k, v = streams
    q, k = (z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
    beta = torch.sigmoid(x @ w[f"{name}/b_proj/kernel"]).mT
    o, _ = delta_rule_recurrence(q, k, v, beta)
    o = rms_norm(o.transpose(1, 2), w[f"{name}/o_norm/gamma"])
    return o.flatten(2) @ w[f"{name}/o_proj/kernel"]


def theirs(x, w):
    """The whole model from the weights by their paths."""
    for i in range(LAYERS):
        normed = rms_norm(x, w[f"delta_net_{i}_norm/gamma"])
        x = x + mixer(normed, w, f"delta_net_{i}")
        normed = rms_norm(x, w[f"ffn_{i}_norm/gamma"])
        gate, up = (normed @ w[f"ffn_{i}/{part}/kernel"] for part in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[f"ffn_{i}/down/kernel"]
    return rms_norm(x, w["final_norm/gamma"])


def test_delta_net_equals_the_naive_recurrence_of_fla(fidelity):
    keras.utils.set_random_seed(0)
    ours = shake(
        keras_edifice.build(
            "delta_net",
            embed_size=HIDDEN,
            hidden_size=HIDDEN,
            num_heads=HEADS,
            num_layers=LAYERS,
            chunk_size=8,
            return_sequences=True,
            window_size=19,
        )
    )
    w = {v.path: torch.tensor(v.numpy(), requires_grad=True) for v in ours.weights}
    w = {path: value for path, value in w.items() if "seed_generator" not in path}
    x, r = np.random.default_rng(0).normal(size=(2, 3, 19, HIDDEN)).astype("float32")
    # Not the sum of squares: after a norm it hardly depends on anything.
    by_weight, by_input = gradients(
        ours, x, lambda y: keras.ops.sum(keras.ops.multiply(y, r))
    )
    x_theirs = torch.tensor(x, requires_grad=True)
    outputs = theirs(x_theirs, w)
    (outputs * torch.tensor(r)).sum().backward()
    pairs = [(by_input, x_theirs.grad.numpy())]
    pairs += [
        (gradient, w[variable.path].grad.numpy())
        for variable, gradient in zip(ours.trainable_variables, by_weight, strict=True)
    ]
    fidelity.record(
        "delta_net",
        "fla naive delta rule",
        forward=difference(ours(x), outputs.detach().numpy()),
        gradient=max(difference(a, b) for a, b in pairs),
    )


@pytest.mark.parametrize("allow_neg_eigval", [False, True])
def test_gated_layer_equals_that_of_transformers_without_decay(allow_neg_eigval):
    keras.utils.set_random_seed(0)
    ours = keras_edifice.recurrent.delta_net.DeltaNetLayer(
        HEADS, use_gate=True, allow_neg_eigval=allow_neg_eigval, norm_eps=1e-5
    )
    ours.build((None, None, HIDDEN))
    shake(ours)
    config = OlmoHybridConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        linear_num_value_heads=HEADS,
        linear_num_key_heads=HEADS,
        linear_key_head_dim=HIDDEN // HEADS,
        linear_value_head_dim=HIDDEN // HEADS,
        linear_conv_kernel_dim=4,
        linear_allow_neg_eigval=allow_neg_eigval,
    )
    peer = OlmoHybridGatedDeltaNet(config, 0)
    for name in ("q_proj", "k_proj", "v_proj", "b_proj", "g_proj", "o_proj"):
        kernel = getattr(ours, name).kernel.numpy()
        getattr(peer, name).weight.data = torch.tensor(kernel.T.copy())
    kernels = np.concatenate([conv.kernel.numpy().T for conv in ours.convs])
    peer.conv1d.weight.data = torch.tensor(kernels[:, None])
    peer.o_norm.weight.data = torch.tensor(ours.o_norm.gamma.numpy())
    peer.A_log.data.fill_(-np.inf)
    x = np.random.default_rng(0).normal(size=(3, 19, HIDDEN)).astype("float32")
    assert difference(ours(x), peer(torch.tensor(x)).detach().numpy()) < 1e-5
