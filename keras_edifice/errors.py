"""Errors as one line: what the command prints and what a failed contender shows."""

import re

_WRAPPER = re.compile(r"Exception encountered when calling .*")
_PLAIN = (ValueError, TypeError, ImportError, OSError)


def one_line(error: BaseException, width: int = 300) -> str:
    """The message of an exception on one line, with its type where that helps.

    Keras wraps an error in a layer with a heading of its own; that is left out.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not _WRAPPER.fullmatch(line)]
    message = " ".join(lines[0].split()) if lines else ""
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.strerror}: {error.filename}"
    if len(message) > width:
        message = f"{message[: width - 4]} ..."
    if isinstance(error, _PLAIN) and message:
        return message
    return f"{type(error).__name__}: {message}".removesuffix(": ")
