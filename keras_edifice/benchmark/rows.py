"""Measurements as rows: one of an implementation, at a length, on a backend."""

import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass

OURS = "keras_edifice, {}"
"""The name of this package's implementation on a backend."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        name: of the operation or the architecture.
        part: what of it: "forward and backward", "training step", ...
        implementation: whose, and on which backend.
        length: of the sequence; None for what has none.
        milliseconds: the median of the calls.
        fastest: milliseconds of the fastest call.
        slowest: milliseconds of the slowest call.
        megabytes: the peak beyond the arguments; None where the backend does not tell.
        ratio: for an independent implementation, the time that this package takes in
            units of its time, called in turn: the lower quartile, the median and the
            upper quartile of the rounds.
        growth: the time in units of that of half the length, called in turn: the same
            three numbers; None where that was not measured.
    """

    name: str
    part: str
    implementation: str
    length: int | None
    milliseconds: float
    fastest: float
    slowest: float
    megabytes: float | None = None
    ratio: list | None = None
    growth: list | None = None

    def line(self) -> str:
        """For people."""
        length = "" if self.length is None else f", length {self.length}"
        memory = "" if self.megabytes is None else f", {self.megabytes:.0f} MB"
        ratio = "" if self.ratio is None else f"; {self.ratio_text()} of its time here"
        return (
            f"{self.name}{length}, {self.part}: {self.implementation} "
            f"{self.milliseconds:.3g} ms{memory}{ratio}"
        )

    def ratio_text(self) -> str:
        """The ratio with its spread; nothing without one."""
        if self.ratio is None:
            return ""
        low, middle, high = self.ratio
        return f"{middle:.2f}x ({low:.2f} to {high:.2f})"


def row(
    name,
    part,
    implementation,
    length,
    times,
    peak_bytes=None,
    ours=None,
    half=None,
) -> Row:
    """The row of a measurement.

    Args:
        name: as in `Row`.
        part: as in `Row`.
        implementation: as in `Row`.
        length: as in `Row`.
        times: seconds of the calls.
        peak_bytes: None where they are not known.
        ours: seconds of this package in the same rounds, for the ratio.
        half: seconds at half the length in the same rounds, for the growth.
    """
    times_ms = [1000.0 * x for x in times]
    return Row(
        name,
        part,
        implementation,
        length,
        statistics.median(times_ms),
        min(times_ms),
        max(times_ms),
        None if peak_bytes is None else peak_bytes / 2**20,
        None if ours is None else _quartiles(ours, times),
        None if half is None else _quartiles(times, half),
    )


def _quartiles(times, others):
    """Of the ratio of two times, round by round."""
    rounds = [a / b for a, b in zip(times, others, strict=True)]
    return statistics.quantiles(rounds, n=4, method="inclusive")


def measure_on(backend, arguments) -> list[Row]:
    """The rows of `keras-edifice bench` in a process under a backend.

    Raises:
        RuntimeError: the process failed.
    """
    command = [sys.executable, "-m", "keras_edifice", "bench", *arguments, "--json"]
    command += ["--backend", backend]
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"the measurements on {backend} ended with an error")
    return [Row(**row) for row in json.loads(done.stdout)]


def growth(rows) -> dict[tuple, dict[str, float]]:
    """(name, part, implementation) -> the largest growth with twice the length.

    The values are those of "time", by the medians, of the rounds where both lengths
    were called in turn, and, where it is known, of "memory".
    """
    found = {}
    for row in rows:
        key = row.name, row.part, row.implementation
        for other in rows:
            if (other.name, other.part, other.implementation) != key:
                continue
            if row.length is None or other.length != 2 * row.length:
                continue
            factors = found.setdefault(key, {})
            new = {"time": other.milliseconds / row.milliseconds}
            if other.growth is not None:
                new["time"] = other.growth[1]
            if row.megabytes and other.megabytes is not None:
                new["memory"] = other.megabytes / row.megabytes
            for name, factor in new.items():
                factors[name] = max(factors.get(name, 0.0), factor)
    return found


def to_json(rows) -> str:
    """The rows as JSON."""
    return json.dumps([asdict(row) for row in rows], indent=2)
