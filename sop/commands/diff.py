"""``sop diff``."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from golden.checkpoint import Checkpoint
from sop.checkpoints.diff import diff_checkpoints
from sop.checkpoints.diff_rules import RULES
from sop.checkpoints.differences import Difference, DiffReport
from sop.files.recorded_source import other_source
from sop.files.weights import open_weights
from sop.shared.console import EXIT_MISMATCH, JsonOption, out, print_json, print_rows, warn
from sop.shared.progress import shown_progress

__all__ = ["diff"]


def _print_first(first: Difference) -> None:
    rule = RULES[first.rule]
    document, words = rule.source
    place = f"{first.place}: " if str(first.place) else ""
    lines = [
        f"first difference: {first.field}: {place}{first.a} against {first.b}",
        *(f"  {fact}" for fact in first.facts),
        f"  rule: {rule.text}",
        f"  ({document}, {words.strip('*')!r})",
    ]
    for line in lines:
        out.print(escape(line), soft_wrap=True)


def _print_report(report: DiffReport) -> None:
    if report.first is None:
        print("same")
        return
    _print_first(report.first)
    out.print()
    rows = [[f"{count:,}", field] for field, count in report.counts.items() if count]
    print_rows("differences", ["count", "field"], rows)


def diff(
    a: Annotated[Path, typer.Argument(help="Checkpoint.")],
    b: Annotated[Path, typer.Argument(help="Checkpoint.")],
    model: Annotated[
        Path | None,
        typer.Option(help="The model that was quantized: tell the quotient of a weight, too."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find the first weight and bit in which two checkpoints differ, and the rule behind it.

    Exit code 1 if anything differs, 0 if nothing does.

    Example: `sop diff mine.safetensors theirs.safetensors --model model.gguf`
    """
    with ExitStack() as stack:
        first, second = (stack.enter_context(Checkpoint(path)) for path in (a, b))
        source = None if model is None else stack.enter_context(open_weights(model))
        warnings = []
        if source is not None:
            found = [other_source(one, source.origin) for one in (first, second)]
            warnings = [warning for warning in found if warning]
        for warning in warnings:
            warn(warning)
        progress = stack.enter_context(shown_progress("tensors"))
        report = diff_checkpoints(first, second, source, progress)
    if as_json:
        difference = None if report.first is None else report.first.as_dict()
        print_json(
            {
                "same": report.same,
                "first": difference,
                "counts": report.counts,
                "warnings": warnings,
            }
        )
    else:
        _print_report(report)
    if not report.same:
        raise typer.Exit(EXIT_MISMATCH)
