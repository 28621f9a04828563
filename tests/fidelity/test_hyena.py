import math

import keras
import numpy as np

import keras_edifice
from tests.support.close import difference, to_numpy
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake

HIDDEN, ORDER, LAYERS, LENGTH = 4, 3, 2, 7
FILTER = dict(filter_size=3, filter_emb=5, filter_layers=1, filter_freq=2.0)


def layer_norm(x, gamma, beta):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * gamma + beta


def convolved(x, taps):
    """Σ_l taps_l x_{t-l}."""
    y = np.zeros_like(x)
    for lag, tap in enumerate(taps):
        y[:, lag:] += tap * x[:, : x.shape[1] - lag]
    return y


def filters(w):
    """The taps, (length, (order - 1) hidden): sines of the time, and a window."""
    h = w["filter/z"]
    for i in range(FILTER["filter_layers"] + 1):
        h = h @ w[f"filter/kernel_{i}"] + w[f"filter/bias_{i}"]
        h = np.sin(w["filter/freq"] * h)
    h = h @ w["filter/out_kernel"]
    slow, fast = math.log(100) / 1.5, math.log(100) / 0.3
    delta = np.linspace(slow, fast, h.shape[1])
    return h * np.exp(-np.linspace(0, 1, LENGTH)[:, None] * delta)


def operator(u, w):
    u = u @ w["in_proj/kernel"] + w["in_proj/bias"]
    u = convolved(u, w["conv/kernel"][::-1]) + w["conv/bias"]
    first, *gates, v = np.split(u, ORDER + 1, axis=-1)
    taps = np.split(filters(w), ORDER - 1, axis=-1)
    for h, b, gate in zip(taps, w["bias"], gates[::-1], strict=True):
        v = v * gate
        v = convolved(v, h) + b * v
    return (v * first) @ w["out_proj/kernel"] + w["out_proj/bias"]


def mlp(x, w):
    x = x @ w["up/kernel"] + w["up/bias"]
    x = x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return x @ w["down/kernel"] + w["down/bias"]


def model(x, w):
    """The whole model in float64; w by the paths of the weights."""
    for i in range(LAYERS):
        for name, branch in {f"hyena_{i}": operator, f"mlp_{i}": mlp}.items():
            own = {k.removeprefix(f"{name}/"): z for k, z in w.items()}
            u = layer_norm(x, w[f"{name}_norm/gamma"], w[f"{name}_norm/beta"])
            x = x + branch(u, own)
    return layer_norm(x, w["final_norm/gamma"], w["final_norm/beta"])


def test_hyena_equals_the_convolutions_of_the_paper(fidelity):
    keras.utils.set_random_seed(0)
    ours = shake(
        keras_edifice.build(
            "hyena",
            **dict(embed_size=HIDDEN, hidden_size=HIDDEN, num_layers=LAYERS),
            **dict(order=ORDER, mlp_ratio=1.0, **FILTER),
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
        "hyena",
        "float64 NumPy: the filters and convolutions of the paper",
        forward=difference(ours(x), model(exact, w)),
        gradient=max(differences),
    )
