"""``sop verilog``."""

from pathlib import Path
from typing import Annotated

import typer

from golden.float_input import SOURCES
from rtl.lookup import DEFAULT_LOOKUP
from rtl.units import UNITS
from sop.console import (
    DEFAULT_FORMAT,
    ForceOption,
    HifOption,
    JsonOption,
    LanesOption,
    LookupOption,
    OutputOption,
    parse_format_option,
    print_json,
)
from sop.output import checked_folder
from sop.verilog_files import verilog_files, write_verilog_files

__all__ = ["verilog"]


def verilog(
    unit: Annotated[str, typer.Argument(help=f"{', '.join(UNITS)}, or all.")] = "all",
    format_names: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            "-f",
            help="Format name; `sop formats` lists them. Given several times, each tensor "
            f"chooses one with `mode`. Default: {DEFAULT_FORMAT}.",
        ),
    ] = None,
    lanes: LanesOption = 64,
    output: OutputOption = "float32",
    source: Annotated[
        str, typer.Option(help=f"What float_to_hif converts: {', '.join(SOURCES)}.")
    ] = "BF16",
    hif: HifOption = "HIF7",
    lookup: LookupOption = DEFAULT_LOOKUP,
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder to write into.")] = Path(
        "build/verilog"
    ),
    testbench: Annotated[
        bool,
        typer.Option(
            "--testbench", help="Also a self-checking testbench in Verilog, for any simulator."
        ),
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write Verilog and what others need to use it; the same bytes on every run.

    Per unit: Verilog-2005, a JSON description of ports, payload fields, parameters and timing, lint
    waivers, a FuseSoC core, a LiteX component, a LibreLane configuration; of sop_decoder_axi also a
    C header and the register map. Files that were not
    written by this command, or were edited since, are overwritten with --force only.

    Example: `sop verilog float_decoder --format NF4sUE4M4 --lanes 32 -o rtl_out`
    """
    folder = checked_folder(folder)
    formats = [parse_format_option(name, hif) for name in format_names or [DEFAULT_FORMAT]]
    files: dict[str, str] = {}
    for name in UNITS if unit == "all" else (unit,):
        files |= verilog_files(
            name,
            formats,
            lanes=lanes,
            output=output,
            source=source,
            lookup=lookup,
            testbench=testbench,
        )
    paths = write_verilog_files(folder, files, force=force)
    if as_json:
        print_json({"files": [str(path) for path in paths]})
    else:
        for path in paths:
            print(path)
