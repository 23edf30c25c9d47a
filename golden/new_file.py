"""Files and folders that take their name when they are complete; nothing is left otherwise."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["TEMPORARY_PREFIX", "new_file", "new_folder"]

TEMPORARY_PREFIX = ".sop-"
"""How the name of what is unfinished begins, where it cannot be without one; eight more follow.

Short, so that every name that a file system takes can be written.
"""


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Write a file as a whole or not at all.

    On Linux it has no name until it is complete, so that even a process that is killed leaves
    nothing behind. Where a file system cannot do that, it has a temporary name in the same folder.

    Parameters
    ----------
    path : Path
        File to write or replace; its folder must exist. A symbolic link is replaced, not followed.

    Yields
    ------
    file : binary file, open for writing
        Closed, on the disk and in place when the block ends; dropped if it ends by an exception.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    descriptor, temporary = _open_new(path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if temporary is None:
                temporary = _give_name(file.fileno(), path.parent)
        os.replace(temporary, path)
        temporary = None
    finally:
        if temporary is not None:
            os.unlink(temporary)
    _sync(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a folder with all that is in it, or not at all.

    Parameters
    ----------
    path : Path
        Must not exist, or be an empty folder; its own folder must exist.

    Yields
    ------
    folder : Path
        Folder of a temporary name to write into. When the block ends, it and what is in it are on
        the disk and it takes its name; if the block ends by an exception, it vanishes.

    Raises
    ------
    OSError
        If it cannot be made, or something of that name has come up.
    """
    made = Path(tempfile.mkdtemp(dir=path.parent, prefix=TEMPORARY_PREFIX))
    try:
        yield made
        for folder, _, names in os.walk(made):
            for name in names:
                _sync(Path(folder, name))
            _sync(Path(folder))
        made.chmod(0o777 & ~_umask())
        os.rename(made, path)  # replaces an empty folder, fails for any other
    except BaseException:
        shutil.rmtree(made)
        raise
    _sync(path.parent)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _temporary(folder: Path) -> str:
    return os.path.join(folder, TEMPORARY_PREFIX + secrets.token_hex(4))


def _open_new(folder: Path) -> tuple[int, str | None]:
    """Descriptor of a new file, and its name if it has one."""
    # The permissions are those that the user's umask leaves, as of any other new file.
    if hasattr(os, "O_TMPFILE") and os.path.isdir("/proc/self/fd"):
        try:
            return os.open(folder, os.O_TMPFILE | os.O_WRONLY, 0o666), None
        except OSError:
            pass  # some file systems cannot; if it is something else, the next line says so
    name = _temporary(folder)
    return os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666), name


def _give_name(descriptor: int, folder: Path) -> str:
    """Give a nameless file a temporary name, because a link cannot replace a file."""
    name = _temporary(folder)
    # With a folder, which an absolute path does not need, Python follows the link in /proc.
    os.link(f"/proc/self/fd/{descriptor}", name, src_dir_fd=descriptor, follow_symlinks=True)
    return name


def _sync(path: Path) -> None:
    """Make a file, or the names in a folder, last through a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
