import json

import pytest
from typer.testing import CliRunner

from keras_edifice.backends import selection
from keras_edifice.benchmark import rows as module
from keras_edifice.benchmark.rows import Row, growth, row, to_json
from keras_edifice.commands import app


def scan_rows():
    return [
        row("scan", "forward", "ours", 512, [1.0, 1.1, 2.0], 4e6),
        row(
            "scan", "forward", "ours", 1024, [2.5, 2.2, 5.2], 8e6, half=[1.0, 1.1, 2.0]
        ),
        row("scan", "forward", "ours", 2048, [4.0, 4.0, 4.0], 16.4e6),
    ]


def test_growth_is_the_largest_of_the_doublings():
    factors = growth(scan_rows())["scan", "forward", "ours"]
    assert factors == pytest.approx({"time": 2.5, "memory": 2.05})  # 2.5, 2.0, 2.6


def test_growth_apart_is_that_of_the_medians():
    rows = [row("lstm", "forward", "ours", n, [n, n, 9.0 * n]) for n in (1, 2, 3)]
    assert growth(rows)["lstm", "forward", "ours"] == pytest.approx({"time": 2.0})


def test_row_has_the_median_and_the_range_in_milliseconds_and_megabytes():
    found = row("scan", "forward", "ours", 8, [0.003, 0.001, 0.002], 2**21)
    times = (found.milliseconds, found.fastest, found.slowest)
    assert times == pytest.approx((2.0, 1.0, 3.0))
    assert found.megabytes == 2.0 and found.ratio is None
    assert found.line() == "scan, length 8, forward: ours 2 ms, 2 MB"


def test_ratio_is_taken_round_by_round():
    ours, theirs = [1.0, 2.0, 3.0, 4.0, 30.0], [1.0, 1.0, 1.0, 1.0, 10.0]
    found = row("scan", "forward", "theirs", None, theirs, ours=ours)
    assert found.ratio == pytest.approx([2.0, 3.0, 3.0])
    assert found.ratio_text() == "3.00x (2.00 to 3.00)"


def test_rows_survive_json():
    rows = scan_rows()
    assert [Row(**found) for found in json.loads(to_json(rows))] == rows


def test_failure_of_a_process_is_told():
    with pytest.raises(RuntimeError, match="the measurements on nowhere ended with"):
        module.measure_on("nowhere", ["ops"])


@pytest.mark.parametrize("what", [["ops"], ["lstm", "hidden_size=4"]])
def test_without_a_backend_each_installed_one_is_measured(what, monkeypatch):
    asked = []

    def measure_on(backend, arguments):
        asked.append((backend, arguments))
        return scan_rows()

    monkeypatch.setattr(module, "measure_on", measure_on)
    done = CliRunner().invoke(app, ["bench", *what, "--against", "--json"])
    assert done.exit_code == 0, done.output
    installed = [name for name in selection.BACKENDS if selection.installed(name)]
    assert [backend for backend, _ in asked] == installed
    for _, arguments in asked:
        assert arguments[: len(what)] == what and "--against" in arguments
    assert len(json.loads(done.stdout)) == 3 * len(installed)
