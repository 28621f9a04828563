import keras
import numpy as np
import torch

from keras_edifice.energy.hopfield import Hopfield
from tests.support.close import difference, to_numpy
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient
from tests.support.shaking import shake

rng = np.random.default_rng(0)
WIDTH, HEADS = 8, 2
MAPS = ["state_map", "stored_map", "values_map"]
NORMS = ["state_norm", "stored_norm", "values_norm"]


def ours(**options):
    inputs = [keras.Input((None, WIDTH)), keras.Input((None, WIDTH))]
    layer = Hopfield(WIDTH, HEADS, **options)
    return shake(keras.Model(inputs, layer(*inputs))), layer


def ordered(layer):
    """(kernel, bias) of the maps, then (scale, shift) of the norms, as variables."""
    parts = [getattr(layer, name) for name in [*MAPS, "output_map"]]
    pairs = [[part.kernel, part.bias] for part in parts]
    norms = [getattr(layer, name) for name in NORMS]
    return pairs + [[norm.gamma, norm.beta] for norm in norms]


def squares(y):
    return keras.ops.sum(keras.ops.square(y))


def from_torch(state, stored):
    """Differences from MultiheadAttention with the three norms before it."""
    model, layer = ours()
    maps, norms = ordered(layer)[:3], ordered(layer)[4:]
    kernel, bias = ordered(layer)[3]
    attention = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    stacked = [np.concatenate([to_numpy(m[i]).T for m in maps]) for i in range(2)]
    attention.in_proj_weight.data = torch.tensor(stacked[0]).float()
    attention.in_proj_bias.data = torch.tensor(stacked[1]).float()
    attention.out_proj.weight.data = torch.tensor(to_numpy(kernel).T).float()
    attention.out_proj.bias.data = torch.tensor(to_numpy(bias)).float()
    before = [torch.nn.LayerNorm(WIDTH) for _ in NORMS]
    for norm, (scale, shift) in zip(before, norms, strict=True):
        norm.weight.data = torch.tensor(to_numpy(scale)).float()
        norm.bias.data = torch.tensor(to_numpy(shift)).float()
    x = torch.tensor(state, requires_grad=True)
    y = torch.tensor(stored)
    query, key, value = (n(t) for n, t in zip(before, (x, y, y), strict=True))
    expected, _ = attention(query, key, value)
    expected.square().sum().backward()
    in_kernels = attention.in_proj_weight.grad.numpy().reshape(3, WIDTH, WIDTH)
    in_biases = attention.in_proj_bias.grad.numpy().reshape(3, WIDTH)
    theirs = [g for k, b in zip(in_kernels, in_biases, strict=True) for g in (k.T, b)]
    out = attention.out_proj
    theirs += [out.weight.grad.numpy().T, out.bias.grad.numpy()]
    theirs += [w.grad.numpy() for norm in before for w in (norm.weight, norm.bias)]
    by_path, by_state = gradients_by_path(model, state, stored)
    found = [by_path[v.path] for pair in ordered(layer) for v in pair]
    pairs = [(by_state, x.grad.numpy()), *zip(found, theirs, strict=True)]
    forward = difference(model([state, stored]), expected.detach().numpy())
    return forward, max(difference(a, b) for a, b in pairs)


def gradients_by_path(model, state, stored):
    by_weight, by_state = gradients(model, [state, stored], squares)
    weights = model.trainable_variables
    return {v.path: g for v, g in zip(weights, by_weight, strict=True)}, by_state


def reference(state, stored, weights, beta, steps, within):
    """Eq. 10 in float64: norms, maps, `steps` updates, read, for all heads."""

    def norm(x, scale, shift):
        d = x - x.mean(-1, keepdims=True)
        return scale * d / np.sqrt((d**2).mean(-1, keepdims=True) + 1e-5) + shift

    def heads(x):
        return x.reshape(*x.shape[:2], HEADS, -1).swapaxes(1, 2)

    def softmax(x):
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    maps, output, norms = weights[:3], weights[3], weights[4:]
    inputs = [state, stored, stored]
    if within:  # the norm of the association space takes the place of the state's
        inputs[1:] = [norm(x, *n) for x, n in zip(inputs[1:], norms, strict=True)]
    else:
        inputs = [norm(x, *n) for x, n in zip(inputs, norms, strict=True)]
    q, k, v = (heads(x @ w + b) for x, (w, b) in zip(inputs, maps, strict=True))
    if within:
        q, k = norm(q, 1.0, 0.0), norm(k, 1.0, 0.0)
    p = softmax(beta * q @ k.swapaxes(-1, -2))
    for _ in range(steps):
        p = softmax(beta * (p @ k) @ k.swapaxes(-1, -2))
    read = (p @ v).swapaxes(1, 2).reshape(*state.shape[:2], WIDTH)
    return read @ output[0] + output[1]


def from_equations(state, stored, steps, within):
    """Differences from the equations with updates, numerical gradient."""
    model, layer = ours(beta=0.7, update_steps=steps, normalize_association=within)
    if within:
        parts = [getattr(layer, name) for name in [*MAPS, "output_map"]]
        variables = [[part.kernel, part.bias] for part in parts]
        norms = [layer.stored_norm, layer.values_norm]
        variables += [[norm.gamma, norm.beta] for norm in norms]
    else:
        variables = ordered(layer)
    weights = [[to_numpy(v) for v in pair] for pair in variables]

    def loss(state, weights):
        y = reference(state, stored, weights, 0.7, steps, within)
        return np.square(y).sum()

    by_path, by_state = gradients_by_path(model, state, stored)
    found = [(by_state, numerical_gradient(lambda x: loss(x, weights), state))]
    for i, pair in enumerate(variables):
        for j, variable in enumerate(pair):

            def moved(w, i=i, j=j):
                changed = [list(p) for p in weights]
                changed[i][j] = w
                return loss(to_numpy(state), changed)

            expected = numerical_gradient(moved, weights[i][j])
            found.append((by_path[variable.path], expected))
    expected = reference(state, stored, weights, 0.7, steps, within)
    forward = difference(model([state, stored]), expected)
    return forward, max(difference(a, b) for a, b in found)


def test_hopfield_equals_attention_and_its_updates_the_equations(fidelity):
    state = rng.normal(size=(2, 3, WIDTH)).astype("float32")
    stored = rng.normal(size=(2, 5, WIDTH)).astype("float32")
    measured = [from_torch(state, stored)]
    measured += [from_equations(state, stored, 2, within) for within in (False, True)]
    fidelity.record(
        "hopfield",
        "torch.nn.MultiheadAttention without updates, float64 NumPy with them",
        forward=max(forward for forward, _ in measured),
        gradient=max(gradient for _, gradient in measured),
    )
