import keras
import numpy as np
import torch
from torch.nn.functional import softplus
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRotaryEmbedding,
)

import keras_edifice
from tests.support.close import difference, to_numpy
from tests.support.gradients import gradients
from tests.support.shaking import shake

HIDDEN, HEADS, KV_HEADS, STATE, MLP, LAYERS, LENGTH = 8, 4, 2, 3, 6, 4, 13
CONFIG = LlamaConfig(
    **dict(hidden_size=HIDDEN, intermediate_size=MLP, num_attention_heads=HEADS),
    **dict(num_key_value_heads=KV_HEADS, attn_implementation="eager"),
)


def norm(x, gamma):
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / HIDDEN**0.5
    return x / (length + 1e-5) * gamma


def hyena(u, w):
    """The modal Hyena block, step by step in complex numbers."""
    u = u @ w["in_proj/kernel"] + w["in_proj/bias"]
    taps = w["conv/kernel"]
    steps = [
        sum(taps[-1 - lag] * u[:, t - lag] for lag in range(min(t + 1, len(taps))))
        for t in range(LENGTH)
    ]
    p = (torch.stack(steps, 1) + w["conv/bias"]).unflatten(-1, (HEADS, 3, -1))
    x2, x1, v = (part.flatten(-2) for part in p.unbind(-2))
    poles = torch.polar(torch.exp(-softplus(w["decay"])), w["phase"])
    residues = torch.complex(w["R_real"], w["R_imag"])
    s, outputs = torch.zeros(len(u), HIDDEN, STATE, dtype=torch.complex128), []
    for t in range(LENGTH):
        s = poles * s + (x1 * v)[:, t, :, None]
        outputs.append((residues * s).sum(-1).real)
    y = (torch.stack(outputs, 1) + w["D"] * x1 * v) * x2
    return y @ w["out_proj/kernel"] + w["out_proj/bias"]


def through(module, w, names, *arguments, **options):
    """A module of transformers with our matrices in place of its own."""
    weights = {f"{theirs}.weight": w[f"{ours}/kernel"].T for ours, theirs in names}
    return torch.func.functional_call(module.double(), weights, arguments, options)


def attention(u, w):
    names = [("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "o_proj")]
    positions = torch.arange(LENGTH)[None]
    hidden = torch.full((LENGTH, LENGTH), -torch.inf, dtype=u.dtype).triu(1)
    return through(
        LlamaAttention(CONFIG, 0),
        w,
        names,
        u,
        position_embeddings=LlamaRotaryEmbedding(CONFIG)(u, positions),
        attention_mask=hidden[None, None],
    )[0]


def mlp(u, w):
    names = [(name, f"{name}_proj") for name in ("gate", "up", "down")]
    return through(LlamaMLP(CONFIG), w, names, u)


def model(x, w):
    """The whole model; w by the paths of the weights."""
    for i in range(LAYERS):
        mixer = {f"attention_{i}": attention} if i % 2 else {f"hyena_{i}": hyena}
        for name, branch in {**mixer, f"mlp_{i}": mlp}.items():
            own = {k.removeprefix(f"{name}/"): z for k, z in w.items()}
            x = x + branch(norm(x, w[f"{name}_norm/gamma"]), own)
    return norm(x, w["final_norm/gamma"])


def test_striped_hyena_equals_its_recurrence_and_the_attention_of_llama(fidelity):
    keras.utils.set_random_seed(0)
    ours = shake(
        keras_edifice.build(
            "striped_hyena",
            **dict(embed_size=HIDDEN, hidden_size=HIDDEN, num_layers=LAYERS),
            **dict(num_heads=HEADS, num_kv_heads=KV_HEADS, state_size=STATE),
            **dict(mlp_size=MLP, window_size=LENGTH, dropout=0.0),
            return_sequences=True,
        )
    )
    w = {
        v.path: torch.tensor(to_numpy(v), requires_grad=True)
        for v in ours.trainable_variables
    }
    x = np.random.default_rng(0).normal(size=(2, LENGTH, HIDDEN)).astype("float32")
    by_weight, by_input = gradients(
        ours, x, lambda y: keras.ops.sum(keras.ops.square(y))
    )
    exact = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    outputs = model(exact, w)
    outputs.square().sum().backward()
    pairs = [(by_input, exact.grad)]
    pairs += [
        (gradient, w[v.path].grad)
        for v, gradient in zip(ours.trainable_variables, by_weight, strict=True)
    ]
    fidelity.record(
        "striped_hyena",
        "float64 recurrence of the paper; transformers LlamaAttention",
        forward=difference(ours(x), outputs.detach().numpy()),
        gradient=max(difference(a, b.numpy()) for a, b in pairs),
    )
