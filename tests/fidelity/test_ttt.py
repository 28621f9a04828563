"""The reference takes every inner gradient from autograd, token by token."""

import keras
import numpy as np
import torch
from torch.func import grad
from torch.nn import functional as F

import keras_edifice
from tests.support.close import difference
from tests.support.gradients import gradients
from tests.support.shaking import shake

HIDDEN, HEADS, LAYERS, CHUNK, BASE_LR = 8, 2, 2, 4, 0.1
INNER = ("W1", "b1", "W2", "b2")


def rms_norm(x, scale):
    return F.rms_norm(x, x.shape[-1:], scale, 1e-6)


def convolved(x, w, name):
    kernel, bias = w[f"{name}/kernel"].T[:, None], w[f"{name}/bias"]
    return F.conv1d(F.pad(x.mT, (3, 0)), kernel, bias, groups=kernel.shape[0]).mT


def gelu(x):
    return F.gelu(x, approximate="tanh")


def turned(x):
    """Pairs of neighbours of x (b, t, h, d), as complex numbers."""
    place = torch.arange(x.shape[1], dtype=x.dtype) % CHUNK
    speed = 10000.0 ** (-torch.arange(0, x.shape[-1], 2, dtype=x.dtype) / x.shape[-1])
    turn = torch.exp(1j * place[:, None] * speed)[:, None]
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def inner(x, parameters, norm):
    """The output of one token of one head."""
    w1, b1, w2, b2 = parameters
    z = gelu(x @ w1 + b1) @ w2 + b2
    return x + F.layer_norm(z, z.shape, *norm, 1e-6)


def loss(parameters, k, v, norm):
    return 0.5 * (inner(k, parameters, norm) - v).square().sum()


def head(q, k, v, rate, token_rate, parameters, norm):
    outputs, start = [], parameters
    for t in range(len(q)):
        place = t % CHUNK
        total = [torch.zeros_like(p) for p in start] if place == 0 else total  # noqa: F821, set at t = 0
        found = grad(loss)(start, k[t], v[t], norm)
        total = [a + rate[t] * g for a, g in zip(total, found, strict=True)]
        now = [p - token_rate[place] * a for p, a in zip(start, total, strict=True)]
        outputs.append(inner(q[t], now, norm))
        start = now if place == CHUNK - 1 else start
    return torch.stack(outputs)


def mixer(x, w, name):
    def heads(z):
        return z.unflatten(2, (HEADS, -1))

    z = x @ w[f"{name}/q_proj/kernel"]
    q, k = (turned(heads(convolved(z, w, f"{name}/{n}_conv"))) for n in "qk")
    v = heads(x @ w[f"{name}/v_proj/kernel"])
    rate = torch.sigmoid(x @ w[f"{name}/lr_kernel"] + w[f"{name}/lr_bias"])
    rate = rate * BASE_LR / q.shape[-1]
    token_rate = 1 / torch.arange(1, CHUNK + 1) + w[f"{name}/token_rate"]
    token_rate = token_rate.clamp_min(0)

    def one(i, j):
        parameters = [w[f"{name}/{part}"][j] for part in INNER]
        norm = w[f"{name}/gamma"][j], w[f"{name}/beta"][j]
        sequences = (z[i, :, j] for z in (q, k, v, rate))
        return head(*sequences, token_rate, parameters, norm)

    rows = [torch.stack([one(i, j) for j in range(HEADS)], 1) for i in range(len(x))]
    norm = w[f"{name}/post_norm/gamma"], w[f"{name}/post_norm/beta"]
    y = F.layer_norm(torch.stack(rows).flatten(2), (HIDDEN,), *norm, 1e-6)
    y = gelu(x @ w[f"{name}/g_proj/kernel"]) * y
    return y @ w[f"{name}/o_proj/kernel"]


def theirs(x, w):
    """The whole model from the weights by their paths."""
    for i in range(LAYERS):
        normed = rms_norm(x, w[f"conv_{i}_norm/gamma"])
        x = x + convolved(normed, w, f"conv_{i}")
        normed = rms_norm(x, w[f"ttt_{i}_norm/gamma"])
        x = x + mixer(normed, w, f"ttt_{i}")
        normed = rms_norm(x, w[f"ffn_{i}_norm/gamma"])
        gate, up = (normed @ w[f"ffn_{i}/{part}/kernel"] for part in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[f"ffn_{i}/down/kernel"]
    return rms_norm(x, w["final_norm/gamma"])


def test_ttt_equals_descent_by_autograd_in_float64(fidelity):
    keras.utils.set_random_seed(0)
    ours = shake(
        keras_edifice.build(
            "ttt",
            embed_size=HIDDEN,
            hidden_size=HIDDEN,
            num_heads=HEADS,
            num_layers=LAYERS,
            inner_model="mlp",
            backbone="mamba",
            pre_conv=True,
            chunk_size=CHUNK,
            return_sequences=True,
            window_size=10,
        )
    )
    w = {
        v.path: torch.tensor(v.numpy(), dtype=torch.float64, requires_grad=True)
        for v in ours.weights
        if "seed_generator" not in v.path
    }
    x, r = np.random.default_rng(0).normal(size=(2, 2, 10, HIDDEN)).astype("float32")
    by_weight, by_input = gradients(
        ours, x, lambda y: keras.ops.sum(keras.ops.multiply(y, r))
    )
    x_theirs = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    outputs = theirs(x_theirs, w)
    (outputs * torch.tensor(r)).sum().backward()
    pairs = [(by_input, x_theirs.grad.numpy())]
    pairs += [
        (gradient, w[variable.path].grad.numpy())
        for variable, gradient in zip(ours.trainable_variables, by_weight, strict=True)
    ]
    fidelity.record(
        "ttt",
        "float64 equations, inner gradients by autograd",
        forward=difference(ours(x), outputs.detach().numpy()),
        gradient=max(difference(a, b) for a, b in pairs),
    )
