import keras
import numpy as np
import pytest
import torch
from transformers import MambaConfig, MambaModel

import keras_edifice
from tests.support.close import difference
from tests.support.gradients import gradients
from tests.support.shaking import shake

HIDDEN, STATE, LAYERS = 20, 4, 2


def pairs_of_weights(ours, theirs):
    """(our variable, their parameter), all of them."""
    for i, layer in enumerate(theirs.layers):
        block, mixer = ours.get_layer(f"mamba_{i}"), layer.mixer
        yield ours.get_layer(f"mamba_{i}_norm").gamma, layer.norm.weight
        yield block.in_proj.kernel, mixer.in_proj.weight
        yield block.conv.kernel, mixer.conv1d.weight
        yield block.conv.bias, mixer.conv1d.bias
        yield block.x_proj.kernel, mixer.x_proj.weight
        yield block.dt_proj.kernel, mixer.dt_proj.weight
        yield block.dt_bias, mixer.dt_proj.bias
        yield block.A_log, mixer.A_log
        yield block.D, mixer.D
        yield block.out_proj.kernel, mixer.out_proj.weight
    yield ours.get_layer("final_norm").gamma, theirs.norm_f.weight


def as_theirs(variable, array):
    """One of our arrays in the axes of theirs."""
    if variable.path.endswith("conv/kernel"):
        return array.T[:, None]
    return array if variable.name == "A_log" else array.T


@pytest.mark.parametrize("name", ["mamba", "mamba_cumsum", "mamba_hillis_steele"])
def test_mamba_equals_that_of_transformers(name, fidelity):
    keras.utils.set_random_seed(0)
    ours = shake(
        keras_edifice.build(
            name,
            embed_size=HIDDEN,
            hidden_size=HIDDEN,
            state_size=STATE,
            num_layers=LAYERS,
            return_sequences=True,
            window_size=19,
        )
    )
    config = MambaConfig(
        vocab_size=11, hidden_size=HIDDEN, state_size=STATE, num_hidden_layers=LAYERS
    )
    theirs = MambaModel(config)
    weights = list(pairs_of_weights(ours, theirs))
    assert len(weights) == len(ours.weights)
    for variable, parameter in weights:
        value = as_theirs(variable, variable.numpy())
        assert parameter.shape == value.shape
        parameter.data.copy_(torch.tensor(value.copy()))
    x = np.random.default_rng(0).normal(size=(3, 19, HIDDEN)).astype("float32")
    by_weight, by_input = gradients(
        ours, x, lambda y: keras.ops.sum(keras.ops.square(y))
    )
    by_weight = {
        v.path: g for v, g in zip(ours.trainable_variables, by_weight, strict=True)
    }
    theirs_x = torch.tensor(x, requires_grad=True)
    outputs = theirs(inputs_embeds=theirs_x).last_hidden_state
    outputs.square().sum().backward()
    pairs = [(by_input, theirs_x.grad.numpy())]
    pairs += [
        (as_theirs(v, by_weight[v.path]), parameter.grad.numpy())
        for v, parameter in weights
    ]
    fidelity.record(
        name,
        "transformers MambaModel",
        forward=difference(ours(x), outputs.detach().numpy()),
        gradient=max(difference(a, b) for a, b in pairs),
    )
