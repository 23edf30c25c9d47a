"""Tensors of one safetensors file, read one at a time as float32."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.checkpoint import METADATA_KEY
from golden.container_file import ContainerFile
from golden.errors import InputError, located
from sop.files.scaled_weights import FP8_TYPES
from sop.files.tensor_info import RawTensor, TensorInfo
from sop.shared.marks import CALIBRATION_KEY

__all__ = ["FLOAT_TYPES", "SafetensorsReader", "as_float32", "metadata_keys", "open_container"]

_NO_MODELS = {
    METADATA_KEY: "is a checkpoint, whose weights are quantized already; sop decode makes a model "
    "of it",
    CALIBRATION_KEY: "is a calibration file, not a model; give the model first, and this "
    "file with --calibration",
}
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
"""Types of the safetensors format that become float32."""


def open_container(path: Path) -> ContainerFile:
    """Open a file that should be a safetensors file.

    Raises
    ------
    InputError
        If it is none; the message names the file.
    """
    with located(f"{path}: not a valid safetensors file"):
        return ContainerFile(path)


def metadata_keys(path: Path) -> frozenset[str] | None:
    """Keys of a file's metadata; None if it is no safetensors file."""
    with suppress(InputError), open_container(path) as file:
        return frozenset(file.metadata)
    return None


class SafetensorsReader:
    """One open safetensors file, whose header was checked.

    Attributes
    ----------
    path : Path
    tensors : dict of str to TensorInfo
        In the order of their data.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_container(path)
        for key, problem in _NO_MODELS.items():
            if key in self._file.metadata:
                self.close()
                raise InputError(f"{path}: {problem}")
        self.tensors = {}
        order = sorted(self._file.entries.items(), key=lambda item: item[1].start)
        for name, entry in order:
            shape, dtype, bits = entry.info.shape, entry.info.dtype, 8 * entry.nbytes
            self.tensors[name] = TensorInfo(
                name, shape, dtype, bits, bits, dtype, _unreadable(dtype)
            )

    def close(self) -> None:
        """Close the file; arrays that were read stay valid."""
        self._file.close()

    def read(self, name: str, index: int | None = None) -> NDArray[np.float32]:
        """Read a tensor, or the part of it at ``index`` of its first axis.

        Raises
        ------
        InputError
            If its type cannot become float32, or a float64 value is too large for it.
        """
        dtype = self.tensors[name].source_type
        with self._errors_at(name):
            if dtype not in FLOAT_TYPES:
                problem = _unreadable(dtype) or f"{dtype} without its scales"
                raise InputError(f"field 'dtype': {problem}")
            return as_float32(self._file.read_array(name, index))

    def read_stored(self, name: str, index: int | None = None) -> NDArray[Any]:
        """Read a tensor, or the part of it at ``index`` of its first axis, in its own type."""
        with self._errors_at(name):
            return self._file.read_array(name, index)

    def raw(self, name: str) -> RawTensor:
        """Return a tensor as it is stored."""
        info = self._file.info(name)
        return RawTensor(info.dtype, info.shape, self._chunks(name))

    def _chunks(self, name: str) -> Iterator[bytes]:
        with self._errors_at(name):
            yield from self._file.chunks(name)

    def _errors_at(self, name: str) -> AbstractContextManager[None]:
        return located(f"{self.path}: tensor {name!r}")


def as_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """Floats of a type in :data:`FLOAT_TYPES` as float32, C-contiguous.

    Raises
    ------
    InputError
        If a finite float64 value is too large; the message names the field.
    """
    with np.errstate(over="ignore"):
        weights: NDArray[np.float32] = np.asarray(values, dtype=np.float32, order="C")
    if values.dtype == np.float64:
        overflow = np.isinf(weights) & np.isfinite(values)
        if overflow.any():
            problem = f"{overflow.sum()} float64 values are too large for float32"
            raise InputError(f"field 'data': {problem}")
    return weights


def _unreadable(dtype: str) -> str:
    """Why values of a type cannot become float32; FP8 can, with scales."""
    if dtype in (*FLOAT_TYPES, *FP8_TYPES):
        return ""
    return f"{dtype}, expected one of {', '.join(FLOAT_TYPES)}"
