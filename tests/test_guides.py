import re
import subprocess
import sys
from pathlib import Path

import pytest

import keras_edifice

ROOT = Path(__file__).parent.parent


def test_generated_documentation_is_up_to_date():
    done = run([ROOT / "guides" / "generate.py", "--check"], ROOT)
    assert done.returncode == 0, (
        f"{done.stdout}{done.stderr}run: python guides/generate.py"
    )


@pytest.mark.parametrize("name", keras_edifice.list_architectures())
def test_fidelity_page_has_a_row_within_the_limit(name):
    page = (ROOT / "guides" / "fidelity.md").read_text()
    row = re.search(rf"^\| `{name}` \| .+ \| (\S+) \| (\S+) \|$", page, re.MULTILINE)
    assert row, f"no row for {name}: run tox -e fidelity, then guides/generate.py"
    assert all(0 <= float(figure) <= 1e-4 for figure in row.groups())


def test_the_hybrid_of_the_building_blocks_learns_and_streams():
    text = (ROOT / "guides" / "building_blocks.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    seed = "import keras\nkeras.utils.set_random_seed(0)\n"
    done = run(["-c", seed + code], ROOT)
    assert done.returncode == 0, done.stderr
    *_, accuracy, counted = done.stdout.splitlines()
    assert float(accuracy.removeprefix("accuracy ")) > 0.9
    assert counted == "[5, 6, 7, 8, 9, 10]"


def test_the_example_of_a_new_architecture_works(tmp_path):
    """The file in CONTRIBUTING.md is all that a new architecture needs."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    code = re.search(r"<!-- new architecture -->\n```python\n(.*?)```", text, re.DOTALL)
    package = tmp_path / "keras_edifice"
    copy_package(package)
    (package / "feedforward" / "highway.py").write_text(code[1])
    script = (
        "import keras_edifice as k, numpy as np\n"
        "assert 'highway' in k.list_architectures('feedforward')\n"
        "assert 'highway' in k.search('highway networks')\n"
        "model = k.classifier('highway', 3, input_size=4)\n"
        "model.compile('adam', 'sparse_categorical_crossentropy')\n"
        "model.fit(np.ones((8, 4)), np.zeros(8), verbose=0)\n"
        "print(k.info('highway'))\n"
        "print(k.layers.Highway.__name__)\n"
    )
    done = run(["-c", script], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "num_layers" in done.stdout and "arXiv:1505.00387" in done.stdout
    checks = "builds or info_says or gradient or lowers or saves"
    done = run(
        [
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-o",
            "pythonpath=",  # the copy with the new file, not this clone
            "--rootdir",
            tmp_path,
            "-c",
            ROOT / "pyproject.toml",
            ROOT / "tests" / "conformance",
            "-k",
            f"highway and ({checks})",
        ],
        tmp_path,
    )
    assert done.returncode == 0, done.stdout
    assert "5 passed" in done.stdout


def copy_package(target):
    import shutil

    source = Path(keras_edifice.__file__).parent
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))


def run(arguments, folder):
    import os

    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=folder,
    )


def test_the_quick_start_of_the_readme_runs(tmp_path):
    text = (ROOT / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    chosen = re.compile(r'^os.environ\["KERAS_BACKEND"\] = .*$', re.MULTILINE)
    code, replaced = chosen.subn("", code)  # the backend of this run
    assert replaced == 1
    done = run(["-c", code], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Gu & Dao 2023" in done.stdout
    assert (tmp_path / "mamba.onnx").exists()
