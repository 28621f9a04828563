import json
import os
import subprocess
import sys

import keras
import pytest
from typer.testing import CliRunner

import keras_edifice
from keras_edifice.backends import selection
from keras_edifice.commands import app
from keras_edifice.comparison import contest

SMALL = "mlp:hidden_sizes=[8]"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a verb in an empty folder; checks the exit code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)

    def invoke(*arguments, code=0):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == code, result.output
        return result

    return invoke


@pytest.fixture
def untrained(monkeypatch):
    """Contenders end at once, with a result."""

    def measure(model, row, *rest):
        row.accuracy, row.parameters = 0.5, 7

    monkeypatch.setattr(contest, "_train", lambda *_: None)
    monkeypatch.setattr(contest, "_measure", measure)
    monkeypatch.setattr(contest, "progress_line", lambda row: f"{row.label}: done")


def process(*arguments, cwd, **environment):
    """Runs the command in a process of its own."""
    root = os.path.dirname(os.path.dirname(keras_edifice.__file__))
    environment = {**os.environ, "PYTHONPATH": root, **environment}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={name: value for name, value in environment.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_compare_prints_the_table_and_writes_the_report(run, tmp_path):
    result = run("compare", "--architectures", f"{SMALL},nope", "--epochs", "1")
    assert f"backend: {keras.backend.backend()}" in result.stdout
    assert "rings: 800 training and 200 test examples" in result.stdout
    assert "failed: unknown architecture 'nope'" in result.stdout
    assert f"{SMALL}: " in result.stderr
    assert "\r" not in result.stderr and "\x1b" not in result.output
    page = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")


def test_compare_in_json_prints_json_and_nothing_else(run, untrained, tmp_path):
    result = run("compare", "--architectures", SMALL, "--epochs", "1", "--json",
                 "--no-report", "--seed", "5")  # fmt: skip
    held = json.loads(result.stdout)
    assert held["settings"]["seed"] == 5
    assert held["rows"][0]["label"] == SMALL
    assert list(tmp_path.iterdir()) == []


def test_compare_reads_a_table_and_says_what_it_did(run, tmp_path):
    lines = ["colour,size,label"]
    lines += [f"{('red', 'blue')[i % 2]},{i},{'ab'[i % 2]}" for i in range(40)]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    arguments = ["compare", "--data", "table.csv", "--target", "label"]
    arguments += ["--architectures", SMALL, "--epochs", "2", "--report", "r.html"]
    result = run(*arguments)
    assert "text column colour one-hot encoded: 2 categories" in result.stdout
    assert "features standardised" in result.stdout
    assert (tmp_path / "r.html").exists()
    missing = run("compare", "--data", "table.csv", code=2)
    assert missing.stderr.startswith(
        "error: table.csv needs a target (--target COLUMN)"
    )
    assert missing.stderr.count("\n") == 1


def test_compare_ends_with_1_if_all_fail(run):
    run("compare", "--architectures", "nope", "--no-report", code=1)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["compare", "--data", "nowhere"], "unknown data 'nowhere'"),
        (["compare", "--data", "nowhere.csv"], "no such file: nowhere.csv"),
        (["compare", "--epochs", "0"], "epochs must be a whole number"),
        (["compare", "--report", "nowhere/r.html"], "no such folder: nowhere"),
        (["compare", "--architectures", "mlp:x"], "option=value, received 'x'"),
        (["compare", "--backend", "theano"], "backend must be one of jax, torch"),
        (["info", "nope"], "unknown architecture 'nope'"),
        (["summary", "mlp"], "mlp needs input_size"),
        (["summary", "mlp", "input_size=x"], "input_size must be int"),
        (["summary", "mlp", "embed_size=3"], "use 'input_size'"),
        (["list", "--family", "nope"], "unknown family 'nope'"),
        (["list", "--kind", "nope"], "kind must be one of vector"),
        (["list", "--search", "no such words"], "no architecture is like that"),
        (["profile", "resnet"], "resnet leaves image_size open"),
        (["profile", "mlp", "input_size=2", "--size", "n"], "option=value, received"),
        (["profile", "mlp", "input_size=2", "--chart", "c.gif"], "must end in .svg"),
        (["export", "mlp", "input_size=2", "--format", "x"], "format must be onnx"),
        (["export", "nowhere.keras"], "no such file: nowhere.keras"),
    ],
)
def test_an_error_of_the_user_is_one_line_and_exit_code_2(run, arguments, words):
    result = run(*arguments, code=2)
    assert result.stderr.startswith("error: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output


def test_debug_shows_the_traceback(run):
    result = run("--debug", "info", "nope", code=1)
    assert isinstance(result.exception, ValueError)


def test_list_names_every_architecture_once(run):
    names = [entry["name"] for entry in json.loads(run("list", "--json").stdout)]
    assert names == keras_edifice.list_architectures()
    table = run("list").stdout
    assert all(name in table for name in names)
    assert f"{len(names)} architectures" in table


def test_list_filters(run):
    def names(*arguments):
        held = json.loads(run("list", "--json", *arguments).stdout)
        return [entry["name"] for entry in held]

    images = keras_edifice.list_architectures(kind="image")
    assert names("--kind", "image") == images
    assert names("--pattern", "ml?") == ["mlp"]
    assert names("--family", "feedforward") == keras_edifice.list_architectures(
        "feedforward"
    )
    assert "mlp" not in names("--causal")
    assert "mlp" in names("--no-causal", "--no-streaming", "--search", "perceptron")


def test_info_describes_every_option(run):
    shown = run("info", "mlp").stdout
    held = json.loads(run("info", "mlp", "--json").stdout)
    assert held["paper"].startswith("Rumelhart et al. 1986")
    for option in held["options"]:
        assert option["name"] in shown and option["meaning"] in shown
    assert "[512, 512]" in shown


def test_info_shows_the_published_sizes(run):
    name = next(n for n in keras_edifice.list_architectures()
                if keras_edifice.info(n).variants)  # fmt: skip
    shown = run("info", name).stdout
    assert all(variant in shown for variant in keras_edifice.info(name).variants)


def test_summary_prints_the_layers(run):
    shown = run("summary", "mlp", "input_size=4", "hidden_sizes=[3, 2]").stdout
    assert "Total params: 23" in shown
    assert "Param #" in shown


def test_profile_prints_the_layers_and_the_totals(run):
    shown = run("profile", "mlp", "input_size=4", "hidden_sizes=[3, 2]").stdout
    assert "dense_1" in shown and "multiply-accumulates" in shown
    assert "23, 23 of them trainable" in shown
    held = run("profile", "mlp", "input_size=4", "hidden_sizes=[3, 2]", "--json").stdout
    assert json.loads(held)["multiply_accumulates"] == 4 * 3 + 3 * 2


def test_profile_takes_open_sizes_and_a_saved_model(run):
    options = ["hidden_size=4", "block_sizes=[1, 1]"]
    size = ["--size", "image_size=8", "--json"]
    built = json.loads(run("profile", "resnet", *options, *size).stdout)
    assert built["input_shapes"] == {"inputs": [1, 8, 8, 3]}
    keras_edifice.build("resnet", hidden_size=4, block_sizes=[1, 1]).save("m.keras")
    assert json.loads(run("profile", "m.keras", *size).stdout) == built


def test_profile_draws_a_chart(run, tmp_path):
    pytest.importorskip("altair", reason="charts need the optional part report")
    arguments = ["profile", "mlp", "input_size=4", "hidden_sizes=[3]"]
    assert "chart: " in run(*arguments, "--chart", "c.svg").stderr
    assert "dense_0" in (tmp_path / "c.svg").read_text()


def test_export_writes_a_checked_file(run, tmp_path):
    pytest.importorskip("onnx", reason="export needs the optional part onnx")
    result = run("export", "mlp", "input_size=4", "hidden_sizes=[3]", "--out", "m.onnx")
    assert "largest difference from the Keras model is" in result.stdout
    assert (tmp_path / "m.onnx").stat().st_size > 100


def test_export_takes_a_saved_model(run, tmp_path):
    pytest.importorskip("onnx", reason="export needs the optional part onnx")
    keras_edifice.build("mlp", input_size=4, hidden_sizes=[3]).save("m.keras")
    assert "m.onnx" in run("export", "m.keras").stdout
    refused = run("export", "m.keras", "input_size=4", code=2)
    assert "takes no options" in refused.stderr


def test_doctor_names_every_part(run):
    shown = run("doctor").stdout
    held = json.loads(run("doctor", "--json").stdout)
    assert held["keras"] == keras.__version__
    assert all(part["package"] in shown for part in held["parts"])
    assert held["backend"].startswith(keras.backend.backend())


def test_doctor_says_what_a_missing_part_costs(run, monkeypatch):
    monkeypatch.setattr(
        "keras_edifice.commands.version", lambda p: None if p == "altair" else "1"
    )
    shown = run("doctor").stdout
    assert "without it, not: the HTML report of compare" in shown
    assert selection.install_command("report") in shown


def test_compare_runs_without_the_charting_library(
    run, untrained, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "keras_edifice.comparison.report.report_problem", lambda: "altair is missing"
    )
    result = run("compare", "--architectures", SMALL, "--epochs", "1")
    assert "no report: altair is missing" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_another_backend_runs_in_a_process_of_its_own(tmp_path):
    active = keras.backend.backend()
    others = [b for b in selection.BACKENDS if b != active and selection.installed(b)]
    if not others:
        pytest.skip(f"{active} is the only backend that is installed")
    arguments = ["-m", "keras_edifice", "compare", "--backend", others[0], "--json"]
    arguments += ["--architectures", "nope", "--no-report"]
    result = process(*arguments, cwd=tmp_path, KERAS_BACKEND=active)
    assert result.returncode == 1, result.stderr  # as all contenders failed
    assert json.loads(result.stdout)["machine"]["backend"] == others[0]


def test_a_child_process_hands_its_exit_code_on(run, monkeypatch):
    others = [b for b in selection.BACKENDS if b != keras.backend.backend()]
    calls = []

    def child(command, env):
        calls.append((command[1:], env["KERAS_BACKEND"]))
        return subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr("keras_edifice.commands.subprocess.run", child)
    monkeypatch.setattr("keras_edifice.commands.selection.installed", lambda _: True)
    arguments = ["compare", "--backend", others[0], "--epochs", "3"]
    run(*arguments, code=7)
    assert calls == [(["-m", "keras_edifice", *arguments], others[0])]


def test_a_backend_that_is_not_installed_is_one_line(run, monkeypatch):
    monkeypatch.setattr("keras_edifice.commands.selection.installed", lambda _: False)
    result = run("compare", "--backend", "torch", code=2)
    assert selection.install_command("torch") in result.stderr


def test_the_command_says_which_backend_it_picked(tmp_path):
    arguments = ["-m", "keras_edifice", "doctor", "--json"]
    result = process(*arguments, cwd=tmp_path, KERAS_BACKEND=None)
    picked = next(filter(selection.installed, selection.BACKENDS))
    line = f"{picked} (KERAS_BACKEND is not set; the first installed of jax"
    assert json.loads(result.stdout)["backend"].startswith(line)


BLOCK = """
import sys, importlib.util
real = importlib.util.find_spec
hidden = {names!r}
importlib.util.find_spec = lambda n, *a: None if n in hidden else real(n, *a)
for name in hidden:
    sys.modules[name] = None
sys.argv = ["keras-edifice", *{arguments!r}]
from keras_edifice.cli import main
main()
"""


def test_doctor_works_without_a_backend_and_other_verbs_say_what_is_missing(tmp_path):
    names = list(selection.BACKENDS)
    code = BLOCK.format(names=names, arguments=["doctor"])
    result = process("-c", code, cwd=tmp_path, KERAS_BACKEND=None)
    assert result.returncode == 1, result.stderr
    assert "needs one of the backends" in result.stdout
    code = BLOCK.format(names=names, arguments=["list"])
    result = process("-c", code, cwd=tmp_path, KERAS_BACKEND=None)
    assert result.returncode == 2
    assert result.stderr.startswith("error: keras_edifice needs one of the backends")
    assert result.stderr.count("\n") == 1


def test_without_typer_the_command_says_how_to_get_it(tmp_path):
    code = BLOCK.format(names=["typer"], arguments=["list"])
    result = process("-c", code, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1] == (
        "keras-edifice needs typer, which is not installed; "
        f"run: {selection.install_command('cli')}"
    )
