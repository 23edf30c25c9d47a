"""``sop export``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from golden.checkpoint import Checkpoint
from sop.files.safetensors_file import DTYPES
from sop.llm.export import export_checkpoint
from sop.shared.console import JsonOption, print_json, progress
from sop.shared.progress import shown_progress

__all__ = ["export"]


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="FILE", help="Checkpoint.")],
    folder: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to make; must not exist or be empty.")
    ],
    model: Annotated[
        Path,
        typer.Option(
            help="The model that was quantized: Hugging Face folder or GGUF file (llama; needs the "
            "extra `llm`)."
        ),
    ],
    dtype: Annotated[
        str, typer.Option(help=f"Type of the weights: {' or '.join(DTYPES)}.")
    ] = "float32",
    allow_other_model: Annotated[
        bool,
        typer.Option(
            "--allow-other-model",
            help="Take a model with other weights than those that were quantized.",
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a folder that Hugging Face's transformers loads as a model.

    The weights are those of the checkpoint, decoded; the rest comes from the model.

    Example: `sop export quantized.safetensors -o quantized_hf --model model.gguf`
    """
    with Checkpoint(checkpoint) as opened, shown_progress("tensors") as report:
        notes = export_checkpoint(
            opened, model, folder, dtype, report, allow_other_model=allow_other_model
        )
    for note in notes:
        progress.print(escape(f"note: {note}"), soft_wrap=True)
    if as_json:
        print_json({"output": str(folder), "notes": list(notes)})
    else:
        print(folder)
