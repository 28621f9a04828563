"""Whether PyTorch runs a layer now, and what it may keep between two calls."""

import keras


def runs_now(x):
    """True if `x` is a tensor of PyTorch with values, in no trace of an exporter."""
    if keras.backend.backend() != "torch":
        return False
    import torch

    traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
    return isinstance(x, torch.Tensor) and x.device.type != "meta" and not traced


def kept(layer, weights, arrange):
    """`arrange()`; in inference, what it gave before if no weight has changed since.

    Args:
        layer: keeps the result.
        weights: tensors that the result depends on.
        arrange: function without arguments.
    """
    import torch

    if torch.is_grad_enabled():
        return arrange()
    now = [(weight, weight._version) for weight in weights]
    before, result = layer.__dict__.get("_kept", ([], None))
    same = len(before) == len(now) and all(
        a is b and version == latest
        for (a, version), (b, latest) in zip(before, now, strict=True)
    )
    if not same:
        result = arrange()
        layer.__dict__["_kept"] = now, result
    return result
