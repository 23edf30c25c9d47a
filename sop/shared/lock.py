"""A lock per output: a second run that would write the same file is refused, and told by whom."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from rich.markup import escape

from golden.errors import InputError
from sop.shared.console import progress

__all__ = ["locked"]

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def locked(path: Path, output: Path) -> Iterator[None]:
    """Hold a lock while the block lives.

    The operating system lets go of it when the process ends, however that happens, so that what a
    dead process left behind is no obstacle. Across machines it holds on file systems that have
    locks (NFS does); on those that have none a note says that another run would not be noticed.

    Parameters
    ----------
    path : Path
        File that is locked; its folder exists. It is made, and removed at the end.
    output : Path
        What the user calls the output, for messages.

    Raises
    ------
    InputError
        If another process holds it; the message names that process.
    OSError
        If the file cannot be made.
    """
    descriptor = _acquired(path, output)
    try:
        yield
    finally:
        # First the name, then the lock: whoever waits for neither sees one of the two.
        with suppress(FileNotFoundError):
            path.unlink()
        os.close(descriptor)


def _acquired(path: Path, output: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            _flock(descriptor, output)
            # The name may have gone, or be another file's, between the two calls.
            if path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                _describe(descriptor, path)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _flock(descriptor: int, output: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another run{_holder(descriptor)} is writing {output}") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        note = f"note: {output}: its file system has no locks; a second run would not be noticed"
        progress.print(escape(note), soft_wrap=True)


def _describe(descriptor: int, path: Path) -> None:
    """Leave a record for the message of a second run."""
    if os.fstat(descriptor).st_size and not _record(descriptor):
        raise InputError(f"{path}: is in the way of a lock, and not one of this program")
    started = datetime.now().astimezone().isoformat(" ", "seconds")
    record = {"process": os.getpid(), "host": socket.gethostname(), "started": started}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(record).encode(), 0)


def _record(descriptor: int) -> dict[str, object]:
    """Who holds the lock or held it; nothing if it has just begun, or the file is no lock."""
    try:
        record = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    known = isinstance(record, dict) and record.keys() == {"process", "host", "started"}
    return record if known else {}


def _holder(descriptor: int) -> str:
    record = _record(descriptor)
    return " (process {process} on {host} since {started})".format(**record) if record else ""
