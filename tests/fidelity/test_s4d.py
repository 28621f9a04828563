import math

import keras
import numpy as np

import keras_edifice
from tests.support.close import difference, to_numpy
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake

HIDDEN, STATE, LAYERS, LENGTH = 4, 4, 2, 9


def layer_norm(x, gamma, beta):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * gamma + beta


def kernel(w, length):
    """k_l = 2 Re Σ_n C_n B̄_n Ā_n^l by the zero-order hold, (length, features)."""
    Lambda = -np.exp(w["A_log"]) + 1j * w["A_imag"]
    rate = np.exp(w["inv_dt"])[:, None] * Lambda
    weight = (w["C_real"] + 1j * w["C_imag"]) * (w["B_real"] + 1j * w["B_imag"])
    weight = weight * (np.exp(rate) - 1) / Lambda
    powers = np.exp(np.arange(length)[:, None, None] * rate)
    return 2 * (weight * powers).sum(-1).real


def layer(u, w):
    taps = kernel(w, u.shape[1])
    y = w["D"] * u
    for lag, tap in enumerate(taps):
        y[:, lag:] += tap * u[:, : u.shape[1] - lag]
    y = y * (1 + np.vectorize(math.erf)(y / np.sqrt(2))) / 2
    y, gate = np.split(y @ w["out_proj/kernel"] + w["out_proj/bias"], 2, axis=-1)
    return y / (1 + np.exp(-gate))


def model(x, w):
    """The whole model in float64; w by the paths of the weights."""
    for i in range(LAYERS):
        prefix = f"s4d_{i}/"
        own = {k.removeprefix(prefix): z for k, z in w.items() if k.startswith(prefix)}
        norm = f"s4d_{i}_norm"
        x = x + layer(layer_norm(x, w[f"{norm}/gamma"], w[f"{norm}/beta"]), own)
    return layer_norm(x, w["final_norm/gamma"], w["final_norm/beta"])


def test_s4d_equals_the_convolution_of_the_paper(fidelity):
    keras.utils.set_random_seed(0)
    ours = shake(
        keras_edifice.build(
            "s4d",
            embed_size=HIDDEN,
            hidden_size=HIDDEN,
            state_size=STATE,
            num_layers=LAYERS,
            learn_b=True,
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
        "s4d",
        "float64 NumPy: the convolution with the kernel of the paper",
        forward=difference(ours(x), model(exact, w)),
        gradient=max(differences),
    )
