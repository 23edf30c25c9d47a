"""From a checkpoint to a file whose planes are in the order in which a tile takes them."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.checkpoint import Checkpoint, StoredTensor
from golden.container import RawInfo
from golden.container_file import OutgoingTensor, array_bytes
from golden.corrections import column_dtype
from golden.errors import InputError
from golden.packing import plane_bytes
from golden.tile_order import TileCorrections, tile_corrections, tile_planes
from sop.files.safetensors_file import write_safetensors
from sop.shared.marks import TILE_ORDER_KEY
from sop.shared.progress import Report

__all__ = ["export_tiles"]

_VERSION = 1
_MOST_ROWS = 1 << 16  # row numbers in a tile are stored as 16 bits

# Of each field of corrections: its type, and what it is of the corrections of one tile.
_OF_TILE: dict[str, tuple[str, Callable[[TileCorrections], Any]]] = {
    "column_counts": ("<u4", lambda part: [len(part.columns)]),
    "columns": ("", lambda part: part.columns),
    "counts": ("<u4", lambda part: [len(part.values)]),
    "rows": ("<u2", lambda part: part.rows),
    "slots": ("", lambda part: part.slots),
    "values": ("<u2", lambda part: part.values),
}


def export_tiles(checkpoint: Checkpoint, path: Path, tile_rows: int, report: Report) -> None:
    """Write all quantized tensors in tile order; memory holds one tensor.

    Parameters
    ----------
    checkpoint : Checkpoint
    path : Path
        File to write or replace.
    tile_rows : int
        R, 1 to 65,536.
    report : callable
        See :data:`sop.shared.progress.Report`; counts arrays.

    Raises
    ------
    InputError
        If there is no such tile, the checkpoint has no quantized tensor, or one is broken.
    """
    if not 1 <= tile_rows <= _MOST_ROWS:
        raise InputError(f"--tile-rows must be 1 to {_MOST_ROWS:,}, not {tile_rows}")
    if not checkpoint.names:
        raise InputError(f"{checkpoint.path}: no tensor is quantized")
    arrays: list[OutgoingTensor] = []
    facts: dict[str, Any] = {}
    for name in checkpoint.names:
        stored = checkpoint.read(name)
        facts[name] = _facts(stored, tile_rows)
        arrays += _arrays(checkpoint, name, stored, tile_rows)
    about = {"version": _VERSION, "tile_rows": tile_rows, "tensors": facts}
    write_safetensors(path, arrays, report, metadata={TILE_ORDER_KEY: json.dumps(about)})


def _facts(stored: StoredTensor, tile_rows: int) -> dict[str, Any]:
    """What planes of a tensor do not say themselves."""
    tensor, fmt = stored.tensor, stored.tensor.format
    return {
        "format": fmt.name,
        "lut_entry": fmt.hif.name if fmt.codebooks else None,
        "shape": list(tensor.shape),
        "tiles": -(-tensor.shape[0] // tile_rows),
        "blocks": tensor.scale_words.shape[1],
        "block_size": fmt.block_size,
        "index_bits": fmt.index_bits,
        "scale_word_bits": fmt.word.width,
        "layer_exponent": tensor.layer_exponent,
    }


def _arrays(
    checkpoint: Checkpoint, name: str, stored: StoredTensor, tile_rows: int
) -> list[OutgoingTensor]:
    """Everything that is written of a tensor; the bytes are made when their turn comes."""
    tensor, fmt = stored.tensor, stored.tensor.format
    rows, tiles = tensor.shape[0], -(-tensor.shape[0] // tile_rows)
    filled = tiles * tile_rows
    scales = filled * tensor.scale_words.shape[1] if fmt.block_size else 1
    sizes: dict[str, tuple[str, tuple[int, ...]]] = {
        "indices": (
            "U8", (plane_bytes(filled * (tensor.indices.size // rows), fmt.index_bits),)
        ),
        "scales": ("U8", (plane_bytes(scales, fmt.word.width),)),
    }  # fmt: skip
    if tensor.luts:
        sizes["luts"] = ("U8", (len(tensor.luts), fmt.lut_entries))
    if tensor.row_scales is not None:
        sizes["row_scales"] = ("BF16", (filled,))
    if stored.corrections is not None:
        for field, part in _corrections(stored, tile_rows).items():
            stored_as = "BF16" if field == "values" else f"U{8 * part.itemsize}"
            sizes[f"corrections.{field}"] = stored_as, part.shape

    def array(field: str, dtype: str, shape: tuple[int, ...]) -> OutgoingTensor:
        made = partial(_bytes, checkpoint, name, field, tile_rows)
        return OutgoingTensor(f"{name}.{field}", RawInfo(dtype, shape), lambda: [made()])

    return [array(field, *size) for field, size in sizes.items()]


def _bytes(checkpoint: Checkpoint, name: str, field: str, tile_rows: int) -> memoryview:
    """Content of an array."""
    stored = checkpoint.read(name)
    tensor = stored.tensor
    made: NDArray[Any]
    if field in ("indices", "scales"):
        made = tile_planes(tensor, tile_rows)[field == "scales"]
    elif field == "luts":
        made = np.array([lut.codes for lut in tensor.luts], dtype=np.uint8)
    elif field == "row_scales":
        assert tensor.row_scales is not None
        made = np.pad(tensor.row_scales, (0, -len(tensor.row_scales) % tile_rows)).astype("<u2")
    else:
        made = _corrections(stored, tile_rows)[field.removeprefix("corrections.")]
    return array_bytes(made)


def _corrections(stored: StoredTensor, tile_rows: int) -> dict[str, NDArray[Any]]:
    """Corrections of all tiles, one after the other."""
    assert stored.corrections is not None
    parts = tile_corrections(stored.corrections, tile_rows)
    column = np.dtype(column_dtype(stored.corrections.shape[1])).newbyteorder("<")
    return {
        name: np.concatenate([np.asarray(of_tile(part)) for part in parts]).astype(
            stored_as or column
        )
        for name, (stored_as, of_tile) in _OF_TILE.items()
    }
