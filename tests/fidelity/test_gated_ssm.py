import keras
import numpy as np

import keras_edifice
from tests.support.close import difference, to_numpy
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake

HIDDEN, STATE, LAYERS, LENGTH, RANK = 4, 3, 2, 9, 1


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rms_norm(x, gamma):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gamma


def layer(u, w):
    """The gates in plain products and powers, without Δ or exponentials of A."""
    x, z = np.split(u @ w["in_proj/kernel"], 2, axis=-1)
    taps, padded = w["conv/kernel"], np.pad(x, [(0, 0), (3, 0), (0, 0)])
    x = w["conv/bias"] + sum(k * padded[:, j : j + LENGTH] for j, k in enumerate(taps))
    x = x * sigmoid(x)
    delta, B, C = np.split(x @ w["x_proj/kernel"], [RANK, RANK + STATE], axis=-1)
    held = 1 - sigmoid(delta @ w["dt_proj/kernel"] + w["dt_bias"])
    y, h = w["D"] * x, np.zeros((*x.shape[::2], STATE))
    for t in range(LENGTH):
        for n in range(STATE):
            rate = np.exp(w["A_log"][:, n])
            kept = held[:, t] ** rate
            h[..., n] = (
                kept * h[..., n] + (1 - kept) / rate * B[:, t, n, None] * x[:, t]
            )
            y[:, t] += C[:, t, n, None] * h[..., n]
    return (y * z * sigmoid(z)) @ w["out_proj/kernel"]


def model(x, w):
    """The whole model in float64; w by the paths of the weights."""
    for i in range(LAYERS):
        prefix = f"gated_ssm_{i}/"
        own = {k.removeprefix(prefix): z for k, z in w.items() if k.startswith(prefix)}
        x = x + layer(rms_norm(x, w[f"gated_ssm_{i}_norm/gamma"]), own)
    return rms_norm(x, w["final_norm/gamma"])


def test_gated_ssm_equals_its_gates(fidelity):
    keras.utils.set_random_seed(0)
    ours = shake(
        keras_edifice.build(
            "gated_ssm",
            embed_size=HIDDEN,
            hidden_size=HIDDEN,
            state_size=STATE,
            num_layers=LAYERS,
            learn_rates=True,
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

    def value(path, z):
        return (model(exact, {**w, path: z}) * r).sum()

    expected = numerical_gradient(lambda z: (model(z, w) * r).sum(), exact)
    differences = [difference(by_input, expected)]
    for variable, gradient in zip(ours.trainable_variables, by_weight, strict=True):
        path = variable.path
        expected = numerical_gradient(lambda z, path=path: value(path, z), w[path])
        differences.append(difference(gradient, expected))
    fidelity.record(
        "gated_ssm",
        "float64 NumPy: the gates as products and powers",
        forward=difference(ours(x), model(exact, w)),
        gradient=max(differences),
    )
