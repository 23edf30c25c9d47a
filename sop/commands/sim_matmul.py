"""``sop sim-matmul``."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from golden.activations import DEFAULT_ACTIVATION_FORMAT
from golden.checkpoint import Checkpoint
from golden.errors import InputError
from golden.kernel import OUTPUTS
from sim.installed import SIMULATORS, require_simulator
from sim.tile_operands import FAULT_KINDS
from sop.files.recorded_source import other_model
from sop.hdl.matmul_simulation import (
    LayerRun,
    MatmulSimulation,
    TileSettings,
    choose_layers,
    explain,
    tiles_of,
)
from sop.hdl.simulate import parse_fault
from sop.hdl.unit_options import activations_option
from sop.llm.evaluation import DEFAULT_SKIP_TOKENS
from sop.llm.opening import open_torch_model
from sop.llm.packages import require
from sop.llm.windows import cut_windows, default_text, read_text
from sop.shared.console import (
    EXIT_MISMATCH,
    BosOption,
    JsonOption,
    OutputOption,
    SkipTokensOption,
    TextOption,
    WindowOption,
    choice,
    out,
    print_json,
    print_rows,
    progress,
    warn,
)
from sop.shared.output import checked_folder
from sop.shared.progress import shown_steps
from sop.shared.shares import percent

__all__ = ["sim_matmul"]


def _layer_facts(layer: LayerRun, outputs: int) -> dict[str, Any]:
    facts = asdict(layer)
    if layer.mismatch is not None:
        facts["mismatch"]["waveform"] = str(layer.mismatch.waveform or "") or None
    return {
        **facts,
        "passed": layer.passed,
        "relative_mse": layer.relative_mse,
        **_rates(layer.products, layer.clocks, outputs),
    }


def _rates(products: float, clocks: float, outputs: int) -> dict[str, float]:
    return {
        "products_per_clock": products / clocks,
        "share_of_ideal": products / clocks / outputs,
    }


def _totals(layers: Sequence[LayerRun], outputs: int) -> dict[str, Any]:
    counted = ("products", "clocks", "expected_clocks", "mismatches", "wrong_flags", "corrections",
               "seconds")  # fmt: skip
    totals = {name: sum(getattr(layer, name) for layer in layers) for name in counted}
    return {**totals, **_rates(totals["products"], totals["clocks"], outputs)}


def _row(facts: dict[str, Any], what: list[str], error: str) -> list[str]:
    return [
        *what,
        f"{facts['products']:,}",
        f"{facts['clocks']:,}",
        f"{facts['products_per_clock']:.2f}",
        percent(facts["share_of_ideal"]),
        f"{facts['mismatches']:,}",
        error,
    ]


def _print_report(report: dict[str, Any], layers: Sequence[LayerRun]) -> None:
    columns = ["tensor", "shape", "tokens", "format", "products", "clocks", "products/clk",
               "% of ideal", "mismatches", "rel. MSE"]  # fmt: skip
    rows = [
        _row(
            facts,
            [layer.name, "x".join(map(str, layer.shape)), f"{layer.tokens:,}", layer.format],
            f"{layer.relative_mse:.3e}",
        )
        for facts, layer in zip(report["layers"], layers, strict=True)
    ]
    totals = report["totals"]
    rows.append(_row(totals, ["all", "", "", ""], ""))
    title = (
        f"{report['rows']} x {report['columns']} tile, activations {report['activations']}, "
        f"{report['simulator']}: every output bit against the golden model"
    )
    print_rows(title, columns, rows)
    out.print()
    out.print(
        f"{totals['products']:,} products in {totals['clocks']:,} clocks "
        f"({totals['expected_clocks']:,} expected), simulated in {totals['seconds']:.1f} s of "
        f"{report['seconds']:.1f} s; rel. MSE: against float weights and inputs",
        soft_wrap=True,
    )
    for note in report["notes"]:
        out.print(escape(f"Note: {note}"), soft_wrap=True)
    for layer in layers:
        if layer.mismatch is not None:
            lines = explain(layer.name, layer.mismatch, report["output"])
            for number, line in enumerate(lines):
                out.print(escape(f"{'  ' if number else 'MISMATCH '}{line}"), soft_wrap=True)
        if layer.wrong_flags:
            out.print(escape(f"FLAGS {layer.name}: wrong in {layer.wrong_flags:,} beats"))
        if not layer.in_time:
            out.print(
                escape(f"CLOCKS {layer.name}: {layer.clocks:,}, expected {layer.expected_clocks:,}")
            )
    out.print("PASS: every bit equals the golden model" if report["passed"] else "FAIL")


def _notes(layers: Sequence[LayerRun], names: Sequence[str], first_rows: int | None) -> list[str]:
    """What the figures do not say."""
    notes = []
    corrections = sum(layer.corrections for layer in layers)
    scaled = sum(layer.row_scales for layer in layers)
    if corrections or scaled:
        parts = [f"row scales of {scaled} layers"] if scaled else []
        parts += [f"{corrections:,} corrections"] if corrections else []
        notes.append(f"{' and '.join(parts)} are applied by the RTL, too")
    waiting = [layer.name for layer in layers if not layer.hidden]
    if waiting:
        notes.append(
            f"in {len(waiting)} layers some tiles waited for the corrections of the one before, so "
            f"more clocks than expected are no error there; the first: {waiting[0]}"
        )
    if first_rows is not None:
        notes.append(f"only the first {first_rows} rows of each layer went through the RTL")
    unused = [name for name in names if name not in {layer.name for layer in layers}]
    if unused:
        notes.append(
            f"{len(unused)} of {len(names)} tensors had no input in this text; the first: "
            f"{unused[0]}"
        )
    return notes


def sim_matmul(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint that sop quantize wrote.", show_default=False)
    ],
    model: Annotated[
        str,
        typer.Option(
            help="The model it was made from: GGUF file, Hugging Face folder, hub name, or "
            "`embedded`."
        ),
    ] = "embedded",
    tensors: Annotated[
        list[str] | None,
        typer.Option(
            "--tensors",
            "-t",
            help="Glob of names of quantized tensors; may be repeated. Default: those of decoder "
            "block 0.",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(help="Run the model on this many tokens of the text.")
    ] = 64,
    rows: Annotated[int, typer.Option(help="Rows of the tile, which are output channels.")] = 16,
    columns: Annotated[int, typer.Option(help="Columns of the tile, which are tokens.")] = 16,
    activations: Annotated[
        str, typer.Option(help="Format of the activations, such as INT8^16sUE8M0.")
    ] = DEFAULT_ACTIVATION_FORMAT,
    simulator: Annotated[
        str, typer.Option("--sim", help=f"Simulator: {' or '.join(SIMULATORS)}.")
    ] = "verilator",
    output: OutputOption = "float32",
    first_rows: Annotated[
        int | None,
        typer.Option(help="Only this many rows of each layer through the RTL, the rest by golden."),
    ] = None,
    text: TextOption = None,
    window: WindowOption = None,
    skip_tokens: SkipTokensOption = DEFAULT_SKIP_TOKENS,
    bos: BosOption = "auto",
    inject_fault: Annotated[
        str | None,
        typer.Option(
            metavar="KIND:POSITION:BIT",
            help="Flip one bit of the first layer between golden model and RTL, to see the check "
            "fail: index:12345:2, scale:777:0, activation:5:6, correction:3:4.",
        ),
    ] = None,
    build: Annotated[Path, typer.Option(help="Folder for builds, logs and waveforms.")] = Path(
        "build/sim"
    ),
    as_json: JsonOption = False,
) -> None:
    """Run a model with layers computed by the RTL, every output bit compared with the golden model.

    Needs the extra `llm`. The real input of each layer is quantized and goes with the checkpoint's
    weights through LUTs, tile, row scales and corrections, and the model goes on with what comes
    out. Layers that are not named have the model's own weights. Exit code 1 and a waveform if a bit
    or a clock differs.

    Example: `sop sim-matmul model.sop.safetensors --tensors 'blk.3.*' --tokens 64`
    """  # fmt: skip
    start = time.perf_counter()
    fmt = activations_option(activations)
    choice("output", output, OUTPUTS)
    if first_rows is not None and first_rows < 1:
        raise InputError(f"--first-rows must be at least 1, not {first_rows}")
    fault = None if inject_fault is None else parse_fault(inject_fault, FAULT_KINDS)
    require_simulator(simulator, build)
    checked_folder(build, [model])
    for package in ("torch", "transformers"):
        require(package)
    prose = default_text() if text is None else read_text(text)
    settings = TileSettings(rows, columns, fmt, simulator, build, output)
    with ExitStack() as stack:
        opened = stack.enter_context(Checkpoint(checkpoint))
        progress.print(escape(f"loading {model}"), soft_wrap=True)
        loaded = open_torch_model(model)
        warning = other_model(opened, loaded.path, lambda: loaded.sha256)
        if warning:
            warn(warning)
        names = choose_layers(opened, loaded, tensors)
        tiles = tiles_of(opened, names, settings)
        windows = cut_windows(
            loaded, prose, tokens=tokens, window=window, skip_tokens=skip_tokens, bos=bos
        )
        progress.print(
            escape(
                f"layers: {len(names)}, tokens: {windows.tokens:,}, tile: {rows} x {columns}; "
                f"building for {simulator}"
            ),
            soft_wrap=True,
        )
        simulation = MatmulSimulation(
            opened, loaded, names, settings, tiles, first_rows=first_rows, fault=fault,
            on_step=stack.enter_context(shown_steps()),
        )  # fmt: skip
        simulation.run(windows)
    layers = list(simulation.layers.values())
    if not layers:
        raise InputError(f"{checkpoint}: no tensor that was named had an input in this text")
    report = {
        "passed": all(layer.passed for layer in layers),
        "checkpoint": str(checkpoint),
        "model": str(model),
        "text": prose.name,
        "skip_tokens": skip_tokens,
        "tokens": windows.tokens,
        "rows": rows,
        "columns": columns,
        "activations": fmt.name,
        "output": output,
        "simulator": simulator,
        "seconds": time.perf_counter() - start,
        "totals": _totals(layers, rows * columns),
        "warnings": [warning] if warning else [],
        "notes": _notes(layers, names, first_rows),
        "layers": [_layer_facts(layer, rows * columns) for layer in layers],
    }
    if as_json:
        print_json(report)
    else:
        _print_report(report, layers)
    if not report["passed"]:
        raise typer.Exit(EXIT_MISMATCH)
