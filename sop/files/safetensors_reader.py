"""Tensors of one safetensors file, read one at a time as float32."""

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes  # registers bfloat16 with NumPy, which safetensors needs for BF16
import numpy as np
import safetensors
from numpy.typing import DTypeLike, NDArray

from golden.checkpoint import METADATA_KEY
from golden.container import dtype_bits
from golden.errors import InputError
from sop.files.scaled_weights import FP8_TYPES
from sop.files.tensor_info import RawTensor, TensorInfo
from sop.shared.marks import CALIBRATION_KEY

__all__ = ["FLOAT_TYPES", "SafetensorsReader", "one_line"]

_BYTE_TYPES: Mapping[str, DTypeLike] = {
    **FP8_TYPES,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "U8": np.uint8,
}
_NO_MODELS = {
    METADATA_KEY: "is a checkpoint, whose weights are quantized already; sop decode makes a model "
    "of it",
    CALIBRATION_KEY: "is a calibration file, not a model; give the model first, and this "
    "file with --calibration",
}
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
            for key, problem in _NO_MODELS.items():
                if key in (self._file.metadata() or {}):
                    self.close()
                    raise InputError(f"{path}: {problem}")
            self.tensors = {}
            for name in self._file.offset_keys():
                part = self._file.get_slice(name)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                bits = dtype_bits(dtype) * int(np.prod(shape, dtype=object))
                self.tensors[name] = TensorInfo(
                    name, shape, dtype, bits, bits, dtype, _unreadable(dtype)
                )
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
            problem = _unreadable(info.source_type) or f"{info.source_type} without its scales"
            raise InputError(f"{where}: field 'dtype': {problem}")
        try:
            part = self._file.get_slice(name)
            values = self._file.get_tensor(name) if index is None else part[index]
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

    def read_stored(self, name: str, index: int | None = None) -> NDArray[Any]:
        """Read a tensor of bytes, or the part of it at ``index`` of its first axis, as stored.

        FP8, scales of the type E8M0, and U8; the package itself cannot give NumPy the first two.
        """
        info = self.tensors[name]
        shape = info.shape if index is None else info.shape[1:]
        data = np.frombuffer(b"".join(self._chunks(name, index)), np.uint8)
        return data.view(np.dtype(_BYTE_TYPES[info.source_type])).reshape(shape)

    def raw(self, name: str) -> RawTensor:
        """Return a tensor as it is stored."""
        info = self.tensors[name]
        return RawTensor(info.source_type, info.shape, self._chunks(name))

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        """First byte of every tensor, and the first one after it."""
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            # The package has checked this header on opening.
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        places = ((name, entry["data_offsets"]) for name, entry in header.items())
        return {name: (8 + length + start, 8 + length + stop) for name, (start, stop) in places}

    def _chunks(self, name: str, index: int | None = None) -> Iterator[bytes]:
        start, stop = self._places[name]
        if index is not None:
            size = (stop - start) // self.tensors[name].shape[0]
            start, stop = start + index * size, start + (index + 1) * size
        with self.path.open("rb") as file:
            file.seek(start)
            for position in range(start, stop, _CHUNK_BYTES):
                chunk = file.read(min(_CHUNK_BYTES, stop - position))
                if not chunk:
                    raise InputError(f"{self.path}: tensor {name!r}: the file was cut")
                yield chunk


def _unreadable(dtype: str) -> str:
    """Why values of a type cannot become float32; FP8 can, with scales."""
    if dtype in (*FLOAT_TYPES, *FP8_TYPES):
        return ""
    return f"{dtype}, expected one of {', '.join(FLOAT_TYPES)}"


def one_line(error: Exception) -> str:
    """Text of another program's error on one line, cut to a length that can be shown."""
    return " ".join(str(error).split())[:_MAX_REASON]
