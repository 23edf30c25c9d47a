"""``sop decode``."""

from pathlib import Path
from typing import Annotated

import typer

from golden.checkpoint import Checkpoint
from golden.errors import InputError
from sop.checkpoints.decode import decode_checkpoint
from sop.files.safetensors_file import DTYPES
from sop.shared.console import ForceOption, JsonOption, print_json
from sop.shared.output import DECODED, writing_file
from sop.shared.progress import shown_progress

__all__ = ["decode"]


def decode(
    checkpoint: Annotated[Path, typer.Argument(metavar="FILE", help="Checkpoint.")],
    output: Annotated[
        Path, typer.Option("--out", "-o", help="File to write, with the suffix .safetensors.")
    ],
    dtype: Annotated[
        str, typer.Option(help=f"Type of the decoded weights: {' or '.join(DTYPES)}.")
    ] = "float32",
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint's weights as an ordinary safetensors file.

    Quantized tensors are decoded, corrections included; the others are copied as they are.

    Example: `sop decode quantized.safetensors -o decoded.safetensors --dtype bfloat16`
    """
    if output.suffix != ".safetensors":
        raise InputError(f"--out {output}: the suffix must be .safetensors")
    with (
        Checkpoint(checkpoint) as opened,
        writing_file(output, DECODED, [checkpoint], force=force) as target,
        shown_progress("tensors") as report,
    ):
        decode_checkpoint(opened, target, dtype, report)
        counts = {"decoded": len(opened.names), "copied": len(opened.raw_names)}
    if as_json:
        print_json({"output": str(output), **counts})
    else:
        print(f"{counts['decoded']} tensors decoded, {counts['copied']} copied")
        print(output)
