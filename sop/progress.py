"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sop.console import progress

__all__ = ["Report", "line_printer", "shown_progress"]

Report = Callable[[int, int], None]
"""Called with the numbers of things done and in total."""

_LINE_SECONDS = 2.0


@contextmanager
def shown_progress(what: str) -> Iterator[Report]:
    """Show on standard error how many of the things called `what` are done.

    Yields
    ------
    report : callable
        See :data:`Report`.
    """
    if not progress.is_terminal:
        yield line_printer(what)
        return
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("time left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=progress, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def line_printer(what: str) -> Report:
    """Report that prints a line on standard error, at most one in two seconds."""
    printed = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal printed
        if time.monotonic() - printed >= _LINE_SECONDS:
            printed = time.monotonic()
            progress.print(f"{what}: {done} of {total}")

    return report
