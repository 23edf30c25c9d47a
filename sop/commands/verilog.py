"""``sop verilog``."""

from pathlib import Path
from typing import Annotated

import typer

from rtl.units import UNITS
from sop.console import (
    DEFAULT_FORMAT,
    FormatOption,
    HifOption,
    JsonOption,
    LanesOption,
    OutputOption,
    parse_format_option,
    print_json,
)
from sop.output import write_files
from sop.verilog_files import verilog_files

__all__ = ["verilog"]


def verilog(
    unit: Annotated[str, typer.Argument(help=f"{', '.join(UNITS)}, or all.")] = "all",
    format_name: FormatOption = DEFAULT_FORMAT,
    lanes: LanesOption = 64,
    output: OutputOption = "float32",
    hif: HifOption = "HIF7",
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder to write into.")] = Path(
        "build/verilog"
    ),
    as_json: JsonOption = False,
) -> None:
    """Write Verilog and a JSON description of its ports; the same bytes on every run.

    Example: `sop verilog float_decoder --format NF4sUE4M4 --lanes 32 -o rtl_out`
    """
    fmt = parse_format_option(format_name, hif)
    files: dict[str, str] = {}
    for name in UNITS if unit == "all" else (unit,):
        files |= verilog_files(name, fmt, lanes=lanes, output=output)
    paths = write_files(folder, files)
    if as_json:
        print_json({"files": [str(path) for path in paths]})
    else:
        for path in paths:
            print(path)
