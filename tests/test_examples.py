import re
import runpy
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def shares_of(what, printed):
    """The numbers before "of the `what`", in order."""
    return [float(x) for x in re.findall(rf"([01]\.\d+) of the {what}", printed)]


def check_digits(printed):
    model, exported = shares_of("test set", printed)
    assert model == exported >= 0.9


def check_selective_copying(printed):
    mamba, s4d = shares_of("tokens", printed)
    assert mamba >= 0.95 and s4d < 0.9


def check_key_value_recall(printed):
    assert min(shares_of("values", printed)) >= 0.95


def check_bit_parity(printed):
    lstm, slstm, mamba = shares_of("strings", printed)
    assert min(lstm, slstm) >= 0.95 and mamba < 0.8


def check_long_memory(printed):
    assert min(shares_of("test set", printed)) > 0.75


def check_mackey_glass(printed):
    median, worst, _ = map(float, re.findall(r"NRMSE (\S+)", printed))
    assert median <= worst < 1e-2


def check_radiance_field(printed):
    coarse, fine = map(float, re.findall(r"(\S+) dB of the held-out", printed))
    assert min(coarse, fine) >= 20


def check_segmentation(printed):
    (iou,) = shares_of("test images", printed)
    assert iou >= 0.5  # 0.4 or less if the kinds of shapes are guessed


def check_explanations(printed):
    assert min(shares_of("test crops", printed)[::3]) >= 0.9  # of whole crops
    losses = [float(x) for x in re.findall(r"loss (\S+)\n", printed)]
    for _, without_seen, without_rest in (losses[-6:-3], losses[-3:]):
        assert without_seen > 1.2 * without_rest


ARGUMENTS = {
    "bit_parity.py": ["--length", "10", "--steps", "300"],
    "digits_row_by_row.py": ["--architectures", "tcn", "--epochs", "4"],
    "explanations.py": ["--crops", "384", "--epochs", "4"],
    "key_value_recall.py": ["--pairs", "4", "--steps", "200"],
    "long_memory.py": [
        *("--epochs", "4", "--layers", "2", "--hidden-size", "32", "--batch-size", "8"),
    ],
    "mackey_glass.py": [
        *("--size", "300", "--training", "2000", "--starts", "10", "--horizon", "170"),
    ],
    "radiance_field.py": [
        *("--size", "16", "--views", "12", "--samples", "16", "--epochs", "6"),
        *("--batch-size", "64"),
    ],
    "segmentation.py": [
        *("--size", "16", "--shapes", "1", "--images", "1200", "--epochs", "5"),
        *("--levels", "2", "--batch-size", "8", "--rate", "0.008"),
    ],
    "selective_copying.py": ["--length", "12", "--kept", "3", "--steps", "400"],
}
CHECKS = {
    "bit_parity.py": check_bit_parity,
    "digits_row_by_row.py": check_digits,
    "explanations.py": check_explanations,
    "key_value_recall.py": check_key_value_recall,
    "long_memory.py": check_long_memory,
    "mackey_glass.py": check_mackey_glass,
    "radiance_field.py": check_radiance_field,
    "segmentation.py": check_segmentation,
    "selective_copying.py": check_selective_copying,
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_example_runs_and_shows_what_it_says(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(script), *ARGUMENTS[script.name]])
    runpy.run_path(str(script), run_name="__main__")
    CHECKS[script.name](capsys.readouterr().out)
    assert list(tmp_path.iterdir())  # its figure
