"""The entry of the command `keras-edifice`; its verbs are in `commands.py`."""

import sys

from keras_edifice.backends.selection import install_command


def main():
    """Runs the command. Exit code 2 is an error of the user, one line on stderr."""
    try:
        from keras_edifice.commands import app
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich", "click"):
            raise
        print(
            f"keras-edifice needs {error.name}, which is not installed; "
            f"run: {install_command('cli')}",
            file=sys.stderr,
        )
        sys.exit(2)
    app(prog_name="keras-edifice")
