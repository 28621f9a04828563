"""A function with its gradient, compiled as `fit` would compile it, run to its end."""

import contextlib
import functools
import gc
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

ORDERS = 3
"""TensorFlow runs independent operations in an order that changes from call to call,
and with it the peak of the memory: the least of so many calls counts."""


@dataclass(frozen=True)
class Run:
    """A computation that is ready to be measured.

    Attributes:
        call: computes once and waits for the result.
        peak_bytes: computes and returns the most memory that tensors took at a time,
            results included and arguments not, by the backend's own record; None where
            it has none, as TensorFlow of tensors below 256 kB.
    """

    call: Callable
    peak_bytes: Callable


def forward(function, arrays) -> Run:
    """function(*arrays)."""
    return _RUNS[keras.backend.backend()](function, arrays, False)


def forward_and_backward(function, arrays) -> Run:
    """The same with the gradient of the sum of the results in every float array.

    Args:
        function: of tensors, giving one tensor.
        arrays: its arguments.
    """
    return _RUNS[keras.backend.backend()](function, arrays, True)


def _tensorflow(function, arrays, backward):
    import tensorflow as tf

    tensors = [tf.convert_to_tensor(x) for x in arrays]

    @functools.partial(tf.function, autograph=False)
    def run(*tensors):
        watched = [x for x in tensors if x.dtype.is_floating]
        with tf.GradientTape() as tape:
            tape.watch(watched)
            value = function(*tensors)
            total = tf.reduce_sum(value)
        return tape.gradient(total, watched) if backward else value

    def call():
        for x in tf.nest.flatten(run(*tensors), expand_composites=True):
            x.numpy()  # several arrays for the gradient of a table that is read from

    def peak_bytes():
        call()
        peaks = [tensorflow_peak_bytes(call) for _ in range(ORDERS)]
        return None if None in peaks else min(peaks)

    return Run(call, peak_bytes)


def _jax(function, arrays, backward):
    import jax

    tensors = [jax.numpy.asarray(x) for x in arrays]
    run = function
    if backward:
        floats = (i for i, x in enumerate(arrays) if np.asarray(x).dtype.kind == "f")
        run = jax.grad(lambda *x: function(*x).sum(), argnums=tuple(floats))
    run = jax.jit(run).lower(*tensors).compile()

    def peak_bytes():
        planned = run.memory_analysis()
        if planned is None:
            return None
        return planned.temp_size_in_bytes + planned.output_size_in_bytes

    return Run(lambda: jax.block_until_ready(run(*tensors)), peak_bytes)


def _torch(function, arrays, backward):
    import torch

    tensors = [torch.as_tensor(x) for x in arrays]
    if backward:
        watched = [x.requires_grad_() for x in tensors if x.is_floating_point()]

    def call():
        if backward:
            torch.autograd.grad(function(*tensors).sum(), watched)
        else:
            with torch.no_grad():
                function(*tensors)

    return Run(call, lambda: torch_peak_bytes(call))


def tensorflow_peak_bytes(call):
    """The most memory that tensors asked for beyond what is there, in a call.

    The allocator's own count is of the blocks that it gave, up to twice as large.
    """
    import tensorflow as tf
    from tensorflow.tsl.profiler.protobuf.xplane_pb2 import XSpace

    options = tf.profiler.experimental.ProfilerOptions(
        host_tracer_level=1, python_tracer_level=0, device_tracer_level=0
    )  # memory and little else
    gc.collect()  # what goes during the call would hide what the call takes
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder, options)
        try:
            call()
        finally:
            tf.profiler.experimental.stop()
        (record,) = Path(folder).rglob("*.xplane.pb")
        space = XSpace.FromString(record.read_bytes())
    changes = [change for plane in space.planes for change in _memory_changes(plane)]
    if not changes:
        return None
    return max(np.cumsum([size for _, size in sorted(changes)]))


def _memory_changes(plane):
    """(time in ps, bytes asked for; negative: given back) of each event of memory."""
    signs = {"MemoryAllocation": 1, "MemoryDeallocation": -1}
    kinds = {
        key: signs[kind.name]
        for key, kind in plane.event_metadata.items()
        if kind.name in signs
    }
    for line in plane.lines:
        for event in line.events:
            if event.metadata_id in kinds:
                sizes = (
                    stat.int64_value or stat.uint64_value
                    for stat in event.stats
                    if plane.stat_metadata[stat.metadata_id].name == "requested_bytes"
                )
                time = line.timestamp_ns * 1000 + event.offset_ps
                yield time, kinds[event.metadata_id] * sum(sizes)


def torch_peak_bytes(call):
    """The most memory that PyTorch's tensors take beyond what is there, in a call."""
    import torch

    gc.collect()  # what goes during the call would hide what the call takes
    with _no_log(), torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    changes = [x for x in events if x.name() == "[memory]"]
    changes.sort(key=lambda x: x.start_ns())
    return max(np.cumsum([x.nbytes() for x in changes]), default=0)


@contextlib.contextmanager
def _no_log():
    """Without the lines that the profiler's C++ writes to the standard error."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


_RUNS = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}
