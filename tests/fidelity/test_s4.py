import math

import keras
import numpy as np

import keras_edifice
from tests.support.close import difference, to_numpy
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake

HIDDEN, STATE, LAYERS, LENGTH = 3, 4, 2, 9


def layer_norm(x, gamma, beta):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * gamma + beta


def kernel(w, feature):
    """K_l = Re(C Ā^l B̄) of one feature, by powers of the whole matrix Ā."""

    def whole(name):
        z = w[f"{name}_real"][..., feature, :] + 1j * w[f"{name}_imag"][..., feature, :]
        return np.concatenate([z, z.conj()], axis=-1)

    Lambda = -np.exp(w["A_log"][feature]) + 1j * w["A_imag"][feature]
    Lambda, P = np.concatenate([Lambda, Lambda.conj()]), whole("P")
    A = np.diag(Lambda) - P.T @ P.conj()
    dt, identity = np.exp(w["inv_dt"][feature]), np.eye(STATE)
    inverse = np.linalg.inv(identity - dt / 2 * A)
    step, B = inverse @ (identity + dt / 2 * A), dt * inverse @ whole("B")
    rest = identity - np.linalg.matrix_power(step, LENGTH)
    C, taps = whole("C") @ np.linalg.inv(rest), []
    for _ in range(LENGTH):
        taps.append((C @ B).real)
        B = step @ B
    return np.array(taps)


def layer(u, w):
    taps = np.stack([kernel(w, feature) for feature in range(HIDDEN)], axis=-1)
    y = w["D"] * u
    for lag, tap in enumerate(taps):
        y[:, lag:] += tap * u[:, : u.shape[1] - lag]
    y = y * (1 + np.vectorize(math.erf)(y / np.sqrt(2))) / 2
    y, gate = np.split(y @ w["out_proj/kernel"] + w["out_proj/bias"], 2, axis=-1)
    return y / (1 + np.exp(-gate))


def model(x, w):
    """The whole model in float64; w by the paths of the weights."""
    for i in range(LAYERS):
        prefix = f"s4_{i}/"
        own = {k.removeprefix(prefix): z for k, z in w.items() if k.startswith(prefix)}
        norm = f"s4_{i}_norm"
        x = x + layer(layer_norm(x, w[f"{norm}/gamma"], w[f"{norm}/beta"]), own)
    return layer_norm(x, w["final_norm/gamma"], w["final_norm/beta"])


def test_s4_equals_the_convolution_of_the_paper(fidelity):
    keras.utils.set_random_seed(0)
    ours = shake(
        keras_edifice.build(
            "s4",
            **dict(embed_size=HIDDEN, hidden_size=HIDDEN, state_size=STATE),
            num_layers=LAYERS,
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
        "s4",
        "float64 NumPy: the convolution with the powers of the whole matrix",
        forward=difference(ours(x), model(exact, w)),
        gradient=max(differences),
    )
