"""Times of a call, on the machine at hand."""

import ctypes
import sys
import time

PAUSE = 0.01
"""Seconds until the threads of one library leave the processor to another."""
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


def seconds(call, least=0.5, calls=5) -> list[float]:
    """Times of a call that has been warmed up.

    Args:
        call: what is measured, without arguments.
        least: seconds that are spent on it at least.
        calls: number of calls at least.
    """
    (times,) = in_turn([call], least, calls)
    return times


def in_turn(calls, least=0.5, rounds=5, pause=PAUSE) -> list[list[float]]:
    """Times of several calls, warmed up and then made in turn.

    What slows the machine for a while so slows each of them.

    Args:
        calls: what is measured, each without arguments.
        least: seconds that are spent on each at least.
        rounds: number of rounds at least.
        pause: seconds between calls; calls of one library need none.

    Returns:
        For each call its times in seconds, in the order of the rounds.
    """
    for call in calls:
        call()
    times = [[] for _ in calls]
    while len(times[0]) < rounds or min(map(sum, times)) < least:
        for call, own in zip(calls, times, strict=True):
            if len(calls) > 1 and pause:
                time.sleep(pause)
            start = time.perf_counter()
            call()
            own.append(time.perf_counter() - start)
    return times
