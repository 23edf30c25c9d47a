"""Programs that are called, and that end with this one: simulators, synthesis, conversion."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["bound", "end_children", "run"]

# PR_SET_PDEATHSIG of Linux: the signal that a process gets when its parent ends, even by SIGKILL.
# It is set between fork and exec by a program of its own, because code of this one must not run
# there when it has threads. SIGTERM, on which `make` ends what it has started.
_LAUNCH = """
import ctypes, os, sys
try:
    ctypes.CDLL(None).prctl(1, 15, 0, 0, 0)
except (AttributeError, OSError):
    pass  # not Linux
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]}: {error.strerror}")
"""

_running: set[subprocess.Popen[str]] = set()


def bound(command: Sequence[str]) -> list[str]:
    """The command, so that it ends when this process does."""
    return [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *command]


def run(
    command: Sequence[str], folder: Path, timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder and return what it printed; it ends with this process.

    Raises
    ------
    subprocess.TimeoutExpired
        If it takes longer, in seconds.
    """
    with subprocess.Popen(
        bound(command), cwd=folder, text=True, errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        _running.add(process)
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
        finally:
            _running.discard(process)
    return subprocess.CompletedProcess(list(command), process.returncode, out, err)


def end_children() -> None:
    """End what :func:`run` runs in other threads, where an exception does not reach."""
    for process in list(_running):
        process.kill()
