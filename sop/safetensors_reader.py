"""Tensors of one safetensors file, read one at a time as float32."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - registers bfloat16 with NumPy, which safetensors needs for BF16
import numpy as np
import safetensors
from numpy.typing import NDArray

from golden.checkpoint import dtype_bits
from golden.errors import InputError
from sop.tensor_info import RawTensor, TensorInfo

__all__ = ["FLOAT_TYPES", "SafetensorsReader", "one_line"]

FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
"""Types of the safetensors format that become float32."""

_CHUNK_BYTES = 1 << 20
_MAX_REASON = 300  # characters of a message that quotes the file, which may hold very long names


class SafetensorsReader:
    """One open safetensors file, whose header the package has checked.

    Attributes
    ----------
    path : Path
    tensors : dict of str to TensorInfo
        In the order of their data.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # The stubs of safetensors are not annotated, hence Any.
        opener: Any = safetensors.safe_open
        try:
            self._file = opener(str(path), framework="numpy")
            self.tensors = {}
            for name in self._file.offset_keys():
                part = self._file.get_slice(name)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                bits = dtype_bits(dtype) * int(np.prod(shape, dtype=object))
                self.tensors[name] = TensorInfo(name, shape, dtype, bits, bits)
        except safetensors.SafetensorError as error:
            raise InputError(f"{path}: not a valid safetensors file: {one_line(error)}") from error

    def close(self) -> None:
        """Close the file; arrays that were read stay valid."""
        self._file.__exit__(None, None, None)  # safe_open has no other way to close

    def read(self, name: str, index: int | None = None) -> NDArray[np.float32]:
        """Read a tensor, or the part of it at ``index`` of its first axis.

        Raises
        ------
        InputError
            If its type cannot become float32, or a float64 value is too large for it.
        """
        info = self.tensors[name]
        where = f"{self.path}: tensor {name!r}"
        if info.source_type not in FLOAT_TYPES:
            problem = f"{info.source_type}, expected one of {', '.join(FLOAT_TYPES)}"
            raise InputError(f"{where}: field 'dtype': {problem}")
        try:
            if index is None:
                values = self._file.get_tensor(name)
            else:
                values = self._file.get_slice(name)[index]
        except (safetensors.SafetensorError, ValueError) as error:  # shape beyond NumPy's
            raise InputError(f"{where}: field 'shape': {one_line(error)}") from error
        with np.errstate(over="ignore"):
            weights: NDArray[np.float32] = np.asarray(values, dtype=np.float32, order="C")
        if info.source_type == "F64":
            overflow = np.isinf(weights) & np.isfinite(values)
            if overflow.any():
                problem = f"{overflow.sum()} float64 values are too large for float32"
                raise InputError(f"{where}: field 'data': {problem}")
        return weights

    def raw(self, name: str) -> RawTensor:
        """Return a tensor as it is stored."""
        info = self.tensors[name]
        return RawTensor(info.source_type, info.shape, self._chunks(name))

    def _chunks(self, name: str) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            # The package has checked this header on opening.
            start, stop = json.loads(file.read(length))[name]["data_offsets"]
            file.seek(8 + length + start)
            for position in range(start, stop, _CHUNK_BYTES):
                chunk = file.read(min(_CHUNK_BYTES, stop - position))
                if not chunk:
                    raise InputError(f"{self.path}: tensor {name!r}: the file was cut")
                yield chunk


def one_line(error: Exception) -> str:
    """Text of another program's error on one line, cut to a length that can be shown."""
    return " ".join(str(error).split())[:_MAX_REASON]
