"""``sop sim-model``."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from golden.checkpoint import Checkpoint
from golden.corrections import Corrections
from golden.errors import InputError
from golden.tensor import QuantizedTensor
from rtl.modes import distinct_formats
from rtl.units import FLOAT_LAYOUTS, LUT_DECODER, SPARSE_DECODER
from sim.bulk import BULK_UNITS, run_bulk
from sim.decoder import Decoder, Result
from sim.installed import SIMULATORS, require_simulator
from sop.shared.console import (
    EXIT_MISMATCH,
    JsonOption,
    OutputOption,
    choice,
    out,
    print_json,
    print_rows,
    progress,
)
from sop.shared.output import checked_folder

__all__ = ["sim_model"]

_LANES = {LUT_DECODER.name: 256, SPARSE_DECODER.name: 64}


class _Tensors:
    """Quantized tensors of a checkpoint, read again whenever they are asked for."""

    def __init__(self, checkpoint: Checkpoint, names: Sequence[str]) -> None:
        self.checkpoint, self.names = checkpoint, names

    def __iter__(self) -> Iterator[tuple[QuantizedTensor, Corrections | None]]:
        for name in self.names:
            stored = self.checkpoint.read(name)
            yield stored.tensor, stored.corrections


def _up_to(checkpoint: Checkpoint, weights: int | None) -> list[str]:
    """Names of the first tensors that together have at least so many weights."""
    if weights is None:
        return list(checkpoint.names)
    names: list[str] = []
    total = 0
    for name in checkpoint.names:
        if total >= weights:
            break
        rows, columns = checkpoint.info(name).shape
        names.append(name)
        total += rows * columns
    return names


def _report(unit: str, decoder: Decoder, names: Sequence[str], result: Result) -> dict[str, Any]:
    first = result.first_difference
    facts = asdict(result)
    facts["loads_hidden"] = facts.pop("in_step")
    facts["first_difference"] = first and {**asdict(first), "tensor": names[first.tensor]}
    return {
        "unit": unit,
        "simulator": decoder.simulator,
        "lanes": decoder.lanes,
        "formats": [fmt.name for fmt in decoder.formats],
        "tensors": len(names),
        "passed": result.passed,
        "weights_per_second": result.weights / result.seconds["simulate"],
        **facts,
    }


def _print_reports(reports: Sequence[dict[str, Any]]) -> None:
    columns = ["unit", "simulator", "lanes", "weights", "corrections", "clocks", "expected",
               "wrong beats", "simulated s", "M weights/s"]  # fmt: skip
    rows = [
        [
            report["unit"],
            report["simulator"],
            str(report["lanes"]),
            f"{report['weights']:,}",
            f"{report['corrections']:,}",
            f"{report['clocks']:,}",
            f"{report['expected_clocks']:,}",
            f"{report['wrong_beats']:,}",
            f"{report['seconds']['simulate']:.2f}",
            f"{report['weights_per_second'] / 1e6:.1f}",
        ]
        for report in reports
    ]
    print_rows("Every bit of every weight against the golden model", columns, rows)
    for report in reports:
        first = report["first_difference"]
        if first is not None:
            out.print(
                escape(
                    f"MISMATCH {report['unit']}: tensor {first['tensor']!r}, row {first['row']}, "
                    f"column {first['column']} (beat {first['beat']}): RTL {first['actual']:#x}, "
                    f"golden {first['expected']:#x}"
                ),
                soft_wrap=True,
            )
    out.print("PASS" if all(report["passed"] for report in reports) else "FAIL")


def sim_model(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint that sop quantize wrote.", show_default=False)
    ],
    unit: Annotated[
        list[str] | None,
        typer.Option(help=f"What to simulate: {', '.join(BULK_UNITS)}; repeatable. Default: both."),
    ] = None,
    lanes: Annotated[
        int | None, typer.Option(help="Weights per clock. Default: 256 and 64.")
    ] = None,
    simulator: Annotated[
        str, typer.Option("--sim", help=f"Simulator: {' or '.join(SIMULATORS)}.")
    ] = "verilator",
    output: OutputOption = "float32",
    weights: Annotated[
        int | None,
        typer.Option(help="Only the first tensors, at least this many weights."),
    ] = None,
    inject_fault: Annotated[
        int | None,
        typer.Option(
            metavar="BIT", help="Flip this bit of the indices' stream, to see the check fail."
        ),
    ] = None,
    build: Annotated[Path, typer.Option(help="Folder for builds.")] = Path("build/sim"),
    as_json: JsonOption = False,
) -> None:
    """Stream a whole quantized model through the RTL and compare every bit of every weight.

    `lut_decoder` is the lookup alone (HIF codes and scales are compared), `sparse_decoder`
    everything up to the weights with their corrections. Also counts clocks: one a beat, or one a
    correction where a beat has several. Exit code 1 if a bit or a clock differs.

    Example: `sop sim-model model.sop.safetensors --sim icarus --weights 1000000`
    """
    units = [choice("unit", name, BULK_UNITS) for name in unit or BULK_UNITS]
    choice("output", output, tuple(FLOAT_LAYOUTS))
    require_simulator(simulator, build)
    checked_folder(build)
    reports = []
    with Checkpoint(checkpoint) as opened:
        names = _up_to(opened, weights)
        if not names:
            raise InputError(f"{checkpoint}: no quantized tensor")
        formats = distinct_formats(opened.info(name).format for name in names)
        for name in units:
            decoder = Decoder(
                name, formats, lanes or _LANES[name], output, simulator, build
            )  # fmt: skip
            progress.print(
                escape(f"{name}: {len(names)} tensors, {decoder.lanes} lanes, {simulator}")
            )
            result = run_bulk(decoder, _Tensors(opened, names), flipped_bit=inject_fault)
            reports.append(_report(name, decoder, names, result))
    if as_json:
        print_json({"passed": all(report["passed"] for report in reports), "runs": reports})
    else:
        _print_reports(reports)
    if not all(report["passed"] for report in reports):
        raise typer.Exit(EXIT_MISMATCH)
