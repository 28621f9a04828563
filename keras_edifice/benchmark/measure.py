"""Times of a call, on the machine at hand."""

import statistics
import time


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
