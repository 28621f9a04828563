import keras
import numpy as np
import torch
from gated_state_spaces_pytorch import GSS

import keras_edifice
from tests.support.close import difference
from tests.support.gradients import gradients
from tests.support.shaking import shake

HIDDEN, LAYERS, SSM, STATE, LENGTH = 8, 2, 4, 6, 19


def pairs_of_weights(ours, theirs):
    """(our variable, their parameter), all but those of the last norm."""
    for i, layer in enumerate(theirs):
        own, norm = ours.get_layer(f"gss_{i}"), ours.get_layer(f"gss_{i}_norm")
        yield norm.gamma, layer.norm.weight
        yield norm.beta, layer.norm.bias
        yield own.u_proj.kernel, layer.to_u[0].weight
        yield own.v_proj.kernel, layer.to_v[0].weight
        yield own.norm.gamma, layer.dss.norm.weight
        yield own.norm.beta, layer.dss.norm.bias
        yield own.Lambda_real, layer.dss.Lambda_real
        yield own.Lambda_imag, layer.dss.Lambda_imag
        yield own.C_real, layer.dss.C_real
        yield own.C_imag, layer.dss.C_imag
        yield own.D, layer.dss.param_D
        yield own.y_proj.kernel, layer.to_gate.weight
        yield own.out_proj.kernel, layer.to_out.weight
        yield own.out_proj.bias, layer.to_out.bias


def as_theirs(variable, array):
    """One of our arrays in the axes of theirs."""
    return array.T if variable.name == "kernel" else array


def test_gss_equals_that_of_gated_state_spaces_pytorch(fidelity):
    keras.utils.set_random_seed(0)
    ours = shake(
        keras_edifice.build(
            "gss",
            **dict(embed_size=HIDDEN, hidden_size=HIDDEN, num_layers=LAYERS),
            **dict(ssm_size=SSM, state_size=STATE, return_sequences=True),
            window_size=LENGTH,
        )
    )
    theirs = torch.nn.ModuleList(
        GSS(dim=HIDDEN, dim_expansion_factor=4, dss_kernel_N=STATE, dss_kernel_H=SSM)
        for _ in range(LAYERS)
    )
    weights = list(pairs_of_weights(ours, theirs))
    final = ours.get_layer("final_norm")
    assert len(weights) + 2 == len(ours.weights)
    for variable, parameter in weights:
        value = as_theirs(variable, variable.numpy())
        assert parameter.shape == value.shape
        parameter.data.copy_(torch.tensor(value.copy()))
    x, r = np.random.default_rng(0).normal(size=(2, 3, LENGTH, HIDDEN))
    x, r = x.astype("float32"), r.astype("float32")
    by_weight, by_input = gradients(
        ours, x, lambda y: keras.ops.sum(keras.ops.multiply(y, r))
    )
    by_weight = {
        v.path: g for v, g in zip(ours.trainable_variables, by_weight, strict=True)
    }
    last = [torch.tensor(z.numpy(), requires_grad=True) for z in final.weights]
    theirs_x = torch.tensor(x, requires_grad=True)
    y = theirs_x
    for layer in theirs:
        y = layer(y)
    y = torch.nn.functional.layer_norm(y, (HIDDEN,), *last, 1e-5)
    (y * torch.tensor(r)).sum().backward()
    pairs = [(by_input, theirs_x.grad.numpy())]
    pairs += [
        (as_theirs(v, by_weight[v.path]), parameter.grad.numpy())
        for v, parameter in weights
    ]
    pairs += [
        (by_weight[v.path], z.grad.numpy())
        for v, z in zip(final.weights, last, strict=True)
    ]
    fidelity.record(
        "gss",
        "gated-state-spaces-pytorch GSS",
        forward=difference(ours(x), y.detach().numpy()),
        gradient=max(difference(a, b) for a, b in pairs),
    )
