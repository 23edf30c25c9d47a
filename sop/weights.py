"""One way to read the weights of a checkpoint and of a model file: name to float32 array."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from golden.checkpoint import METADATA_KEY, Checkpoint, reconstruct
from golden.errors import InputError
from sop.models import TensorInfo, open_model

__all__ = ["FLOAT_DTYPES", "Weights", "checkpoint_weights", "open_weights"]

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
"""Types of the safetensors format that become float32; others are no weights."""


@dataclass(frozen=True)
class Weights:
    """The tensors of an open checkpoint or model file; made by :func:`open_weights`.

    Attributes
    ----------
    path : Path
    tensors : Mapping of str to TensorInfo
        All tensors by name. The source type of a quantized tensor of a checkpoint is the name of
        its format.
    read : callable
        Gives the weights of a name as a float32 array of the shape in `tensors`; raises InputError
        if they are broken or cannot become float32.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    read: Callable[[str], NDArray[np.float32]]


@contextmanager
def open_weights(path: str | Path) -> Iterator[Weights]:
    """Open a checkpoint, or whatever :func:`sop.models.open_model` opens.

    Parameters
    ----------
    path : str or Path
        A file with the metadata of a checkpoint is read as one, under any name.

    Raises
    ------
    InputError
        If it is neither, or its header is broken.
    OSError
        If the file cannot be opened.
    """
    path = Path(path)
    if _may_be_checkpoint(path):
        with Checkpoint(path) as checkpoint:
            yield _of_checkpoint(checkpoint)
    else:
        with open_model(path) as model:
            yield Weights(path, model.tensors, model.read)


def _may_be_checkpoint(path: Path) -> bool:
    """Whether a file has the metadata of a checkpoint, or is too broken to say."""
    if not path.is_file():
        return False
    opener: Any = safetensors.safe_open  # its stubs are not annotated
    try:
        with opener(str(path), framework="numpy") as file:
            return METADATA_KEY in (file.metadata() or {})
    except safetensors.SafetensorError:
        return path.suffix == ".safetensors"  # Checkpoint says where it is broken


def _of_checkpoint(checkpoint: Checkpoint) -> Weights:
    infos = {}
    for name in checkpoint.names:
        quantized = checkpoint.info(name)
        infos[name] = TensorInfo(name, quantized.shape, quantized.format.name)
    for name in checkpoint.raw_names:
        raw = checkpoint.raw_info(name)
        infos[name] = TensorInfo(name, raw.shape, raw.dtype)

    def read(name: str) -> NDArray[np.float32]:
        return checkpoint_weights(checkpoint, name)

    return Weights(checkpoint.path, MappingProxyType(infos), read)


def checkpoint_weights(checkpoint: Checkpoint, name: str) -> NDArray[np.float32]:
    """Weights of one tensor of a checkpoint, quantized or raw.

    Returns
    -------
    weights : float32 array
        Of the shape in the file, C-contiguous.

    Raises
    ------
    InputError
        If the tensor is broken, or a raw one is not of a type in :data:`FLOAT_DTYPES` or holds a
        float64 value too large for float32.
    """
    where = f"{checkpoint.path}: tensor {name!r}"
    if name in checkpoint.raw_names:
        return _raw_weights(checkpoint, name, where)
    stored = checkpoint.read(name)
    try:
        return np.ascontiguousarray(reconstruct(stored))
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _raw_weights(checkpoint: Checkpoint, name: str, where: str) -> NDArray[np.float32]:
    dtype = checkpoint.raw_info(name).dtype
    if dtype not in FLOAT_DTYPES:
        expected = ", ".join(FLOAT_DTYPES)
        raise InputError(f"{where}: field 'dtype': {dtype}, expected one of {expected}")
    values = checkpoint.read_raw(name)
    with np.errstate(over="ignore"):
        weights: NDArray[np.float32] = values.astype(np.float32)
    if dtype == "F64" and (np.isinf(weights) & np.isfinite(values)).any():
        raise InputError(f"{where}: field 'data': a float64 value is too large for float32")
    return weights
