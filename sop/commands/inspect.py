"""``sop inspect``."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from golden.checkpoint import Checkpoint
from sop.checkpoints.inspection import TensorUse, checkpoint_sizes, inspect_tensors
from sop.shared.console import JsonOption, out, print_json, print_rows
from sop.shared.progress import shown_progress
from sop.shared.shares import percent

__all__ = ["inspect"]


def _summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the header says of the file as a whole, as JSON values."""
    sizes = asdict(checkpoint_sizes(checkpoint))
    return {
        "file": str(checkpoint.path),
        "config": checkpoint.config,
        "config_hash": checkpoint.config_hash,
        "calibration": checkpoint.calibration,
        "quantized_tensors": len(checkpoint.names),
        "raw_tensors": len(checkpoint.raw_names),
        "weights": sizes.pop("weights"),
        "stored_bits_per_weight": (
            float(checkpoint.stored_bits_per_weight) if checkpoint.names else None
        ),
        "bytes": sizes,
    }


def _print_summary(summary: dict[str, Any]) -> None:
    bits = summary["stored_bits_per_weight"]
    lines = {
        "file": summary["file"],
        "config": json.dumps(summary["config"]),
        "config hash": summary["config_hash"],
        "calibration": json.dumps(summary["calibration"]) if summary["calibration"] else "none",
        "weights": f"{summary['weights']:,} in {summary['quantized_tensors']} quantized tensors",
        "stored bits per weight": "-" if bits is None else f"{bits:.4f}",
        "raw tensors": str(summary["raw_tensors"]),
    }
    lines |= {f"bytes of {field}": f"{size:,}" for field, size in summary["bytes"].items()}
    for name, value in lines.items():
        out.print(escape(f"{name}: {value}"), soft_wrap=True)
    out.print()


def _percent(share: float | None) -> str:
    return "-" if share is None else percent(share)


def _row(use: TensorUse) -> list[str]:
    none = use.corrections is None
    return [
        use.name,
        f"{use.shape[0]}x{use.shape[1]}",
        f"{use.format} {use.hif}" if use.luts else use.format,
        f"{float(use.stored_bits_per_weight):.4f}",
        _percent(use.metabit_share),
        _percent(use.zero_block_share),
        "-" if none else f"{use.corrections:,}",
        _percent(None if none else use.correction_share),
        str(use.layer_exponent),
    ]


def _print_tensors(tensors: list[TensorUse], codebooks: bool) -> None:
    columns = ["tensor", "shape", "format", "bits/weight", "metabit 1 %", "zero blocks %",
               "corrections", "of weights %", "layer exponent"]  # fmt: skip
    print_rows("quantized tensors", columns, [_row(use) for use in tensors])
    out.print()
    used = Counter((use.format_id or "none", use.hardware_format or "-") for use in tensors)
    rows = [[format_id, text, str(count)] for (format_id, text), count in sorted(used.items())]
    print_rows("formats as hardware names them", ["FORMAT_ID", "format", "tensors"], rows)
    if codebooks:
        out.print()
        rows = [
            [use.name, str(position), " ".join(map(str, lut))]
            for use in tensors
            for position, lut in enumerate(use.luts)
        ]
        print_rows("LUT values", ["tensor", "LUT", "values"], rows)


def inspect(
    checkpoint: Annotated[Path, typer.Argument(metavar="FILE", help="Checkpoint.")],
    tensors: Annotated[
        str | None,
        typer.Option("--tensors", "-t", help="Glob of tensor names to read. Default: all."),
    ] = None,
    codebooks: Annotated[
        bool, typer.Option("--codebooks", help="Print the LUT values of each tensor.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a checkpoint holds: settings, sizes, and how each tensor uses its format.

    Shares of blocks count whole blocks; bits per weight include LUTs, padding and corrections.

    Example: `sop inspect quantized.safetensors --tensors 'blk.3.*' --codebooks`
    """
    with Checkpoint(checkpoint) as opened, shown_progress("tensors") as report:
        summary = _summary(opened)
        uses = list(inspect_tensors(opened, tensors, report))
    if as_json:
        listing = [use.as_dict(codebooks=codebooks) for use in uses]
        print_json({**summary, "tensors": listing})
    else:
        _print_summary(summary)
        _print_tensors(uses, codebooks)
