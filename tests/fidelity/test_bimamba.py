import keras
import numpy as np
import torch
from mambapy.vim import MambaConfig, VMamba

import keras_edifice
from tests.support.close import difference
from tests.support.gradients import gradients
from tests.support.shaking import shake

HIDDEN, STATE, LAYERS, LENGTH = 20, 4, 2, 13


def pairs_of_weights(ours, theirs):
    """(our variable, their parameter), all but the last norm's."""
    for i, layer in enumerate(theirs.layers):
        block, mixer = ours.get_layer(f"bimamba_{i}"), layer.mixer
        yield ours.get_layer(f"bimamba_{i}_norm").gamma, layer.norm.weight
        yield block.in_proj.kernel, mixer.in_proj.weight
        yield block.out_proj.kernel, mixer.out_proj.weight
        for core, end in ((block.ahead, ""), (block.back, "_b")):
            conv, dt_proj = (getattr(mixer, f"{n}{end}") for n in ("conv1d", "dt_proj"))
            yield core.conv.kernel, conv.weight
            yield core.conv.bias, conv.bias
            yield core.x_proj.kernel, getattr(mixer, f"x_proj{end}").weight
            yield core.dt_proj.kernel, dt_proj.weight
            yield core.dt_bias, dt_proj.bias
            yield core.A_log, getattr(mixer, f"A_log{end}")
            yield core.D, getattr(mixer, f"D{end}")


def as_theirs(variable, array):
    """One of our arrays in the axes of theirs."""
    if variable.path.endswith("conv/kernel"):
        return array.T[:, None]
    return array if variable.name == "A_log" else array.T


def differences(combine):
    """Of the outputs and of the gradients."""
    keras.utils.set_random_seed(0)
    ours = shake(
        keras_edifice.build(
            "bimamba",
            **dict(embed_size=HIDDEN, hidden_size=HIDDEN, state_size=STATE),
            **dict(num_layers=LAYERS, combine=combine, dropout=0.0),
            return_sequences=True,
            window_size=LENGTH,
        )
    )
    config = MambaConfig(
        **dict(d_model=HIDDEN, n_layers=LAYERS, d_state=STATE),
        divide_output=combine == "mean",
    )
    theirs = VMamba(config)
    weights = list(pairs_of_weights(ours, theirs))
    final = ours.get_layer("final_norm").gamma
    assert len(weights) + 1 == len(ours.weights)
    for variable, parameter in weights:
        value = as_theirs(variable, variable.numpy())
        assert parameter.shape == value.shape
        parameter.data.copy_(torch.tensor(value.copy()))
    x = np.random.default_rng(0).normal(size=(3, LENGTH, HIDDEN)).astype("float32")
    by_weight, by_input = gradients(
        ours, x, lambda y: keras.ops.sum(keras.ops.square(y))
    )
    by_weight = {
        v.path: g for v, g in zip(ours.trainable_variables, by_weight, strict=True)
    }
    last = torch.tensor(final.numpy(), requires_grad=True)
    theirs_x = torch.tensor(x, requires_grad=True)
    y = torch.nn.functional.rms_norm(theirs(theirs_x), (HIDDEN,), last, 1e-5)
    y.square().sum().backward()
    pairs = [(by_input, theirs_x.grad.numpy()), (by_weight[final.path], last.grad)]
    pairs += [
        (as_theirs(v, by_weight[v.path]), parameter.grad.numpy())
        for v, parameter in weights
    ]
    forward = difference(ours(x), y.detach().numpy())
    return forward, max(difference(a, b) for a, b in pairs)


def test_bimamba_equals_the_vision_mamba_of_mambapy(fidelity):
    forward, gradient = zip(differences("add"), differences("mean"), strict=True)
    fidelity.record(
        "bimamba",
        "mambapy VMamba, by the sum and by the mean of the directions",
        forward=max(forward),
        gradient=max(gradient),
    )
