"""``sop sim``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from golden.formats import DEFAULT_HIF
from golden.quantize import resolve_luts
from golden.scaling import ScaleMode
from rtl.units import FLOAT_DECODER, FLOAT_LAYOUTS
from sim.decoder import Decoder
from sim.installed import SIMULATORS
from sim.stalls import STALL_MODES
from sop.files.choice import linear_matrices_of_block, select_matrices
from sop.files.models import embedded_model_path, open_model
from sop.hdl.simulate import SimulationReport, explain_mismatch, parse_fault, simulate_model
from sop.shared.console import (
    DEFAULT_FORMAT,
    EXIT_MISMATCH,
    FormatOption,
    HifOption,
    JsonOption,
    LanesOption,
    OutputOption,
    choice,
    parse_format_option,
    print_json,
    print_rows,
    progress,
)
from sop.shared.output import checked_folder
from sop.shared.shares import percent

__all__ = ["sim"]


def _both(second: float) -> str:
    """Shares of the two LUTs, in percent."""
    return f"{percent(1 - second, 1)}/{percent(second, 1)}"


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
                _both(tensor.second_lut_share),
                f"{tensor.relative_mse:.3e}",
                f"{tensor.gap_ppm:.0f}",
            ]
        )
    facts = report.as_dict()
    rows.append(
        [
            "all (means by weights)",
            "",
            f"{facts['weights']:,}",
            f"{facts['clocks']:,}",
            f"{facts['weights'] / facts['clocks']:.2f}",
            f"{facts['mismatches']:,}",
            _both(report.mean(lambda tensor: tensor.second_lut_share)),
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
    print_rows(title, columns, rows)
    print()
    print(
        f"{facts['weights']:,} weights in {facts['clocks']:,} clocks, {facts['mismatches']:,} "
        f"mismatched; quantized in {report.quantize_seconds:.1f} s, simulated in "
        f"{report.simulate_seconds:.1f} s (build included)"
    )
    if report.source_note:
        print(f"Note: {report.source_note}")
    for tensor in report.tensors:
        first = tensor.result.first_difference
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
    hif: HifOption = DEFAULT_HIF.name,
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
    fmt = parse_format_option(format_name, hif)
    mode = ScaleMode(choice("scale-mode", scale_mode, tuple(m.value for m in ScaleMode)))
    choice("stalls", stalls, STALL_MODES)
    choice("output", output, tuple(FLOAT_LAYOUTS))
    fault = None if inject_fault is None else parse_fault(inject_fault)
    decoder = Decoder(FLOAT_DECODER.name, (fmt,), lanes, output, simulator, build)
    resolve_luts(fmt)  # trained codebooks have no LUT before training: say so before any work
    decoder.check()
    checked_folder(build, [model])
    with open_model(model or embedded_model_path()) as opened:
        if tensors:
            matrices = select_matrices(opened, tensors)
        else:
            matrices = linear_matrices_of_block(opened, 0)
        report = simulate_model(
            opened, matrices, decoder, mode=mode, stalls=stalls, seed=seed, fault=fault,
            report=lambda line: progress.print(escape(line)),
        )  # fmt: skip
    if as_json:
        print_json(report.as_dict())
    else:
        _print_report(report)
    if not report.passed:
        raise typer.Exit(EXIT_MISMATCH)
