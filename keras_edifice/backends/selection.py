"""Which backend Keras will use. Decided before Keras is imported.

`KERAS_BACKEND` wins, then a Keras that is already imported, then the first installed
one of `BACKENDS`. Keras writes a `keras.json` with its own default by itself, so that
file says nothing of the user's wish.
"""

import importlib.util
import os
import sys

BACKENDS = {"jax": "jax", "torch": "torch", "tensorflow": "tensorflow"}
"""Backend -> the package that it needs, in the order of preference."""

picked: str | None = None
"""The backend that was picked because nobody chose one, else None."""


def installed(backend: str) -> bool:
    """Whether the package of `backend` can be imported."""
    return importlib.util.find_spec(BACKENDS[backend]) is not None


def install_command(extra: str) -> str:
    """The command that installs an optional part of this package."""
    return f'pip install "keras_edifice[{extra}]"'


def select_backend() -> str | None:
    """Sets `KERAS_BACKEND` if nobody chose. Returns one line if none can be used."""
    global picked
    if "keras" in sys.modules:
        return None
    chosen = os.environ.get("KERAS_BACKEND") or None
    if chosen is None:
        chosen = next(filter(installed, BACKENDS), None)
        if chosen is None:
            return (
                f"keras_edifice needs one of the backends {', '.join(BACKENDS)}, "
                f"found none; run: {install_command('jax')}"
            )
        os.environ["KERAS_BACKEND"] = picked = chosen
    if chosen in BACKENDS and not installed(chosen):
        return (
            f"KERAS_BACKEND is {chosen!r}, but that package is not installed; "
            f"run: {install_command(chosen)}"
        )
    return None
