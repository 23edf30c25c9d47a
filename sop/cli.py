"""The ``sop`` command.

Exit codes: 0 success; 1 the hardware differs from the golden model; 2 bad input or usage; 3 a tool
failed, or there is a bug in this program.
"""

import json
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from golden.errors import InputError
from golden.formats import HIF_FORMATS
from golden.notation import QuantFormat, parse_format
from golden.quantize import resolve_luts
from golden.scaling import ScaleMode
from rtl.units import FLOAT_LAYOUTS, UNITS
from sop import __version__
from sop.format_list import describe_format, format_list
from sop.models import embedded_model_path, linear_tensors_of_block, open_model
from sop.output import write_files
from sop.simulate import SimulationReport, explain_mismatch, parse_fault, simulate_model
from sop.verilog_files import verilog_files
from tb.simulator import SIMULATORS, SimulationError
from tb.stalls import STALL_MODES
from tb.tensor_run import Decoder

__all__ = ["main"]

EXIT_MISMATCH = 1
EXIT_BAD_INPUT = 2
EXIT_INTERNAL = 3

DEFAULT_FORMAT = "BOF4-NF4sS1E5M5"

app = typer.Typer(
    help="Scaled outer product: LLM quantization for lookup-table hardware, proven bit by bit.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
# Text that is piped is not cut to the width of a terminal that is not there.
out = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
progress = Console(stderr=True, highlight=False)

FormatOption = Annotated[
    str, typer.Option("--format", "-f", help="Format name; `sop formats` lists them.")
]
HifOption = Annotated[str, typer.Option(help=f"Format of LUT entries: {', '.join(HIF_FORMATS)}.")]
LanesOption = Annotated[int, typer.Option(help="Weights per clock; a multiple of the block size.")]
OutputOption = Annotated[
    str, typer.Option("--output", help=f"Floating-point output: {' or '.join(FLOAT_LAYOUTS)}.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise InputError(f"--{name} must be one of {', '.join(allowed)}, not {value!r}")
    return value


def _parse_format(name: str, hif: str) -> QuantFormat:
    return parse_format(name, HIF_FORMATS[_choice("hif", hif, tuple(HIF_FORMATS))])


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _print_rows(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table; numbers are aligned right."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for position, column in enumerate(columns):
        numeric = bool(rows) and rows[0][position][:1].lstrip("-").isdigit()
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    out.print(table)


@app.command()
def formats(
    names: Annotated[
        list[str] | None, typer.Argument(help="Formats to describe; without it, list all.")
    ] = None,
    hif: HifOption = "HIF7",
    as_json: JsonOption = False,
) -> None:
    """List number formats, codebooks and quantization formats with their bits.

    Example: `sop formats` or `sop formats BOF4-NF4^32sS1E5M5 --json`
    """
    if names:
        listing: dict[str, list[dict[str, Any]]] = {
            "formats": [describe_format(_parse_format(name, hif)) for name in names]
        }
    else:
        listing = format_list()
    if as_json:
        _print_json(listing)
        return
    for group in ("atoms", "scales"):
        if group in listing:
            rows = [
                [
                    f["name"],
                    str(f["bits"]),
                    str(f["distinct_values"]),
                    f"{f['min']:g}",
                    f"{f['max']:g}",
                ]
                for f in listing[group]
            ]
            _print_rows(group, ["name", "bits", "distinct", "min", "max"], rows)
            out.print()
    if "codebooks" in listing:
        rows = [
            [book["name"], " ".join(str(level) for level in book["levels"]["HIF7"])]
            for book in listing["codebooks"]
        ]
        _print_rows("codebooks (blocks of 16, levels on HIF7)", ["name", "levels"], rows)
        out.print()
    rows = [
        [f["name"], f"{f['bits_per_weight']:g}", str(f["index_bits"]), str(f["block_size"]),
         str(f["scale_word_bits"]), f["note"]]
        for f in listing["formats"]
    ]  # fmt: skip
    columns = ["name", "bits/weight", "index bits", "block", "scale word bits", "note"]
    _print_rows("quantization formats", columns, rows)


@app.command()
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
    fmt = _parse_format(format_name, hif)
    files: dict[str, str] = {}
    for name in UNITS if unit == "all" else (unit,):
        files |= verilog_files(name, fmt, lanes=lanes, output=output)
    paths = write_files(folder, files)
    if as_json:
        _print_json({"files": [str(path) for path in paths]})
    else:
        for path in paths:
            print(path)


def _print_report(report: SimulationReport) -> None:
    rows = []
    for tensor in report.tensors:
        result = tensor.result
        rows.append(
            [
                tensor.name,
                f"{tensor.rows}x{tensor.columns}",
                f"{tensor.weights:,}",
                f"{result.clocks:,}",
                f"{tensor.weights / result.clocks:.2f}",
                f"{result.mismatches:,}",
                f"{100 * (1 - tensor.second_lut_share):.1f}/{100 * tensor.second_lut_share:.1f}",
                f"{tensor.relative_mse:.3e}",
                f"{tensor.gap_ppm:.0f}",
            ]
        )
    facts = report.as_dict()
    share = 100 * report.mean(lambda tensor: tensor.second_lut_share)
    rows.append(
        [
            "all (means by weights)",
            "",
            f"{facts['weights']:,}",
            f"{facts['clocks']:,}",
            f"{facts['weights'] / facts['clocks']:.2f}",
            f"{facts['mismatches']:,}",
            f"{100 - share:.1f}/{share:.1f}",
            f"{facts['mean_relative_mse']:.3e}",
            f"{facts['mean_cosine_gap_ppm']:.0f}",
        ]
    )
    columns = ["tensor", "shape", "weights", "clocks", "w/clk", "mismatches", "La/Lb %",
               "rel. MSE", "gap ppm"]  # fmt: skip
    decoder = report.decoder
    title = (
        f"{decoder.format.name} ({float(decoder.format.bits_per_weight):g} bits per weight, LUT "
        f"entries {decoder.format.hif.name}), {decoder.lanes} lanes, {decoder.output}, "
        f"{decoder.simulator}"
    )
    _print_rows(title, columns, rows)
    print()
    print(
        f"{facts['weights']:,} weights in {facts['clocks']:,} clocks, {facts['mismatches']:,} "
        f"mismatched; quantized in {report.quantize_seconds:.1f} s, simulated in "
        f"{report.simulate_seconds:.1f} s (build included)"
    )
    if report.source_note:
        print(f"Note: {report.source_note}")
    for tensor in report.tensors:
        first = tensor.result.first_mismatch
        if first is not None:
            print(f"MISMATCH {explain_mismatch(tensor.name, first, decoder.output)}")
        if tensor.result.flags:
            print(f"FLAGS {tensor.name}: RTL raised {', '.join(tensor.result.flags)}")
        if tensor.result.misplaced_last:
            print(
                f"FRAMING {tensor.name}: {tensor.result.misplaced_last} beats with a wrong `last`"
            )
    if report.waveform is not None:
        print(f"Waveform: {report.waveform}")
    print("PASS: every bit equals the golden model" if report.passed else "FAIL")


@app.command()
def sim(
    model: Annotated[
        Path | None,
        typer.Argument(help="GGUF or safetensors file; without it, the embedded SmolLM2-135M."),
    ] = None,
    tensors: Annotated[
        list[str] | None,
        typer.Option(
            "--tensors",
            "-t",
            help="Glob of tensor names; may be repeated. "
            "Default: the linear tensors of decoder block 0.",
        ),
    ] = None,
    format_name: FormatOption = DEFAULT_FORMAT,
    lanes: LanesOption = 64,
    simulator: Annotated[
        str, typer.Option("--sim", help=f"Simulator: {' or '.join(SIMULATORS)}.")
    ] = "verilator",
    output: OutputOption = "float32",
    hif: HifOption = "HIF7",
    scale_mode: Annotated[
        str, typer.Option(help=f"Block scales: {', '.join(mode.value for mode in ScaleMode)}.")
    ] = "search",
    stalls: Annotated[
        str, typer.Option(help=f"Who pauses at random: {', '.join(STALL_MODES)}.")
    ] = "none",
    seed: Annotated[int, typer.Option(help="Seed of the pauses.")] = 1,
    inject_fault: Annotated[
        str | None,
        typer.Option(
            metavar="KIND:POSITION:BIT",
            help="Flip one bit of the first tensor between "
            "golden model and RTL, to see the check fail: index:12345:2, scale:777:0, "
            "lut:3:1.",
        ),
    ] = None,
    build: Annotated[Path, typer.Option(help="Folder for builds, logs and waveforms.")] = Path(
        "build/sim"
    ),
    as_json: JsonOption = False,
) -> None:
    """Quantize tensors, stream them through the RTL, and compare every bit with the golden model.

    Exit code 1 and a waveform if anything differs.

    Example: `sop sim model.gguf --tensors 'blk.3.*' --format NF4sUE4M4 --lanes 128 --json`
    """  # fmt: skip
    fmt = _parse_format(format_name, hif)
    mode = ScaleMode(_choice("scale-mode", scale_mode, tuple(m.value for m in ScaleMode)))
    _choice("stalls", stalls, STALL_MODES)
    _choice("output", output, tuple(FLOAT_LAYOUTS))
    fault = None if inject_fault is None else parse_fault(inject_fault)
    decoder = Decoder(fmt, lanes, output, simulator, build)
    resolve_luts(fmt)  # trained codebooks have no LUT before training: say so before any work
    decoder.check()
    with open_model(model or embedded_model_path()) as opened:
        names = opened.select(tensors) if tensors else linear_tensors_of_block(opened, 0)
        report = simulate_model(
            opened, names, decoder, mode=mode, stalls=stalls, seed=seed, fault=fault,
            report=lambda line: progress.print(escape(line)),
        )  # fmt: skip
    if as_json:
        _print_json(report.as_dict())
    else:
        _print_report(report)
    if not report.passed:
        raise typer.Exit(EXIT_MISMATCH)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"scaled-outer-product {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Scaled outer product: LLM quantization for lookup-table hardware, proven bit by bit."""


def main() -> None:
    """Run the command line; entry point of ``sop``."""
    try:
        app()
    except (InputError, OSError) as error:
        print(f"sop: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except SimulationError as error:
        print(f"sop: {error}", file=sys.stderr)
        sys.exit(EXIT_INTERNAL)
    except Exception:
        traceback.print_exc()
        print("sop: this is a bug in the program; please report it", file=sys.stderr)
        sys.exit(EXIT_INTERNAL)


if __name__ == "__main__":
    main()
