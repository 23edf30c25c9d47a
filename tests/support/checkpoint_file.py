"""A small checkpoint with everything in it, and a model folder that it could be made of."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from golden.checkpoint import CheckpointWriter, StoredTensor, reconstruct
from golden.corrections import Corrections
from golden.formats import HIF7, HIF8T, HifFormat
from golden.notation import parse_format
from golden.quantize import quantize
from golden.tensor import QuantizedTensor, decode


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "q.safetensors")


Arrays = dict[str, NDArray[Any]]


CONFIG = {"format": "mixed", "scale_mode": "search"}
CALIBRATION = {"tokens": 7}


def matrix(rows: int, columns: int, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def quantized(
    name: str, weights: NDArray[np.float32], hif: HifFormat = HIF7
) -> tuple[QuantizedTensor, Corrections | None]:
    return quantize(weights, parse_format(name, hif)), None


def with_corrections(
    name: str, weights: NDArray[np.float32]
) -> tuple[QuantizedTensor, Corrections]:
    tensor, _ = quantized(name, weights)
    residuals = weights - decode(tensor)
    return tensor, Corrections.from_mask(np.abs(residuals) > 0.2, residuals)


WEIGHTS = {
    "blk.0.pair": matrix(6, 40, 1),
    "blk.0.plain": matrix(4, 32, 2),
    "blk.1.atom": matrix(3, 32, 3),
    "blk.1.layer": matrix(5, 7, 4),
    "blk.1.rows": matrix(4, 48, 5),
}
WEIGHTS["blk.0.pair"][2, :16] = 0

QUANTIZED: dict[str, tuple[QuantizedTensor, Corrections | None]] = {
    "blk.0.pair": with_corrections("BOF4-NF4sS1E5M5", WEIGHTS["blk.0.pair"]),
    "blk.0.plain": quantized("NF4sUE4M4", WEIGHTS["blk.0.plain"]),
    "blk.1.atom": quantized("E2M3^32sUE8M0", WEIGHTS["blk.1.atom"]),
    "blk.1.layer": quantized("E4M3^0sUE8M0", WEIGHTS["blk.1.layer"]),
    "blk.1.rows": quantized("NF4-SH4sRS1E2M4", WEIGHTS["blk.1.rows"], HIF8T),
}
RAW: Arrays = {
    "ids": np.arange(5, dtype=np.int64),
    "norm": np.array([1.0, -0.5, 3.14159265], np.float32),
    "small": np.array([[0.1, 2.0]], ml_dtypes.bfloat16),
}
RAW_TYPES = {"ids": "I64", "norm": "F32", "small": "BF16"}


def write_checkpoint(
    path: Path,
    tensors: dict[str, tuple[QuantizedTensor, Corrections | None]] = QUANTIZED,
    raw: Arrays = RAW,
    config: dict[str, Any] = CONFIG,
    types: dict[str, str] = RAW_TYPES,
) -> Path:
    with CheckpointWriter(path, config, CALIBRATION) as writer:
        for name, (tensor, corrections) in tensors.items():
            writer.add(name, tensor, corrections, "F32")
        for name, array in raw.items():
            writer.add_raw(name, types[name], array.shape, [array.tobytes()])
    return path


def reconstructed(name: str) -> NDArray[np.float32]:
    return reconstruct(StoredTensor(*QUANTIZED[name]))


def source_folder(folder: Path) -> Path:
    """A Hugging Face folder with two weight files, and files that are not to be copied."""
    folder.mkdir()
    names = list(WEIGHTS)
    first = {name: WEIGHTS[name] for name in names[:2]}
    second = {name: WEIGHTS[name] for name in names[2:]} | RAW
    places: dict[str, str] = {}
    for file, arrays in (("1-of-2.safetensors", first), ("2-of-2.safetensors", second)):
        save_file(arrays, folder / file)
        places |= dict.fromkeys(arrays, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    config = {"model_type": "llama", "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt"):
        (folder / name).write_text(name)
    for name in ("modeling.py", "pytorch_model.bin"):
        (folder / name).write_text("not to be copied")
    return folder
