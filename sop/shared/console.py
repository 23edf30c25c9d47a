"""What commands share: consoles, tables, JSON, common options."""

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from golden.errors import InputError
from golden.formats import HIF_FORMATS
from golden.notation import QuantFormat, parse_format
from rtl.units import FLOAT_LAYOUTS

__all__ = [
    "DEFAULT_FORMAT",
    "EXIT_BAD_INPUT",
    "EXIT_INTERNAL",
    "EXIT_MISMATCH",
    "EXIT_READER_GONE",
    "BosOption",
    "ForceOption",
    "FormatOption",
    "HifOption",
    "JsonOption",
    "LanesOption",
    "OutputOption",
    "SkipTokensOption",
    "TextOption",
    "WindowOption",
    "choice",
    "out",
    "parse_format_option",
    "print_json",
    "print_rows",
    "progress",
    "warn",
]

EXIT_MISMATCH = 1
EXIT_BAD_INPUT = 2
EXIT_INTERNAL = 3
EXIT_READER_GONE = 141  # what a shell says of a program that SIGPIPE ended

_NUMBER = re.compile(r"(over |under |-)?[0-9]")

DEFAULT_FORMAT = "BOF4-NF4sS1E5M5"

# Text that is piped is not cut to the width of a terminal that is not there.
out = Console(highlight=False, width=None if sys.stdout and sys.stdout.isatty() else 160)
progress = Console(stderr=True, highlight=False)

FormatOption = Annotated[
    str, typer.Option("--format", "-f", help="Format name; `sop formats` lists them.")
]
HifOption = Annotated[str, typer.Option(help=f"Format of LUT entries: {', '.join(HIF_FORMATS)}.")]
LanesOption = Annotated[int, typer.Option(help="Weights per clock; a multiple of the block size.")]
OutputOption = Annotated[
    str, typer.Option("--output", help=f"Floating-point output: {' or '.join(FLOAT_LAYOUTS)}.")
]
BosOption = Annotated[
    str,
    typer.Option(
        help="Start each window with the tokenizer's begin-of-text token: yes, no, or auto, which "
        "is what the tokenizer itself does."
    ),
]
WindowOption = Annotated[
    int | None,
    typer.Option(
        help="Tokens that the model sees together; without it 1024, or what the model was made for "
        "if that is less."
    ),
]
TextOption = Annotated[
    Path | None,
    typer.Option(help="UTF-8 text; without it, the help topics that come with Python."),
]
SkipTokensOption = Annotated[
    int, typer.Option(help="Leave out this many tokens at the start of the text.")
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Replace an output that this program did not make.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """``value``, or an InputError naming ``--name`` if it is not among ``allowed``."""
    if value not in allowed:
        raise InputError(f"--{name} must be one of {', '.join(allowed)}, not {value!r}")
    return value


def parse_format_option(name: str, hif: str) -> QuantFormat:
    """Format of ``--format`` and ``--hif``; raises InputError."""
    return parse_format(name, HIF_FORMATS[choice("hif", hif, tuple(HIF_FORMATS))])


def warn(text: str) -> None:
    """Print a warning to standard error, on one line."""
    progress.print(escape(f"warning: {text}"), soft_wrap=True)


def print_json(value: Any) -> None:
    """Print to standard output what ``--json`` asks for."""
    print(json.dumps(value, indent=2))


def print_rows(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table; numbers are aligned right."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for position, column in enumerate(columns):
        numeric = bool(rows) and _NUMBER.match(rows[0][position])
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    out.print(table)
