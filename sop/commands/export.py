"""``sop export``."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from golden.checkpoint import Checkpoint
from golden.errors import InputError
from sop.checkpoints.tile_order import export_tiles
from sop.files.safetensors_file import DTYPES
from sop.llm.export import export_checkpoint
from sop.shared.console import ForceOption, JsonOption, print_json, progress
from sop.shared.output import TILED, writing_file
from sop.shared.progress import shown_progress

__all__ = ["export"]


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="FILE", help="Checkpoint.")],
    output: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Folder to make; must not exist or be empty. With --tile-rows a file, with the "
            "suffix .safetensors.",
        ),
    ],
    model: Annotated[
        Path | None,
        typer.Option(
            help="The model that was quantized: Hugging Face folder or GGUF file (llama; needs the "
            "extra `llm`).",
            show_default=False,
        ),
    ] = None,
    tile_rows: Annotated[
        int | None,
        typer.Option(
            help="Write planes and corrections in the order in which a tile of so many rows takes "
            "them, in place of a model.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help=f"Type of the weights: {' or '.join(DTYPES)}.", show_default="float32"),
    ] = None,
    allow_other_model: Annotated[
        bool,
        typer.Option(
            "--allow-other-model",
            help="Take a model with other weights than those that were quantized.",
        ),
    ] = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a folder that Hugging Face's transformers loads, or planes as a tile takes them.

    The weights of the folder are those of the checkpoint, decoded; the rest comes from the model.

    Example: `sop export quantized.safetensors -o quantized_hf --model model.gguf`

    For hardware: `sop export quantized.safetensors -o tiles.safetensors --tile-rows 16`
    """
    if tile_rows is not None:
        if model is not None or dtype is not None or allow_other_model:
            raise InputError(
                "--tile-rows writes what the checkpoint has: no --model, --dtype or "
                "--allow-other-model"
            )
        notes = _export_tiles(checkpoint, output, tile_rows, force=force)
    elif model is None:
        raise InputError("--model or --tile-rows is needed: what to export")
    elif force:
        raise InputError("--force is for --tile-rows: a folder must not exist or be empty")
    else:
        with Checkpoint(checkpoint) as opened, shown_progress("tensors") as report:
            notes = export_checkpoint(
                opened, model, output, dtype or "float32", report,
                allow_other_model=allow_other_model,
            )  # fmt: skip
    for note in notes:
        progress.print(escape(f"note: {note}"), soft_wrap=True)
    if as_json:
        print_json({"output": str(output), "notes": list(notes)})
    else:
        print(output)


def _export_tiles(checkpoint: Path, output: Path, rows: int, *, force: bool) -> tuple[str, ...]:
    if output.suffix != ".safetensors":
        raise InputError(f"--out {output}: the suffix must be .safetensors")
    with (
        Checkpoint(checkpoint) as opened,
        writing_file(output, TILED, [checkpoint], force=force) as target,
        shown_progress("arrays") as report,
    ):
        export_tiles(opened, target, rows, report)
        left = len(opened.raw_names)
    return (f"{left} tensors that are not quantized were left out",) if left else ()
