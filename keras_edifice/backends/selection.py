"""Which backend Keras will use. Decided before Keras is imported.

`KERAS_BACKEND` wins; then a Keras that is already imported; then the user's
`keras.json`; then the first installed one of `BACKENDS`.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

BACKENDS = {"jax": "jax", "torch": "torch", "tensorflow": "tensorflow"}
"""Backend -> the package that it needs, in the order of preference."""


def installed(backend: str) -> bool:
    """Whether the package of `backend` can be imported."""
    return importlib.util.find_spec(BACKENDS[backend]) is not None


def install_command(extra: str) -> str:
    """The command that installs an optional part of this package."""
    return f'pip install "keras_edifice[{extra}]"'


def select_backend() -> str | None:
    """Sets `KERAS_BACKEND` if nobody chose. Returns one line if none can be used."""
    if "keras" in sys.modules:
        return None
    chosen = os.environ.get("KERAS_BACKEND") or _configured()
    if chosen is None:
        chosen = next(filter(installed, BACKENDS), None)
        if chosen is None:
            return (
                f"keras_edifice needs one of the backends {', '.join(BACKENDS)}, "
                f"found none; run: {install_command('jax')}"
            )
        os.environ["KERAS_BACKEND"] = chosen
    if chosen in BACKENDS and not installed(chosen):
        return (
            f"KERAS_BACKEND is {chosen!r}, but that package is not installed; "
            f"run: {install_command(chosen)}"
        )
    return None


def _configured():
    home = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))
    try:
        return json.loads((home / "keras.json").read_text()).get("backend")
    except (OSError, ValueError):  # no file, or not JSON: Keras ignores it as well
        return None
