import keras
import numpy as np
import titans_pytorch
import torch
from torch.nn import functional as F

import keras_edifice
from tests.support.close import difference
from tests.support.gradients import gradients
from tests.support.shaking import shake

HIDDEN, HEADS, SIZE, LAYERS, CHUNK, MAX_LR = 6, 2, 4, 2, 3, 0.1
GATES = {"theta": "to_adaptive_step", "alpha": "to_decay_factor", "eta": "to_momentum"}


class UnitLength(torch.nn.Module):
    """In the place of the norm of queries and keys, which keeps another length."""

    def forward(self, x):
        return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def squared_error(prediction, target):
    return (prediction - target).square().sum(-1)


def peer():
    """The memory of the package, summed errors, without norm around and head gates."""
    memory = titans_pytorch.NeuralMemory(
        dim=HIDDEN,
        dim_head=SIZE,
        heads=HEADS,
        chunk_size=1,
        batch_size=CHUNK,
        model=titans_pytorch.MemoryMLP(SIZE, depth=2, expansion_factor=1.5),
        store_memory_loss_fn=squared_error,
        default_step_transform_max_lr=MAX_LR,
        pre_rmsnorm=False,
        activation=torch.nn.SiLU(),
    )
    memory.q_norm = memory.k_norm = UnitLength()
    memory.retrieve_gate = None
    return memory


def fill(memory, layer):
    """Copies the weights; gives our names and their parameters, with how to turn."""
    pairs = {"o_proj/kernel": (memory.combine_heads.weight, "T")}
    for name, part in zip("qkv", ("queries", "keys", "values"), strict=True):
        pairs[f"{name}_proj/kernel"] = getattr(memory, f"to_{part}")[0].weight, "T"
    for name, part in GATES.items():
        linear = getattr(memory, part)[0]
        pairs[f"{name}_kernel"], pairs[f"{name}_bias"] = (
            (linear.weight, "T"),
            (linear.bias, ""),
        )
    names = {"norm.gamma": "gain", "model.weights.0": "M1", "model.weights.1": "M2"}
    parameters = memory.memory_model_parameters
    for name, weight in zip(
        memory.memory_model_parameter_names, parameters, strict=True
    ):
        pairs[names[name]] = weight, ""
    ours = {v.path.removeprefix(f"{layer.path}/"): v.numpy() for v in layer.weights}
    assert set(pairs) == set(ours)
    for name, (weight, turn) in pairs.items():
        value = torch.tensor(ours[name].T.copy() if turn else ours[name])
        assert weight.shape == value.shape, name
        weight.data = value
    return pairs


def rms_norm(x, scale):
    return F.rms_norm(x, x.shape[-1:], scale, 1e-6)


def theirs(x, w, memories):
    """The whole model: the memories of the package, the rest from weights by path."""
    for i, memory in enumerate(memories):
        x = x + memory(rms_norm(x, w[f"titans_{i}_norm/gamma"]))[0]
        normed = rms_norm(x, w[f"ffn_{i}_norm/gamma"])
        gate, up = (normed @ w[f"ffn_{i}/{part}/kernel"] for part in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ w[f"ffn_{i}/down/kernel"]
    return rms_norm(x, w["final_norm/gamma"])


def test_titans_equals_the_memory_of_titans_pytorch(fidelity):
    keras.utils.set_random_seed(0)
    ours = shake(
        keras_edifice.build(
            "titans",
            embed_size=HIDDEN,
            hidden_size=HIDDEN,
            num_heads=HEADS,
            num_layers=LAYERS,
            memory_as="alone",
            memory_size=SIZE,
            memory_expansion=1.5,
            chunk_size=CHUNK,
            max_lr=MAX_LR,
            conv_size=0,
            return_sequences=True,
            window_size=10,
        )
    )
    w = {
        v.path: torch.tensor(v.numpy(), requires_grad=True)
        for v in ours.trainable_variables
    }
    memories, parameters = [], {}
    for i in range(LAYERS):
        memories.append(peer())
        pairs = fill(memories[-1], ours.get_layer(f"titans_{i}"))
        parameters |= {f"titans_{i}/{name}": pair for name, pair in pairs.items()}
    x, r = np.random.default_rng(0).normal(size=(2, 2, 10, HIDDEN)).astype("float32")
    by_weight, by_input = gradients(
        ours, x, lambda y: keras.ops.sum(keras.ops.multiply(y, r))
    )
    x_theirs = torch.tensor(x, requires_grad=True)
    outputs = theirs(x_theirs, w, memories)
    (outputs * torch.tensor(r)).sum().backward()

    def their_gradient(path):
        weight, turn = parameters.get(path) or (w[path], "")
        return weight.grad.numpy().T if turn else weight.grad.numpy()

    pairs = [(by_input, x_theirs.grad.numpy())]
    pairs += [
        (gradient, their_gradient(variable.path))
        for variable, gradient in zip(ours.trainable_variables, by_weight, strict=True)
    ]
    fidelity.record(
        "titans",
        "titans-pytorch NeuralMemory",
        forward=difference(ours(x), outputs.detach().numpy()),
        gradient=max(difference(a, b) for a, b in pairs),
    )
