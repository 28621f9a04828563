"""What a layer may know while it is traced: static sizes, and a running export."""

import contextlib
import threading

_state = threading.local()


def static_length(x, axis=1):
    """The size of `axis` if it is a plain int, else None.

    Unknown sizes are None, symbols or tensors, depending on the backend and the
    exporter; a Python loop or a branch may only depend on a plain int.
    """
    size = x.shape[axis]
    return size if type(size) is int else None


def exporting():
    """The format that is being exported ("onnx", "saved_model"), else None."""
    return getattr(_state, "format", None)


@contextlib.contextmanager
def export_scope(format):
    """Layers traced inside see `exporting() == format`."""
    previous = exporting()
    _state.format = format
    try:
        yield
    finally:
        _state.format = previous
