import math

import keras
import numpy as np

import keras_edifice
from tests.support.close import difference, to_numpy
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake

HIDDEN, HEAD, STATE, TAPS, LAYERS, LENGTH = 4, 2, 4, 3, 2, 7


def layer_norm(x, gamma, beta):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * gamma + beta


def convolved(x, taps):
    """Σ_l taps_l x_{t-l}; the other axes of the taps are those of x or 1."""
    y = np.zeros_like(x)
    for lag, tap in enumerate(taps[: x.shape[1]]):
        y[:, lag:] += tap * x[:, : x.shape[1] - lag]
    return y


def register_taps(w):
    """Σ_n B_n C_{n+l} of the shift register, (taps, features)."""
    B, C = w["shift/B"], w["shift/C"]
    return np.stack([(B[: TAPS - lag] * C[lag:]).sum(0) for lag in range(TAPS)])


def diagonal_taps(w):
    """2 Re Σ_n C_n B̄_n Ā_n^l by the bilinear method, (length, heads)."""
    Lambda, dt = -np.exp(w["A_log"]) + 1j * w["A_imag"], np.exp(w["log_dt"])[:, None]
    weight = (w["C_real"] + 1j * w["C_imag"]) * (w["B_real"] + 1j * w["B_imag"])
    weight = weight * dt / (1 - dt / 2 * Lambda)
    step = (1 + dt / 2 * Lambda) / (1 - dt / 2 * Lambda)
    return np.stack([2 * (weight * step**lag).sum(-1).real for lag in range(LENGTH)])


def layer(u, w):
    q, k, v = (u @ w[f"{n}_proj/kernel"] + w[f"{n}_proj/bias"] for n in "qkv")
    k = convolved(k, register_taps(w)) + w["shift/D"] * k
    q, k, v = (z.reshape(*z.shape[:2], -1, HEAD) for z in (q, k, v))
    kv = np.einsum("bthi,bthj->bthij", k, v)
    y = convolved(kv, diagonal_taps(w)[..., None, None])
    y = np.einsum("bthi,bthij->bthj", q, y + w["D"][:, None, None] * kv)
    return y.reshape(u.shape) @ w["out_proj/kernel"] + w["out_proj/bias"]


def mlp(x, w):
    x = x @ w["up/kernel"] + w["up/bias"]
    x = x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return x @ w["down/kernel"] + w["down/bias"]


def model(x, w):
    """The whole model in float64; w by the paths of the weights."""
    for i in range(LAYERS):
        for name, branch in {f"h3_{i}": layer, f"mlp_{i}": mlp}.items():
            own = {k.removeprefix(f"{name}/"): z for k, z in w.items()}
            u = layer_norm(x, w[f"{name}_norm/gamma"], w[f"{name}_norm/beta"])
            x = x + branch(u, own)
    return layer_norm(x, w["final_norm/gamma"], w["final_norm/beta"])


def test_h3_equals_the_convolutions_of_the_paper(fidelity):
    keras.utils.set_random_seed(0)
    ours = shake(
        keras_edifice.build(
            "h3",
            **dict(embed_size=HIDDEN, hidden_size=HIDDEN, num_layers=LAYERS),
            **dict(head_dim=HEAD, state_size=STATE, shift_size=TAPS, mlp_ratio=1.0),
            dt_min=0.05,  # steps so long that the kernel changes within the window
            dt_max=0.5,
            return_sequences=True,
            window_size=LENGTH,
        )
    )
    w = {v.path: to_numpy(v) for v in ours.weights if "seed" not in v.path}
    x = np.random.default_rng(0).normal(size=(2, LENGTH, HIDDEN)).astype("float32")
    by_weight, by_input = gradients(
        ours, x, lambda y: keras.ops.sum(keras.ops.square(y))
    )
    exact = to_numpy(x)

    def value(path, z):
        return np.square(model(exact, {**w, path: z})).sum()

    expected = numerical_gradient(lambda z: np.square(model(z, w)).sum(), exact)
    differences = [difference(by_input, expected)]
    for variable, gradient in zip(ours.trainable_variables, by_weight, strict=True):
        path = variable.path
        expected = numerical_gradient(lambda z, path=path: value(path, z), w[path])
        differences.append(difference(gradient, expected))
    fidelity.record(
        "h3",
        "float64 NumPy: the two convolutions of the paper",
        forward=difference(ours(x), model(exact, w)),
        gradient=max(differences),
    )
