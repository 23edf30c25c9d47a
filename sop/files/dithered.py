"""A model whose weights nobody quantized before, made of one that somebody did.

The embedded SmolLM2-135M comes in Q4_1: each block of 32 weights lies on a grid of 16 levels, which
a quantizer's tables can find again, so that its errors say little about other models. Uniform noise
as wide as a step of that grid leaves no trace of it. The result is another, slightly worse language
model, which is its own reference.
"""

import hashlib
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from sop.files.gguf_file import GgufFile
from sop.shared.console import progress

__all__ = ["BLOCK", "dither", "dithered_copy", "write_dithered"]

BLOCK = 32
"""Weights of a block of Q4_1 and of most other formats of llama.cpp."""

_STEPS = 15  # between the least and the greatest weight of a block
_RANDOM_BITS = 24  # as many as a float32 holds exactly
_LINEAR = re.compile(r"blk\.\d+\.(attn_(q|k|v|output)|ffn_(gate|up|down))\.weight")
_VERSION = 1  # of what :func:`dither` does, in the name of its folder


def dither(weights: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    """Weights with uniform noise that is as wide as one of 15 steps of their block's range.

    Parameters
    ----------
    weights : float32 array, shape (rows, columns)
        Columns are a multiple of :data:`BLOCK`.
    name : str
        Seeds the noise, so that every tensor has its own, and the same on every machine: raw words
        of Philox, whose stream NumPy guarantees, and single float32 operations.

    Returns
    -------
    dithered : float32 array, same shape
    """
    blocks = weights.reshape(-1, BLOCK)
    steps = (blocks.max(axis=1) - blocks.min(axis=1)) / np.float32(_STEPS)
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw(blocks.size) >> np.uint64(64 - _RANDOM_BITS)
    noise = words.astype(np.float32) / np.float32(1 << _RANDOM_BITS) - np.float32(0.5)
    result: NDArray[np.float32] = blocks + noise.reshape(blocks.shape) * steps[:, None]
    return result.reshape(weights.shape)


def dithered_copy(source: Path) -> Path:
    """Path of the copy of a GGUF file with dithered linear layers; made where it is not there yet.

    It lies in the user's cache (``XDG_CACHE_HOME``, or ``~/.cache``), and is complete or absent;
    that of SmolLM2-135M has 244 MB.

    Raises
    ------
    InputError
        As :func:`write_dithered`.
    OSError
        If it cannot be written.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache, "scaled-outer-product", f"dithered-{_VERSION}")
    path = folder / f"{source.stem}.dithered.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        progress.print(f"making {path}, once")
        with TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary, path.name)
            write_dithered(source, made)
            os.replace(made, path)
    return path


def write_dithered(source: Path, path: Path) -> None:
    """Write a GGUF file with the linear layers of another one dithered and stored as bfloat16.

    Everything else is copied. Equal content gives equal bytes with the same version of ``gguf``.

    Parameters
    ----------
    source : Path
        GGUF file of a language model with known names.
    path : Path
        File to write.

    Raises
    ------
    InputError
        If the source is broken, or has no block with known names.
    OSError
        If a file cannot be read or written.
    """
    import gguf

    file = GgufFile(source)
    try:
        reader = gguf.GGUFReader(source)
        writer = gguf.GGUFWriter(path, str(file.metadata.get("general.architecture")))
        for field in reader.fields.values():
            if field.name != "general.architecture" and not field.name.startswith("GGUF."):
                kind, *inner = field.types
                writer.add_key_value(field.name, field.contents(), kind, *inner[-1:])
        stored = {tensor.name: tensor for tensor in reader.tensors}
        for name in file.tensors:
            if _LINEAR.fullmatch(name):
                made = gguf.quants.quantize(
                    dither(file.read_tensor(name), name), gguf.GGMLQuantizationType.BF16
                )
                writer.add_tensor(name, made, raw_dtype=gguf.GGMLQuantizationType.BF16)
            else:
                old = stored[name]
                writer.add_tensor(name, old.data, raw_dtype=old.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    finally:
        file.close()
