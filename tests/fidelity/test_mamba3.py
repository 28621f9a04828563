import keras
import numpy as np

import keras_edifice
from tests.support.close import difference, to_numpy
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake

HIDDEN, STATE, HEADS, HEAD_DIM, LENGTH, RANK = 4, 4, 2, 4, 6, 2
WIDTH, PAIRS = HEADS * HEAD_DIM, 1


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms_norm(x, gamma):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gamma


def rotation(angle):
    """The matrix (batch, N, N) that turns the first pair by angle (batch,)."""
    cos, sin = np.cos(angle), np.sin(angle)
    matrix = np.eye(STATE) + np.zeros((len(angle), 1, 1))
    matrix[:, 0, 0], matrix[:, 0, 1] = cos, -sin
    matrix[:, 1, 0], matrix[:, 1, 1] = sin, cos
    return matrix


def mixer(u, w):
    """The state itself turns, head by head; its B and C do not."""
    widths = [WIDTH, WIDTH, RANK * STATE, RANK * STATE, HEADS, HEADS, HEADS]
    z, x, B, C, dt, a, lam, turn = np.split(
        u @ w["in_proj/kernel"], np.cumsum(widths), axis=-1
    )
    B = rms_norm(B.reshape(*B.shape[:2], RANK, STATE), w["B_norm/gamma"])
    C = rms_norm(C.reshape(*C.shape[:2], RANK, STATE), w["C_norm/gamma"])
    dt, lam = np.log1p(np.exp(dt + w["dt_bias"])), sigmoid(lam)
    A = -np.where(a >= 0, 1 + a, 1 / (1 + np.abs(a)))
    y = np.zeros_like(x)
    for h in range(HEADS):
        own = slice(h * HEAD_DIM, (h + 1) * HEAD_DIM)
        m_x, m_z, m_o = (w[f"mimo_{v}"][h] for v in "xzo")
        keys, queries = B + w["B_bias"][h], C + w["C_bias"][h]
        S = before = np.zeros((len(u), STATE, HEAD_DIM))
        for t in range(LENGTH):
            step, share = dt[:, t, h, None, None], lam[:, t, h, None, None]
            inputs = m_x * x[:, t, None, own]  # (b, R, P)
            now = np.swapaxes(keys[:, t], 1, 2) @ inputs
            back = rotation(-np.pi * dt[:, t, h] * np.tanh(turn[:, t, 0]))
            kept = np.exp(step * A[:, t, h, None, None]) * back
            S = kept @ (S + (1 - share) * step * before) + share * step * now
            before = now
            out = queries[:, t] @ S + w["D"][h] * inputs
            gate = m_z * z[:, t, None, own]
            y[:, t, own] = (m_o * out * gate * sigmoid(gate)).sum(1)
    return y @ w["out_proj/kernel"]


def model(x, w):
    """The whole model of one layer in float64; w by the paths of the weights."""
    own = {k.removeprefix("mamba_0/"): z for k, z in w.items()}
    x = x + mixer(rms_norm(x, w["mamba_0_norm/gamma"]), own)
    y = rms_norm(x, w["ffn_0_norm/gamma"])
    gate = y @ w["ffn_0/gate/kernel"]
    hidden = gate * sigmoid(gate) * (y @ w["ffn_0/up/kernel"])
    return rms_norm(x + hidden @ w["ffn_0/down/kernel"], w["final_norm/gamma"])


def test_mamba3_equals_a_state_that_turns(fidelity):
    keras.utils.set_random_seed(0)
    ours = shake(
        keras_edifice.build(
            "mamba3",
            **dict(embed_size=HIDDEN, hidden_size=HIDDEN, num_layers=1),
            **dict(state_size=STATE, head_dim=HEAD_DIM, mimo=True, rank=RANK),
            **dict(dt_min=0.1, dt_max=1.0, chunk_size=4, mlp_ratio=1.0),
            return_sequences=True,
            window_size=LENGTH,
        )
    )
    w = {v.path: to_numpy(v) for v in ours.weights}
    x, r = np.random.default_rng(0).normal(size=(2, 2, LENGTH, HIDDEN))
    x, r = x.astype("float32"), r.astype("float32")
    by_weight, by_input = gradients(
        ours, x, lambda y: keras.ops.sum(keras.ops.multiply(y, r))
    )
    exact = to_numpy(x)
    pairs = [
        (by_input, numerical_gradient(lambda z: (model(z, w) * r).sum(), exact)),
    ]
    for v, found in zip(ours.trainable_variables, by_weight, strict=True):

        def value(z, path=v.path):
            return (model(exact, {**w, path: z}) * r).sum()

        pairs.append((found, numerical_gradient(value, w[v.path])))
    fidelity.record(
        "mamba3",
        "float64 NumPy: a state that turns",
        forward=difference(ours(x), model(exact, w)),
        gradient=max(difference(a, b) for a, b in pairs),
    )
