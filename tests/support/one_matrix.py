"""A model of one matrix, and its checkpoint."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from sop.quantizing.quantization import quantize_model
from sop.quantizing.settings import Settings

LAYER = "model.layers.0.mlp.up_proj.weight"
FAST = ["-f", "NF4sUE4M4", "--effort", "fast", "-j", "1"]


def one_matrix(folder: Path) -> Path:
    """A model of one matrix, in a folder of its own."""
    folder.mkdir()
    weights = np.random.default_rng(3).standard_normal((16, 32)).astype(np.float32)
    save_file({LAYER: weights}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder / "model.safetensors"


def quantized(source: Path, path: Path) -> Path:
    """The checkpoint of that model."""
    quantize_model(source, [LAYER], path, Settings("NF4sUE4M4", None, effort="fast"))
    return path
