"""Time and memory of a call, on the machine at hand."""

import gc
import statistics
import time
from pathlib import Path

PEAK_RESET = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Makes the C library give memory back at once, so that a peak is of one call."""


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

    Only Linux tells, by the resident memory of the process; set `ENVIRONMENT` before
    the process starts.
    """
    if not PEAK_RESET.exists():
        return None
    gc.collect()
    PEAK_RESET.write_text("5")
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(field):
    line = next(x for x in STATUS.read_text().splitlines() if x.startswith(field))
    return 1024 * int(line.split()[1])
