"""The safetensors container as a table: types, shapes and where each tensor's bytes lie.

Nothing here touches a file: :func:`header_bytes` makes the first bytes of one, :func:`parse_header`
checks the text of a header against the number of bytes behind it, so that what it returns can be
believed. :mod:`golden.container_file` reads and writes. Format: huggingface/safetensors, README,
"Format". The rank of a tensor is bounded here too, which keeps a hostile shape from costing time.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from golden.errors import InputError, located
from golden.strict_json import check_marks, integers, object_with, parse_json, shown

__all__ = [
    "Entry",
    "Header",
    "RawInfo",
    "check_header_length",
    "dtype_bits",
    "header_bytes",
    "numpy_dtype",
    "parse_header",
    "storage_order",
]

_MAX_HEADER_BYTES = 100_000_000  # as the package safetensors
_METADATA = "__metadata__"
_MAX_RANK = 32
_ENTRY_KEYS = frozenset({"dtype", "shape", "data_offsets"})


@dataclass(frozen=True)
class _Dtype:
    """Bits of one element, and the NumPy type where there is one."""

    bits: int
    numpy: DTypeLike | None


_DTYPES = {
    "BOOL": _Dtype(8, np.bool_),
    "F4": _Dtype(4, None),
    "F6_E2M3": _Dtype(6, None),
    "F6_E3M2": _Dtype(6, None),
    "U8": _Dtype(8, np.uint8),
    "I8": _Dtype(8, np.int8),
    "F8_E5M2": _Dtype(8, ml_dtypes.float8_e5m2),
    "F8_E4M3": _Dtype(8, ml_dtypes.float8_e4m3fn),
    "F8_E8M0": _Dtype(8, ml_dtypes.float8_e8m0fnu),
    "F8_E4M3FNUZ": _Dtype(8, ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": _Dtype(8, ml_dtypes.float8_e5m2fnuz),
    "I16": _Dtype(16, np.int16),
    "U16": _Dtype(16, np.uint16),
    "F16": _Dtype(16, np.float16),
    "BF16": _Dtype(16, ml_dtypes.bfloat16),
    "I32": _Dtype(32, np.int32),
    "U32": _Dtype(32, np.uint32),
    "F32": _Dtype(32, np.float32),
    "C64": _Dtype(64, np.complex64),
    "I64": _Dtype(64, np.int64),
    "U64": _Dtype(64, np.uint64),
    "F64": _Dtype(64, np.float64),
}


def dtype_bits(name: str) -> int:
    """Bits of an element of a type of the safetensors format; 0 for a type that is not known."""
    return _DTYPES[name].bits if name in _DTYPES else 0


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy type of the elements of a type of the safetensors format, as they lie in a file.

    Raises
    ------
    InputError
        If NumPy has none (floats of 4 and of 6 bits).
    """
    dtype = _DTYPES[name].numpy
    if dtype is None:
        raise InputError(f"field 'dtype': NumPy has no type for {name}")
    return np.dtype(dtype).newbyteorder("<")


@dataclass(frozen=True)
class RawInfo:
    """Type and shape of a tensor as a file holds it.

    Attributes
    ----------
    dtype : str
        Type name of the safetensors format, such as ``"F32"``.
    shape : tuple of int
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor.

        Raises
        ------
        InputError
            If there can be no such tensor; the message names the field.
        """
        if self.dtype not in _DTYPES:
            raise InputError(f"field 'dtype': {shown(self.dtype)}, expected {', '.join(_DTYPES)}")
        if len(self.shape) > _MAX_RANK or any(not 0 <= size < 1 << 63 for size in self.shape):
            raise InputError(f"field 'shape': {shown(self.shape)} is no shape of an array")
        bits = prod(self.shape) * _DTYPES[self.dtype].bits
        if bits % 8:
            raise InputError(f"field 'shape': {bits} bits of {self.dtype} are not whole bytes")
        return bits // 8


@dataclass(frozen=True)
class Entry:
    """A tensor and where its bytes lie.

    Attributes
    ----------
    info : RawInfo
    start : int
        First byte, counted from the first byte of data.
    nbytes : int
    """

    info: RawInfo
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What the header of a file says, checked.

    Attributes
    ----------
    metadata : dict of str to str
    entries : dict of str to Entry
        In the order of the header; together they cover the data without holes or overlap.
    """

    metadata: dict[str, str]
    entries: dict[str, Entry]


# --------------------------------------------------------------------------------------- writing


def storage_order(infos: Mapping[str, RawInfo]) -> list[str]:
    """Names in the order of a file: widest type first, so that all are aligned to their elements.

    Of one type by name, so that the bytes do not depend on the order in which tensors came.
    """
    return sorted(infos, key=lambda name: (-dtype_bits(infos[name].dtype), name))


def header_bytes(metadata: Mapping[str, str], infos: Mapping[str, RawInfo]) -> bytes:
    """First bytes of a file whose tensors are these, in this order; a multiple of 8.

    Raises
    ------
    InputError
        If there can be no such tensor, or the header has too many bytes or values.
    """
    table: dict[str, Any] = {_METADATA: dict(metadata)}
    position = 0
    for name, info in infos.items():
        stop = position + info.nbytes
        table[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [position, stop],
        }
        position = stop
    text = json.dumps(table, separators=(",", ":"))
    text += " " * (-len(text) % 8)
    check_marks(text, "header")
    if len(text) > _MAX_HEADER_BYTES:
        size = f"{len(text)} bytes, at most {_MAX_HEADER_BYTES}"
        raise InputError(f"header of {size}")
    return len(text).to_bytes(8, "little") + text.encode("ascii")


# --------------------------------------------------------------------------------------- reading


def check_header_length(length: int, left: int) -> None:
    """Refuse a header of so many bytes where so many bytes are left of the file, before reading it.

    Raises
    ------
    InputError
        If it is longer than any header may be, or than the file.
    """
    if length > min(_MAX_HEADER_BYTES, left):
        raise InputError(
            f"header: length {length}, at most {_MAX_HEADER_BYTES} allowed and {left} left"
        )


def parse_header(raw: bytes, data_bytes: int) -> Header:
    """Check the header of a file of which so many bytes follow.

    Parameters
    ----------
    raw : bytes
        Without the eight bytes of its length.
    data_bytes : int

    Raises
    ------
    InputError
        If anything in it breaks the format; the message names the tensor and the field.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"{error.reason} at byte {8 + error.start}"
        raise InputError(f"header: not UTF-8: {problem}") from error
    if not (text.startswith("{") and text.rstrip(" ").endswith("}")):
        raise InputError("header: must be a JSON object, padded with spaces only")
    with located("header"):
        table = parse_json(text)
    metadata = table.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(map(_is_string, metadata.values())):
        raise InputError(f"{_METADATA}: must be an object of strings")
    return Header(metadata, _parse_entries(table, data_bytes))


def _is_string(value: object) -> bool:
    return isinstance(value, str)


def _parse_entries(table: dict[str, Any], data_bytes: int) -> dict[str, Entry]:
    entries = {}
    for name, value in table.items():
        with located(f"tensor {shown(name)}"):
            entries[name] = _parse_entry(value, data_bytes)
    _check_cover(entries.items(), data_bytes)
    return entries


def _parse_entry(value: object, data_bytes: int) -> Entry:
    table = object_with(value, _ENTRY_KEYS)
    with located("field 'shape'"):
        shape = integers(table["shape"], 0)
    with located("field 'data_offsets'"):
        offsets = integers(table["data_offsets"], 0)
        if len(offsets) != 2 or not offsets[0] <= offsets[1] <= data_bytes:
            raise InputError(f"{list(offsets)} is no part of {data_bytes} bytes of data")
    if not isinstance(table["dtype"], str):
        raise InputError(f"field 'dtype': {shown(table['dtype'])} is not a string")
    info = RawInfo(table["dtype"], shape)
    nbytes = info.nbytes
    start, stop = offsets
    if stop - start != nbytes:
        raise InputError(
            f"field 'data_offsets': {stop - start} bytes, {info.dtype} {list(shape)} has {nbytes}"
        )
    return Entry(info, start, nbytes)


def _check_cover(entries: Iterable[tuple[str, Entry]], data_bytes: int) -> None:
    """Refuse holes, overlap, and bytes behind the last tensor."""
    position = 0
    for name, entry in sorted(entries, key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != position:
            problem = f"starts at {entry.start}, the tensor before it ends at {position}"
            raise InputError(f"tensor {shown(name)}: field 'data_offsets': {problem}")
        position += entry.nbytes
    if position != data_bytes:
        raise InputError(f"header: tensors cover {position} of {data_bytes} bytes of data")
