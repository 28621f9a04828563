"""Time and memory of a call, on the machine at hand."""

import contextlib
import ctypes
import gc
import statistics
import time
from pathlib import Path

PEAK_RESET = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")

# Parameters of mallopt(3), and the values that the C library comes to by itself.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
AT_ONCE, ADAPTED = 2**16, {M_TRIM_THRESHOLD: 2**26, M_MMAP_THRESHOLD: 2**25}


def seconds(run, least=0.5, calls=5):
    """Times of a call that has been warmed up: (median, smallest, largest).

    Args:
        run: what is measured, without arguments.
        least: seconds that are spent on it at least.
        calls: number of calls at least.
    """
    run()
    times = []
    while len(times) < calls or sum(times) < least:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times), min(times), max(times)


def peak_bytes(run):
    """Memory that a call takes at its peak beyond what there was; None if unknown.

    Only Linux tells, by the resident memory of the process.
    """
    if not PEAK_RESET.exists():
        return None
    gc.collect()
    with _freed_memory_given_back():
        run()  # what it keeps for later calls is not counted
        PEAK_RESET.write_text("5")
        before = _resident("VmRSS")
        run()
        return _resident("VmHWM") - before


@contextlib.contextmanager
def _freed_memory_given_back():
    """The C library returns what is freed to the system, so that peaks are seen."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):  # other than GNU's
        yield
        return
    for parameter in ADAPTED:
        library.mallopt(parameter, AT_ONCE)
    library.malloc_trim(0)
    yield
    for parameter, value in ADAPTED.items():
        library.mallopt(parameter, value)


def _resident(field):
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith(field))
    return 1024 * int(line.split()[1])
