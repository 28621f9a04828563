import keras
import numpy as np
import torch
from transformers import JambaConfig, JambaModel
from transformers.models.jamba.modeling_jamba import load_balancing_loss_func

import keras_edifice
from tests.support.close import difference
from tests.support.gradients import gradients
from tests.support.shaking import shake

HIDDEN, MLP, STATE, LAYERS, EXPERTS, LENGTH = 20, 12, 4, 4, 4, 13


def pairs_of_weights(ours, theirs):
    """(our variable, their parameter or a part of it, in our axes), all of them."""
    for i, layer in enumerate(theirs.layers):
        kind = "attention" if i == 2 else "mamba"
        own = ours.get_layer(f"{kind}_{i}")
        norm = ours.get_layer(f"{kind}_{i}_norm")
        yield norm.gamma, layer.input_layernorm.weight, lambda z: z
        if kind == "attention":
            for name in ("q", "k", "v"):
                theirs_one = getattr(layer.self_attn, f"{name}_proj").weight
                yield getattr(own, name).kernel, theirs_one, lambda z: z.T
            yield own.out.kernel, layer.self_attn.o_proj.weight, lambda z: z.T
        else:
            mixer, as_it_is = layer.mamba, lambda z: z
            yield own.in_proj.kernel, mixer.in_proj.weight, lambda z: z.T
            yield own.conv.kernel, mixer.conv1d.weight, lambda z: z[:, 0].T
            yield own.conv.bias, mixer.conv1d.bias, as_it_is
            yield own.x_proj.kernel, mixer.x_proj.weight, lambda z: z.T
            yield own.dt_proj.kernel, mixer.dt_proj.weight, lambda z: z.T
            yield own.dt_bias, mixer.dt_proj.bias, as_it_is
            norms = (mixer.dt_layernorm, mixer.b_layernorm, mixer.c_layernorm)
            for norm, theirs_one in zip(own.norms, norms, strict=True):
                yield norm.gamma, theirs_one.weight, as_it_is
            yield own.A_log, mixer.A_log, as_it_is
            yield own.D, mixer.D, as_it_is
            yield own.out_proj.kernel, mixer.out_proj.weight, lambda z: z.T
        yield from feed_forward_pairs(ours, layer, i)
    yield ours.get_layer("final_norm").gamma, theirs.final_layernorm.weight, lambda z: z


def feed_forward_pairs(ours, layer, i):
    kind = "experts" if i % 2 else "ffn"
    own, other = ours.get_layer(f"{kind}_{i}"), layer.feed_forward
    gamma = ours.get_layer(f"{kind}_{i}_norm").gamma
    yield gamma, layer.pre_ff_layernorm.weight, lambda z: z
    if kind == "ffn":
        for name in ("gate", "up", "down"):
            theirs_one = getattr(other, f"{name}_proj").weight
            yield getattr(own, name).kernel, theirs_one, lambda z: z.T
        return
    yield own.router.kernel, other.router.weight, lambda z: z.T
    both = other.experts.gate_up_proj
    yield own.gate, both, lambda z: z[:, :MLP].swapaxes(1, 2)
    yield own.up, both, lambda z: z[:, MLP:].swapaxes(1, 2)
    yield own.down, other.experts.down_proj, lambda z: z.swapaxes(1, 2)


def test_jamba_equals_that_of_transformers(fidelity):
    keras.utils.set_random_seed(0)
    ours = shake(
        keras_edifice.build(
            "jamba",
            **dict(embed_size=HIDDEN, hidden_size=HIDDEN, num_layers=LAYERS),
            **dict(attention_every=4, num_heads=4, num_kv_heads=2, state_size=STATE),
            **dict(mlp_size=MLP, num_experts=EXPERTS, dropout=0.0),
            return_sequences=True,
            window_size=LENGTH,
        )
    )
    theirs = JambaModel(
        JambaConfig(
            **dict(vocab_size=11, hidden_size=HIDDEN, intermediate_size=MLP),
            **dict(num_hidden_layers=LAYERS, num_attention_heads=4),
            **dict(num_key_value_heads=2, attn_layer_period=4, attn_layer_offset=2),
            **dict(num_experts=EXPERTS, mamba_d_state=STATE),
        )
    )
    weights = list(pairs_of_weights(ours, theirs))
    assert len({v.path for v, _, _ in weights}) == len(ours.weights)
    for variable, parameter, ours_of in weights:
        part = ours_of(parameter.data)  # a view, so that this writes theirs
        assert tuple(part.shape) == variable.shape
        part.copy_(torch.tensor(variable.numpy()))
    x = np.random.default_rng(0).normal(size=(3, LENGTH, HIDDEN)).astype("float32")
    by_weight, by_input = gradients(
        ours, x, lambda y: keras.ops.sum(keras.ops.square(y))
    )
    by_weight = {
        v.path: g for v, g in zip(ours.trainable_variables, by_weight, strict=True)
    }
    theirs_x = torch.tensor(x, requires_grad=True)
    outputs = theirs(inputs_embeds=theirs_x, use_cache=False).last_hidden_state
    outputs.square().sum().backward()
    pairs = [(by_input, theirs_x.grad.numpy())]
    pairs += [(by_weight[v.path], f(p.grad).numpy()) for v, p, f in weights]
    fidelity.record(
        "jamba",
        "transformers JambaModel",
        forward=difference(ours(x), outputs.detach().numpy()),
        gradient=max(difference(a, b) for a, b in pairs),
    )


def test_the_loss_of_the_router_equals_that_of_transformers():
    keras.utils.set_random_seed(0)
    ours = shake(
        keras_edifice.build(
            "jamba",
            **dict(embed_size=HIDDEN, hidden_size=HIDDEN, num_layers=2, dropout=0.0),
            **dict(num_heads=4, mlp_size=MLP, num_experts=EXPERTS),
            **dict(router_aux_weight=1.0, window_size=LENGTH),
        )
    )
    x = np.random.default_rng(0).normal(size=(3, LENGTH, HIDDEN)).astype("float32")
    ours(x, training=True)
    experts = ours.get_layer("experts_1")
    before = keras.Model(ours.input, experts.input)
    logits = experts.router(before(x))
    logits = logits.reshape(-1, EXPERTS)
    expected = load_balancing_loss_func((logits,), EXPERTS, 2)
    (found,) = ours.losses
    assert difference(found, expected) < 1e-5
