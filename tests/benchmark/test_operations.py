import importlib
import json
import pkgutil
from pathlib import Path

import keras
import pytest
from typer.testing import CliRunner

import keras_edifice.ops
from keras_edifice.benchmark import operations as module
from keras_edifice.benchmark.operations import Draw, operations
from keras_edifice.commands import app


@pytest.mark.parametrize("case", operations(), ids=lambda case: case.name)
def test_memory_of_every_case_grows_no_faster_than_the_length(case):
    lengths = (512, 2048) if case.linear else (16,)
    draw = Draw(batch=4, width=64, heads=2)  # TensorFlow counts from 256 kB
    found = module.measure([case.name], lengths, draw, False, lambda line: None, 0.0)
    assert [row.length for row in found] == list(lengths)
    for row in found:
        assert row.name == case.name
        assert row.implementation == f"keras_edifice, {keras.backend.backend()}"
        assert 0 < row.fastest <= row.milliseconds <= row.slowest
    if found[0].megabytes is None:
        pytest.skip("this build of the backend does not count its memory")
    limit = module.GROWTH**2 * found[0].megabytes
    if keras.backend.backend() == "tensorflow":
        limit *= 1.5  # tensors below 256 kB, more at the short length, are not counted
    assert found[-1].megabytes <= limit  # a square of the length would take 16 times


def test_every_operation_with_a_step_has_a_case():
    recurrences = set()
    for found in pkgutil.iter_modules(keras_edifice.ops.__path__, "keras_edifice.ops."):
        source = importlib.import_module(found.name)
        for name, value in vars(source).items():
            local = getattr(value, "__module__", None) == found.name
            if local and name.endswith("_step") and not name.startswith("_"):
                recurrences.add(found.name.rpartition(".")[2])
    text = Path(module.__file__).read_text()
    missing = {name for name in recurrences if f"ops.{name} import" not in text}
    # The kernels of state spaces run through the long convolution; the steps of an
    # integrator are no steps of a sequence.
    assert missing <= {"state_space", "ode"}


def test_unknown_operation_is_refused():
    with pytest.raises(ValueError, match="unknown operation 'scan'; they are diagonal"):
        operations(["scan"])


def test_command_prints_a_table_and_json(tmp_path):
    command = ["ops", "--operations", "diagonal scan", "--lengths", "4,8"]
    command += ["--width", "8", "--batch", "1", "--backend", keras.backend.backend()]
    command += ["--seconds", "0"]
    chart = tmp_path / "chart.svg"
    done = CliRunner().invoke(app, ["bench", *command, "--chart", str(chart)])
    assert done.exit_code == 0, done.output
    assert "diagonal scan" in done.stdout and "twice the length" in done.stdout
    assert chart.exists()
    done = CliRunner().invoke(app, ["bench", *command, "--json"])
    assert [row["length"] for row in json.loads(done.stdout)] == [4, 8]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["ops", "--lengths", "4,x"], "lengths must be numbers such as"),
        (["ops", "--operations", "other"], "unknown operation 'other'"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message):
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1
