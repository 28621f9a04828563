"""Times of a call, on the machine at hand."""

import ctypes
import statistics
import sys
import time

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of mallopt(3)


def keep_freed_memory():
    """From now on the C library of GNU keeps large freed blocks for the next call.

    By default it gives them back, and getting them again page by page takes longer
    than many an operation. Allocators of accelerators, and of some backends, keep them.
    Elsewhere nothing is changed.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "mallopt"):
        library.mallopt(M_TRIM_THRESHOLD, 2**30)
        library.mallopt(M_MMAP_MAX, 0)


def seconds(call, least=0.5, calls=5):
    """Times of a call that has been warmed up: (median, smallest, largest).

    Args:
        call: what is measured, without arguments.
        least: seconds that are spent on it at least.
        calls: number of calls at least.
    """
    call()
    times = []
    while len(times) < calls or sum(times) < least:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times), min(times), max(times)
