"""What a layer may know while it is traced: static sizes, and a running export."""

import contextlib
import threading

_state = threading.local()


def static_length(x, axis=1):
    """The size of `axis` if it is a plain int, else None.

    Unknown sizes are None, symbols or tensors, depending on the backend and the
    exporter; a Python loop or a branch may only depend on a plain int. While PyTorch
    traces, known sizes are tensors too.
    """
    size = x.shape[axis]
    if axis != 0 and getattr(_state, "only_batch_open", False):
        return int(size)
    return size if type(size) is int else None


def exporting():
    """The format that is being exported ("onnx", "saved_model"), else None."""
    return getattr(_state, "format", None)


@contextlib.contextmanager
def export_scope(format, only_batch_open=False):
    """Layers traced inside see `exporting() == format`.

    Args:
        format: "onnx", "saved_model" or None.
        only_batch_open: whether every size but that of axis 0 can be read as an int.
    """
    previous = exporting(), getattr(_state, "only_batch_open", False)
    _state.format, _state.only_batch_open = format, only_batch_open
    try:
        yield
    finally:
        _state.format, _state.only_batch_open = previous
