"""Standard streams that do not surprise: closed, full, lost, or of an encoding with few characters.

Results go to standard output: when they cannot, that is an error. Progress goes to standard error:
when it cannot, the work goes on, because hours of it must not be lost for a line that nobody reads.
"""

import codecs
import errno
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

__all__ = ["StreamError", "drop_output", "prepare_streams"]

_ERRORS = "sop-printable"


class StreamError(Exception):
    """Standard output cannot be written to.

    No :class:`OSError`, because libraries take some of those for their own.
    """

    def __init__(self, cause: OSError) -> None:
        super().__init__(f"standard output: {cause.strerror}")
        self.reader_gone = cause.errno == errno.EPIPE


class _Output(io.FileIO):
    def write(self, content: "ReadableBuffer", /) -> int:
        """Write, or say that it was standard output that failed."""
        try:
            return super().write(content)
        except OSError as error:
            raise StreamError(error) from error


class _Notes(io.FileIO):
    def write(self, content: "ReadableBuffer", /) -> int:
        """Write if possible."""
        try:
            return super().write(content)
        except OSError:
            return memoryview(content).nbytes


def _printable(error: UnicodeError) -> tuple[bytes, int]:
    """What is written for characters that a terminal cannot show; names keep their bytes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    written = bytearray()
    for character in error.object[error.start : error.end]:
        escaped = 0xDC80 <= ord(character) <= 0xDCFF  # a byte of a file name that is no UTF-8
        written.append(ord(character) - 0xDC00 if escaped else ord("?"))
    return bytes(written), error.end


def prepare_streams() -> None:
    """Put streams that behave as this module says in place of the standard ones.

    Closed ones lead nowhere, as if they were ``/dev/null``; else the next file that is opened would
    take their place, and what programs that are called print would go into it.
    """
    codecs.register_error(_ERRORS, _printable)
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    # Whoever calls this program from Python may have put streams of his own there.
    if sys.stdout is sys.__stdout__:
        sys.stdout = _prepared(_Output(1, "w", closefd=False), sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _prepared(_Notes(2, "w", closefd=False), sys.stderr)


def _prepared(raw: io.FileIO, old: TextIO | None) -> TextIO:
    if old is None:  # was closed
        return io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8", errors=_ERRORS)
    unbuffered = getattr(old, "write_through", False)  # as with `python -u`
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=old.encoding,
        errors=_ERRORS,
        line_buffering=getattr(old, "line_buffering", False) or unbuffered,
    )


def drop_output() -> None:
    """Let what is still to be written to standard output go nowhere."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.close(descriptor)
