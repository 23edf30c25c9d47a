"""``sop verilog``."""

from pathlib import Path
from typing import Annotated

import typer

from golden.checkpoint import Checkpoint
from golden.errors import InputError
from golden.formats import DEFAULT_HIF, HIF_FORMATS
from golden.notation import QuantFormat
from rtl.lookup import DEFAULT_LOOKUP, LOOKUPS
from rtl.modes import distinct_formats
from rtl.units import CODES, FLOAT_LAYOUTS, UNITS, Options
from sop.hdl.unit_options import (
    FloatSourceOption,
    MultiplierOption,
    SlotsOption,
    TileActivationsOption,
    checked_options,
)
from sop.hdl.verilog_files import verilog_files, write_verilog_files
from sop.shared.console import (
    DEFAULT_FORMAT,
    ForceOption,
    JsonOption,
    parse_format_option,
    print_json,
)
from sop.shared.output import checked_folder

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
        str, typer.Argument(help=f"{', '.join(UNITS)}; or all: every unit that takes --lanes.")
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
    lanes: Annotated[
        int | None,
        typer.Option(
            help="Weights per clock; a multiple of the block size.",
            show_default=str(Options.lanes),
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            help=f"Floating-point output: {' or '.join(FLOAT_LAYOUTS)}; of a decoder behind AXI "
            f"also {CODES}.",
            show_default=Options.output,
        ),
    ] = None,
    source: FloatSourceOption = None,
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
    lookup: Annotated[
        str | None,
        typer.Option(
            help=f"Structure of the lookup: {', '.join(LOOKUPS)}; docs/synthesis.md.",
            show_default=DEFAULT_LOOKUP,
        ),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(help="Rows of weights of a tile.", show_default=str(Options.rows)),
    ] = None,
    columns: Annotated[
        int | None, typer.Option(help="Tokens of a tile.", show_default=str(Options.columns))
    ] = None,
    activations: TileActivationsOption = None,
    multiplier: MultiplierOption = None,
    slots: SlotsOption = None,
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
    units = _units_with_lanes() if unit == "all" else (unit,)
    options = checked_options(
        units,
        {
            "format": format_names, "hif": hif, "lanes": lanes, "output": output, "source": source,
            "lookup": lookup, "rows": rows, "columns": columns, "activations": activations,
            "multiplier": multiplier, "slots": slots,
        },
    )  # fmt: skip
    for name in ("format", "hif"):
        options.pop(name, None)
    if checkpoint is not None and not any("hif" in UNITS[name].takes for name in units):
        raise InputError("--checkpoint names formats, which this unit does not take")
    formats = _formats(format_names, hif, checkpoint)
    files: dict[str, str] = {}
    for name in units:
        files |= verilog_files(name, formats, testbench=testbench, **options)
    paths = write_verilog_files(folder, files, [checkpoint], force=force)
    if as_json:
        print_json({"files": [str(path) for path in paths]})
    else:
        for path in paths:
            print(path)


def _units_with_lanes() -> tuple[str, ...]:
    """Those that one set of options can build together."""
    return tuple(name for name, unit in UNITS.items() if "lanes" in unit.takes)
