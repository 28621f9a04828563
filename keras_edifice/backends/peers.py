"""Independent implementations in PyTorch, to measure the operations against.

Each takes the arguments of the operation of this package as torch tensors and returns
its outputs. Those of other packages are imported when they run.
"""

import importlib.util
from pathlib import Path


def _loop_diagonal_scan(decay, inputs):
    import torch

    state, states = torch.zeros_like(inputs[:, 0]), []
    for t in range(inputs.shape[1]):
        state = decay[:, t] * state + inputs[:, t]
        states.append(state)
    return torch.stack(states, dim=1)


def _mambapy_diagonal_scan(decay, inputs):
    from mambapy.pscan import pscan

    return pscan(decay[..., None], inputs[..., None])[..., 0]


def _mambapy_selective_scan(x, dt, A, B, C):
    import torch
    from mambapy.pscan import pscan

    decay = torch.exp(dt[..., None] * A)
    states = pscan(decay, (dt * x)[..., None] * B[:, :, None])
    return (states @ C[..., None])[..., 0]


def _loop_selective_scan(x, dt, A, B, C):
    import torch

    state, outputs = x.new_zeros(*x.shape[::2], A.shape[1]), []
    for t in range(x.shape[1]):
        step = dt[:, t, :, None]
        state = torch.exp(step * A) * state + step * x[:, t, :, None] * B[:, t, None]
        outputs.append((state * C[:, t, None]).sum(-1))
    return torch.stack(outputs, dim=1)


def _loop_linear_attention(q, k, v, log_decay):
    import torch

    state, outputs = 0.0, []
    for t in range(q.shape[1]):
        decay = torch.exp(log_decay[:, t])[..., None, None]
        state = decay * state + k[:, t, ..., None] * v[:, t, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1)


def _fla_linear_attention(q, k, v, log_decay):
    naive = _fla("simple_gla").naive_chunk_simple_gla
    return naive(q, k, v, log_decay, scale=1.0)[0]


def _loop_delta_rule(q, k, v, beta):
    import torch

    state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1])
    outputs = []
    for t in range(q.shape[1]):
        known = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        change = beta[:, t, :, None] * (v[:, t] - known)
        state = state + k[:, t, ..., None] * change[..., None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, dim=1)


def _fla_delta_rule(q, k, v, beta):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    naive = _fla("delta_rule").delta_rule_chunkwise
    outputs = naive(q * q.shape[-1] ** 0.5, k, v, beta.transpose(1, 2))[0]
    return outputs.transpose(1, 2)


def _fla_gated_delta_rule(q, k, v, beta, log_decay):
    naive = _fla("gated_delta_rule").naive_chunk_gated_delta_rule
    return naive(q, k, v, log_decay, beta, scale=1.0)[0]


def _fla(name):
    """A file of plain PyTorch of flash-linear-attention, whose package needs a GPU."""
    package = importlib.util.find_spec("fla")
    if package is None:
        raise ImportError(
            "flash-linear-attention is not installed; "
            "run: pip install --no-deps fla-core"
        )
    path = Path(package.submodule_search_locations[0]) / "ops" / name / "naive.py"
    spec = importlib.util.spec_from_file_location(f"fla_{name}_naive", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LOOP = "loop in PyTorch"
MAMBAPY = "mambapy (PyTorch)"
FLA = "flash-linear-attention, chunkwise reference (PyTorch)"

PEERS = {
    "diagonal scan": {LOOP: _loop_diagonal_scan, MAMBAPY: _mambapy_diagonal_scan},
    "selective scan": {LOOP: _loop_selective_scan, MAMBAPY: _mambapy_selective_scan},
    "linear attention": {LOOP: _loop_linear_attention, FLA: _fla_linear_attention},
    "delta rule": {LOOP: _loop_delta_rule, FLA: _fla_delta_rule},
    "gated delta rule": {FLA: _fla_gated_delta_rule},
}
"""Operation -> its implementations by name."""
