"""Work for another backend than the active one, done in a process of its own.

A process starts on first need, in some seconds, and stays until this one ends.
"""

import atexit
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading

MARK = "keras_edifice reply: "
"""Begins the lines of the process that are replies."""

START = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from keras_edifice.backends.worker import main; main()"
)
"""What the process runs, with this one's places of modules as arguments."""

_children = {}
_lock = threading.Lock()


def request(backend: str, job: str, **arguments):
    """Has the process of `backend` do a job of `worker.py`.

    Raises:
        RuntimeError: with one line of what went wrong there, or why it ended.
    """
    with _lock:
        child = _children.get(backend)
        if child is None or not child.alive:
            child = _children[backend] = _Child(backend)
        child.do({"job": job, "sys_path": sys.path, **arguments})


@atexit.register
def close_all():
    """Ends every process; the next request starts a new one."""
    while _children:
        _children.popitem()[1].close()


class _Child:
    def __init__(self, backend):
        self._backend = backend
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=_environment(backend),
            encoding="utf-8",
            errors="replace",
        )

    @property
    def alive(self):
        return self._process.poll() is None

    def do(self, job):
        try:
            reply = self._exchange(json.dumps(job))
        except BaseException:  # interrupted: a late reply must not answer the next job
            self.close()
            raise
        if "error" in reply:
            raise RuntimeError(reply["error"])

    def _exchange(self, line):
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except OSError:
            raise RuntimeError(self._why_ended()) from None
        for answer in self._process.stdout:
            if answer.startswith(MARK):  # anything else is noise of an import
                return json.loads(answer.removeprefix(MARK))
        raise RuntimeError(self._why_ended())

    def _why_ended(self):
        self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode("utf-8", "replace").strip().splitlines()
        return (
            f"the {self._backend} process ended with code {self._process.returncode}"
            f"{': ' + lines[-1] if lines else ''}"
        )

    def close(self):
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(OSError):
                stream.close()


def _environment(backend):
    """That of this process, for a process on the CPU under another backend."""
    return {
        **os.environ,
        "KERAS_BACKEND": backend,
        "CUDA_VISIBLE_DEVICES": "-1",  # the memory of the GPU belongs to this process
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
