"""Ending in good order when a signal asks for it, and not leaving anybody behind when one does not.

SIGTERM, SIGHUP and SIGINT become an exception, so that files and worker processes are put away on
the way out. SIGKILL cannot be caught: worker processes look after their parent themselves.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

__all__ = ["Ended", "end_by_signal", "end_with_parent", "raise_on_signals"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOOK_SECONDS = 0.5


class Ended(BaseException):
    """A signal asks this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Raise :class:`Ended` in the main thread when a signal asks to end while the block lives.

    A second signal ends the process at once. Signals that the process was started to ignore, as
    `nohup` does with SIGHUP, stay ignored.
    """
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    for other in _SIGNALS:
        if signal.getsignal(other) is _raise:
            signal.signal(other, signal.SIG_DFL)
    raise Ended(number)


def end_by_signal(number: int) -> NoReturn:
    """End this process by a signal, so that whoever waits for it sees that; 128 + n in a shell."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    raise SystemExit(128 + number)  # if the signal is blocked


def end_with_parent(parent: int) -> None:
    """Let this worker process end soon after its parent, whichever way that ends.

    Parameters
    ----------
    parent : int
        Process number of the parent, as it sees itself.
    """
    # Ctrl-C reaches all processes of a terminal; the parent ends its workers in good order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_LOOK_SECONDS)
    os._exit(1)
