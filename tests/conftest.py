"""Seeds every test and prints the conformance matrix, architecture by check."""

import gc
import re

import keras
import numpy as np
import pytest

CONFORMANCE = re.compile(r"test_conformance\.py::test_(\w+)\[(?:\w+-)?(\w+)\]")
MARKS = {"passed": "+", "failed": "FAIL", "skipped": "skip", "error": "FAIL"}


@pytest.fixture(autouse=True)
def seeded(request, monkeypatch):
    """Weights and data that do not depend on the tests that ran before."""
    keras.utils.set_random_seed(0)
    if hasattr(request.module, "rng"):
        monkeypatch.setattr(request.module, "rng", np.random.default_rng(0))


def pytest_collection_modifyitems(items):
    """All checks of an architecture one after the other: they share its model."""

    def architecture(item):
        found = CONFORMANCE.search(item.nodeid)
        return found[2] if found else ""

    items.sort(key=architecture)


def pytest_collection_finish():
    """What was imported stays: collections of garbage need not look through it."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter):
    """The matrix of every conformance check that ran."""
    cells, checks = {}, {}
    for outcome, mark in MARKS.items():
        for report in terminalreporter.stats.get(outcome, []):
            found = CONFORMANCE.search(getattr(report, "nodeid", ""))
            if found:
                check, architecture = found.groups()
                checks.setdefault(check, None)
                if cells.get((architecture, check)) != "FAIL":
                    cells[architecture, check] = mark
    if not cells:
        return
    write = terminalreporter.write_line
    terminalreporter.section("conformance: architecture by check")
    columns = sorted(checks)
    for number, check in enumerate(columns, 1):
        write(f"  {number:2} {check.replace('_', ' ')}")
    names = sorted({architecture for architecture, _ in cells})
    width = max(map(len, names))
    write(" " * width + "".join(f"{n:>5}" for n in range(1, len(columns) + 1)))
    for name in names:
        row = "".join(f"{cells.get((name, check), ''):>5}" for check in columns)
        write(f"{name:{width}}{row}")
