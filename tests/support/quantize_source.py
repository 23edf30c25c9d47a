"""Quantize a folder made up for one test, by the command."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from golden.errors import InputError
from tests.support.commands import json_of

FORMAT = "NF4sUE4M4"
NAME = "model.layers.0.mlp.up_proj.weight"
OTHER = "model.layers.0.mlp.down_proj.weight"
F8 = ml_dtypes.float8_e4m3fn

Arrays = dict[str, NDArray[Any]]


def normal(*shape: int, seed: int = 3) -> NDArray[np.float32]:
    return (0.05 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def folder(path: Path, tensors: Arrays, **config: object) -> Path:
    """A Hugging Face folder."""
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def quantize(source: Path, *options: object) -> dict[str, Any]:
    """Run ``sop quantize`` into out.safetensors beside the source; what it says as JSON."""
    output = source.parent / "out.safetensors"
    arguments = ["-o", output, "-f", FORMAT, "-j", 1, *options]
    found: dict[str, Any] = json_of("quantize", source, *arguments)
    return found


def refused(source: Path, message: str, *options: object) -> None:
    """The run ends with this message, before anything is made."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(InputError, match=message):
        quantize(source, *options)
    assert sorted(source.parent.iterdir()) == before


GOOD: Arrays = {OTHER: normal(64, 64)}
E2M1_VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]  # OCP Microscaling Formats v1.0, table 5


def packed(experts: int, outputs: int, inputs: int, seed: int) -> tuple[Any, Any, Any]:
    """Blocks and scales, and the weights [experts, inputs, outputs] of them, one by one."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16)).astype(np.uint8)
    scales = rng.integers(118, 126, (experts, outputs, inputs // 32)).astype(np.uint8)
    weights = np.zeros((experts, inputs, outputs), np.float32)
    for expert, row, column in np.ndindex(experts, outputs, inputs):
        group, place = divmod(column, 32)
        code = int(blocks[expert, row, group, place // 2]) >> 4 * (place % 2) & 15
        value = (-1) ** (code >> 3) * E2M1_VALUES[code & 7]
        weights[expert, column, row] = value * 2.0 ** (int(scales[expert, row, group]) - 127)
    return blocks, scales, weights


def left_out(found: dict[str, Any]) -> dict[str, list[str]]:
    return {group["reason"]: group["tensors"] for group in found["left_out"]}
