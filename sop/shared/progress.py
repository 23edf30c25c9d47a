"""Progress of long work: bars with the time left on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeft

from sop.shared.console import progress

__all__ = ["Report", "StepReport", "shown_progress", "shown_steps", "silent"]

Report = Callable[[int, int], None]
"""Called with the numbers of things done and in total."""

StepReport = Callable[[str, int, int], None]
"""Called with what is being done, and the numbers of things done and in total."""

_LINE_SECONDS = 2.0


def silent(*_: object) -> None:
    """Report nothing: a :data:`Report` and a :data:`StepReport` for who does not want any."""


@contextmanager
def shown_progress(what: str) -> Iterator[Report]:
    """Show on standard error how many of the things called `what` are done.

    Yields
    ------
    report : callable
        See :data:`Report`.
    """
    with shown_steps() as report:
        yield partial(report, what)


@contextmanager
def shown_steps() -> Iterator[StepReport]:
    """Show on standard error what is being done; each kind of work has a bar of its own.

    Yields
    ------
    report : callable
        See :data:`StepReport`.
    """
    if not progress.is_terminal:
        yield _line_printer()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("time left"),
        TimeLeft(),
    )
    with Progress(*columns, console=progress, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(escape(what))
            bars.update(tasks[what], completed=done, total=total)

        yield report


def _line_printer() -> StepReport:
    printed = time.monotonic()

    def report(what: str, done: int, total: int) -> None:
        nonlocal printed
        # Short work needs no lines.
        if time.monotonic() - printed >= _LINE_SECONDS:
            printed = time.monotonic()
            progress.print(escape(f"{what}: {done:,} of {total:,}"), soft_wrap=True)

    return report
