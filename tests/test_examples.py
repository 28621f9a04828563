import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def shares_of(what, printed):
    """The numbers before "of the `what`", in order."""
    return [float(x) for x in re.findall(rf"([01]\.\d+) of the {what}", printed)]


def check_digits(printed):
    model, exported = shares_of("test set", printed)
    assert model == exported > 0.5


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


ARGUMENTS = {
    "bit_parity.py": ["--length", "10", "--steps", "300"],
    "digits_row_by_row.py": ["--epochs", "3"],
    "key_value_recall.py": ["--pairs", "4", "--steps", "200"],
    "long_memory.py": [
        *("--epochs", "4", "--layers", "2", "--hidden-size", "32", "--batch-size", "8"),
    ],
    "mackey_glass.py": [
        *("--size", "300", "--training", "2000", "--starts", "10", "--steps", "170"),
    ],
    "selective_copying.py": ["--length", "12", "--kept", "3", "--steps", "400"],
}
CHECKS = {
    "bit_parity.py": check_bit_parity,
    "digits_row_by_row.py": check_digits,
    "key_value_recall.py": check_key_value_recall,
    "long_memory.py": check_long_memory,
    "mackey_glass.py": check_mackey_glass,
    "selective_copying.py": check_selective_copying,
}


@pytest.mark.parametrize(
    "script", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name
)
def test_example_runs_and_shows_what_it_says(script, tmp_path):
    done = subprocess.run(
        [sys.executable, script, *ARGUMENTS.get(script.name, [])],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    CHECKS[script.name](done.stdout)
