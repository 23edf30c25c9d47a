"""``sop verilog``."""

from pathlib import Path
from typing import Annotated

import typer

from golden.activations import parse_activation_format
from golden.checkpoint import Checkpoint
from golden.errors import InputError
from golden.float_input import SOURCES
from golden.formats import DEFAULT_HIF, HIF_FORMATS
from golden.notation import QuantFormat
from rtl.lookup import DEFAULT_LOOKUP
from rtl.modes import distinct_formats
from rtl.products import DEFAULT_MULTIPLIER, MULTIPLIERS
from rtl.tile_units import TILE_UNIT
from rtl.units import UNITS
from sop.console import (
    DEFAULT_FORMAT,
    ForceOption,
    JsonOption,
    LanesOption,
    LookupOption,
    OutputOption,
    parse_format_option,
    print_json,
)
from sop.output import checked_folder
from sop.verilog_files import tile_files, verilog_files, write_verilog_files

__all__ = ["verilog"]


def _formats(
    names: list[str] | None, hif: str | None, checkpoint: Path | None
) -> list[QuantFormat]:
    """Formats in the order of ``mode``; those of a checkpoint as its sorted tensors have them.

    Raises
    ------
    InputError
        If one is none, or the checkpoint has none.
    """
    if checkpoint is None:
        return [
            parse_format_option(name, hif or DEFAULT_HIF.name) for name in names or [DEFAULT_FORMAT]
        ]
    if names or hif is not None:
        raise InputError("--checkpoint names the formats: leave out --format and --hif")
    with Checkpoint(checkpoint) as opened:
        formats = distinct_formats(opened.info(name).format for name in opened.names)
    if not formats:
        raise InputError(f"{checkpoint}: no quantized tensor")
    return list(formats)


def verilog(
    unit: Annotated[
        str, typer.Argument(help=f"{', '.join(UNITS)}, or all of these; {TILE_UNIT}.")
    ] = "all",
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
    hif: Annotated[
        str | None,
        typer.Option(
            help=f"Format of LUT entries: {', '.join(HIF_FORMATS)}. [{DEFAULT_HIF.name}]",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Take the formats and that of LUT entries from a checkpoint, in place of --format "
            "and --hif: what decodes it.",
        ),
    ] = None,
    lookup: LookupOption = DEFAULT_LOOKUP,
    rows: Annotated[int, typer.Option(help="Rows of weights of a sop_tile.")] = 16,
    columns: Annotated[int, typer.Option(help="Tokens of a sop_tile.")] = 16,
    activations: Annotated[
        str, typer.Option(help="Format of the activations of a sop_tile, such as INT8^32sBF16.")
    ] = "INT8sUE8M0",
    multiplier: Annotated[
        str, typer.Option(help=f"Multipliers of a sop_tile: {', '.join(MULTIPLIERS)}.")
    ] = DEFAULT_MULTIPLIER,
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

    What decodes a checkpoint: `sop verilog sop_decoder_axi --checkpoint model.sop.safetensors`
    """
    folder = checked_folder(folder)
    formats = _formats(format_names, hif, checkpoint)
    files: dict[str, str] = {}
    if unit == TILE_UNIT:
        files = _tile(
            formats, activations, rows=rows, columns=columns, multiplier=multiplier,
            testbench=testbench,
        )  # fmt: skip
        unit_names: tuple[str, ...] = ()
    else:
        unit_names = UNITS if unit == "all" else (unit,)
    for name in unit_names:
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


def _tile(
    formats: list[QuantFormat], activations: str, *, rows: int, columns: int, multiplier: str,
    testbench: bool,
) -> dict[str, str]:  # fmt: skip
    """Files of a tile."""
    if len(formats) > 1:
        names = ", ".join(fmt.name for fmt in formats)
        raise InputError(f"--format: {TILE_UNIT} takes one format, not {names}")
    if testbench:
        raise InputError(f"--testbench: there is none for {TILE_UNIT}")
    parsed = parse_activation_format(activations)
    if parsed is None:
        raise InputError(f"--activations {activations}: {TILE_UNIT} multiplies quantized ones")
    return tile_files(formats[0], parsed, rows=rows, columns=columns, multiplier=multiplier)
