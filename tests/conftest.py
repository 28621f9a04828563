"""Seeds every test and prints the conformance matrix, architecture by check."""

import gc
import os
import re

import keras
import numpy as np
import pytest

from keras_edifice.backends.running import let_go

CONFORMANCE = re.compile(r"test_conformance\.py::test_(\w+)\[(?:\w+-)?(\w+)\]")
MARKS = {"passed": "+", "failed": "FAIL", "skipped": "skip", "error": "FAIL"}


def start_jax():
    """Has JAX compile in half the time: without XLA's emitters of fused kernels.

    Other processes keep them: TensorFlow would need gigabytes for mamba's scan.
    """
    import jax

    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"
    jax.devices()  # reads the flags
    os.environ["XLA_FLAGS"] = flags


if keras.backend.backend() == "jax":
    start_jax()


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


def unit(nodeid):
    """Tests of one unit share what they build and compile, on one worker."""
    found = CONFORMANCE.search(nodeid)
    if found:
        return found[2]
    return nodeid if "test_examples.py" in nodeid else nodeid.split("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Sends a unit to a worker whole."""
    from xdist.scheduler import LoadScopeScheduling

    class ByUnit(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return unit(nodeid)

    return ByUnit(config, log)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """After a unit its models and what was compiled for them are let go."""
    if nextitem is not None and unit(item.nodeid) == unit(nextitem.nodeid):
        return
    let_go()


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
