import keras
import numpy as np
import torch
from transformers import Mamba2Config, Mamba2Model

import keras_edifice
from tests.support.close import difference
from tests.support.gradients import gradients
from tests.support.shaking import shake

HIDDEN, STATE, LAYERS, HEAD_DIM, GROUPS, CHUNK = 16, 8, 2, 8, 2, 4


def pairs_of_weights(ours, theirs):
    """(our variable, their parameter), all of them."""
    for i, layer in enumerate(theirs.layers):
        block, mixer = ours.get_layer(f"mamba_{i}"), layer.mixer
        yield ours.get_layer(f"mamba_{i}_norm").gamma, layer.norm.weight
        yield block.in_proj.kernel, mixer.in_proj.weight
        yield block.conv.kernel, mixer.conv1d.weight
        yield block.conv.bias, mixer.conv1d.bias
        yield block.dt_bias, mixer.dt_bias
        yield block.A_log, mixer.A_log
        yield block.D, mixer.D
        yield block.norm.gamma, mixer.norm.weight
        yield block.out_proj.kernel, mixer.out_proj.weight
    yield ours.get_layer("final_norm").gamma, theirs.norm_f.weight


def as_theirs(variable, array):
    """One of our arrays in the axes of theirs."""
    return array.T[:, None] if variable.path.endswith("conv/kernel") else array.T


def test_mamba_ssd_equals_that_of_transformers(fidelity):
    keras.utils.set_random_seed(0)
    ours = shake(
        keras_edifice.build(
            "mamba_ssd",
            embed_size=HIDDEN,
            hidden_size=HIDDEN,
            state_size=STATE,
            head_dim=HEAD_DIM,
            num_groups=GROUPS,
            chunk_size=CHUNK,
            num_layers=LAYERS,
            dt_min=0.1,  # steps so long that the state matters
            dt_max=0.5,
            return_sequences=True,
            window_size=19,
        )
    )
    config = Mamba2Config(
        vocab_size=11,
        hidden_size=HIDDEN,
        state_size=STATE,
        num_hidden_layers=LAYERS,
        expand=2,
        head_dim=HEAD_DIM,
        num_heads=2 * HIDDEN // HEAD_DIM,
        n_groups=GROUPS,
        chunk_size=CHUNK,
    )
    theirs = Mamba2Model(config)
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
        "mamba_ssd",
        "transformers Mamba2Model",
        forward=difference(ours(x), outputs.detach().numpy()),
        gradient=max(difference(a, b) for a, b in pairs),
    )
