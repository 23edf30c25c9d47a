"""``sop export --tile-rows``: everything is there, in the order of a tile, and back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file
from typer.testing import CliRunner

from golden.checkpoint import CheckpointWriter, StoredTensor
from golden.corrections import Corrections
from golden.notation import parse_format
from golden.quantize import quantize
from golden.tile_order import TileCorrections, untile_corrections, untile_planes
from sop.cli import app

Arrays = dict[str, NDArray[Any]]

TENSORS = {
    "pair": ("BOF4-NF4sRS1E2M4", (10, 70), 0.1),
    "atoms": ("E2M3^32sUE4M4", (3, 33), 0.0),
    "one_scale": ("E4M3^0sUE8M0", (7, 20), None),
}


def stored_tensor(name: str, shape: tuple[int, int], density: float | None) -> StoredTensor:
    rng = np.random.default_rng(1)
    values = rng.standard_normal(shape).astype(np.float32)
    tensor = quantize(values, parse_format(name))
    if density is None:
        return StoredTensor(tensor, None)
    mask = rng.random(shape) < density
    return StoredTensor(tensor, Corrections.from_mask(mask, values))


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiles") / "model.safetensors"
    with CheckpointWriter(path, {}) as writer:
        for name, what in TENSORS.items():
            stored = stored_tensor(*what)
            writer.add(name, stored.tensor, stored.corrections, "F32")
        norm = np.ones(4, np.float32)
        writer.add_raw("norm", "F32", norm.shape, [norm.tobytes()])
    return path


def corrections_of(arrays: Arrays, name: str) -> list[TileCorrections]:
    """Cut the arrays of corrections into those of each tile."""
    fields = {
        field: arrays[f"{name}.corrections.{field}"]
        for field in ("column_counts", "columns", "counts", "rows", "slots", "values")
    }
    cuts = {what: np.cumsum(fields[what])[:-1] for what in ("column_counts", "counts")}
    columns = np.split(fields["columns"], cuts["column_counts"])
    rows, slots, values = (
        np.split(fields[field], cuts["counts"]) for field in ("rows", "slots", "values")
    )
    return [
        TileCorrections(
            part, row.astype(np.int64), slot.astype(np.int64), value.view(np.uint16),
            np.zeros(len(row), np.int64),
        )
        for part, row, slot, value in zip(columns, rows, slots, values, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("tile_rows", [1, 4, 16])
def test_there_and_back(checkpoint: Path, tile_rows: int, tmp_path: Path) -> None:
    path = tmp_path / "tiles.safetensors"
    result = run(checkpoint, "-o", path, "--tile-rows", tile_rows, "--json")
    assert result.exit_code == 0, result.output
    notes = ["1 tensors that are not quantized were left out"]
    assert json.loads(result.stdout) == {"output": str(path), "notes": notes}
    with safe_open(path, "numpy") as file:
        about = json.loads(file.metadata()["sop_tile_order"])
    assert (about["version"], about["tile_rows"]) == (1, tile_rows)
    assert set(about["tensors"]) == set(TENSORS)
    arrays = load_file(path)
    assert "norm" not in arrays
    for name, what in TENSORS.items():
        stored = stored_tensor(*what)
        tensor, facts = stored.tensor, about["tensors"][name]
        empty = replace(
            tensor,
            indices=np.zeros_like(tensor.indices),
            scale_words=np.zeros_like(tensor.scale_words),
        )
        back = untile_planes(empty, tile_rows, arrays[f"{name}.indices"], arrays[f"{name}.scales"])
        assert (back.indices == tensor.indices).all()
        assert (back.scale_words == tensor.scale_words).all()
        assert (facts["shape"], facts["format"]) == ([*tensor.shape], tensor.format.name)
        assert facts["tiles"] == -(-tensor.shape[0] // tile_rows)
        assert facts["layer_exponent"] == tensor.layer_exponent
        for number, lut in enumerate(tensor.luts):
            assert arrays[f"{name}.luts"][number].tolist() == [*lut.codes]
        if tensor.row_scales is not None:
            scales = arrays[f"{name}.row_scales"]
            assert scales.dtype == ml_dtypes.bfloat16
            assert len(scales) == facts["tiles"] * tile_rows
            filled = np.pad(tensor.row_scales, (0, len(scales) - tensor.shape[0]))
            assert (scales.view(np.uint16) == filled).all()
        if stored.corrections is not None:
            tiles = corrections_of(arrays, name)
            again = untile_corrections(tiles, tensor.shape, tile_rows)
            for field in ("indptr", "columns", "values"):
                before, after = (getattr(part, field) for part in (stored.corrections, again))
                assert (before == after).all()
        else:
            assert not any(key.startswith(f"{name}.corrections") for key in arrays)


def test_the_same_bytes_and_no_other_file_is_replaced(checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiles.safetensors"
    arguments = (checkpoint, "-o", path, "--tile-rows", 4)
    assert run(*arguments).exit_code == 0
    first = path.read_bytes()
    assert run(*arguments).exit_code == 0  # one of its own is replaced
    assert path.read_bytes() == first
    path.write_bytes(b"mine")
    refused = run(*arguments)
    assert "is not a file of `sop export --tile-rows`" in str(refused.exception)
    assert path.read_bytes() == b"mine"
    assert run(*arguments, "--force").exit_code == 0
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model or --tile-rows is needed"),
        (["--tile-rows", 0], "--tile-rows must be 1 to 65,536, not 0"),
        (["--tile-rows", 70_000], "--tile-rows must be 1 to 65,536, not 70000"),
        (["--tile-rows", 4, "--model", "m.gguf"], "--tile-rows writes what the checkpoint has"),
        (["--tile-rows", 4, "--dtype", "float32"], "--tile-rows writes what the checkpoint has"),
        (["--model", "m.gguf", "--force"], "--force is for --tile-rows"),
    ],
)
def test_options_that_do_not_go_together(
    checkpoint: Path, arguments: list[object], message: str, tmp_path: Path
) -> None:
    result = run(checkpoint, "-o", tmp_path / "out.safetensors", *arguments)
    assert message in str(result.exception) + result.output
    assert not (tmp_path / "out.safetensors").exists()


def test_the_suffix_is_that_of_the_file(checkpoint: Path, tmp_path: Path) -> None:
    result = run(checkpoint, "-o", tmp_path / "out", "--tile-rows", 4)
    assert "the suffix must be .safetensors" in str(result.exception) + result.output
