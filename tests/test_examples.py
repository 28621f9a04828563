import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ARGUMENTS = {"digits_row_by_row.py": ["--epochs", "3"]}


@pytest.mark.parametrize(
    "script", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name
)
def test_example_runs(script, tmp_path):
    done = subprocess.run(
        [sys.executable, script, *ARGUMENTS.get(script.name, [])],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    shares = [float(x) for x in re.findall(r"(0\.\d+) of the test set", done.stdout)]
    assert len(shares) == 2, done.stdout
    assert shares[0] == shares[1] > 0.5
