"""Strict reader of GGUF files, the format of llama.cpp and other GGML programs.

A model file comes from anywhere, so nothing in it is believed: each count and length is compared
with the bytes that are left *before* anything is allocated or looped over. Every loop step eats at
least one byte of the file, hence the work is bounded by its size. Only the header is read on
opening; tensors are mapped, one at a time, when they are asked for.

Read are versions 2 and 3 in little-endian order. Source: the GGUF specification, ggml-org/ggml,
``docs/gguf.md``. Block sizes and dequantization come from the PyPI package ``gguf``; its own
``GGUFReader`` is not used, because it trusts the counts it reads.
"""

import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from golden.errors import InputError

__all__ = ["GgufFile", "GgufTensor"]

Scalar = int | float | bool | str

_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_ALIGNMENT_KEY = "general.alignment"
_MAX_KEY_BYTES = 65535
_MAX_NAME_BYTES = 1024  # the specification says 64; files with longer names exist
_MAX_VALUE_BYTES = 1 << 24  # one metadata string; chat templates, the longest, stay far below
_MAX_RANK = 4
_MAX_ARRAY_DEPTH = 4

# struct formats of the metadata value types 0..12; bool is read as its byte to check that it is 0/1
_FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f"}
_FORMATS |= {7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_UINT32, _BOOL, _STRING, _ARRAY = 4, 7, 8, 9
# the fewest bytes one array element can take: a string has its length, an array its type and count
_MIN_BYTES = {code: struct.calcsize(fmt) for code, fmt in _FORMATS.items()}
_MIN_BYTES |= {_STRING: 8, _ARRAY: 12}
_MIN_KEY_VALUE_BYTES = 8 + 1 + 4 + 1  # key length, key, value type, value
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # name length, name, rank, one dimension, type, offset

_NO_FLOATS = "values cannot be converted to float32"
_ROWS_AT_ONCE = 1024  # bounds what dequantization needs besides its result


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies in the file and how it is stored.

    Attributes
    ----------
    name : str
        Name of the tensor, unique in its file.
    shape : tuple of int
        NumPy order, which is the reverse of the dimensions in the file: ``(N, K)`` for a matrix of
        N rows (outputs) and K columns (inputs); rank 1 to 4, each dimension at least 1.
    type_name : str
        GGML type, such as ``"F32"`` or ``"Q4_1"``.
    block_size : int
        Weights that are quantized together; 1 for the plain types.
    offset : int
        First byte, counted from the start of the file.
    nbytes : int
        Length in bytes.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    block_size: int
    offset: int
    nbytes: int


class _Header:
    """Cursor over the bytes of a file; it never steps past the end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.pos = 0
        self.subject = ""  # what is being read, such as "tensor 'output.weight': "

    def error(self, field: str, problem: str) -> InputError:
        """Return the error for a bad field of the subject at hand."""
        return InputError(f"{self.path}: {self.subject}field '{field}': {problem}")

    @property
    def left(self) -> int:
        """Bytes between the cursor and the end of the file."""
        return len(self.data) - self.pos

    def take(self, nbytes: int, field: str) -> int:
        """Step over `nbytes` bytes and return where they start."""
        if nbytes > self.left:
            problem = f"needs {nbytes} bytes at byte {self.pos}, file has {self.left} left"
            raise self.error(field, problem)
        self.pos += nbytes
        return self.pos - nbytes

    def integer(self, fmt: str, field: str) -> int:
        """Read one integer of the struct format `fmt`."""
        return int(struct.unpack_from(fmt, self.data, self.take(struct.calcsize(fmt), field))[0])

    def count(self, field: str, min_bytes: int) -> int:
        """Read a number of items of at least `min_bytes` bytes each, all within the file."""
        count = self.integer("<Q", field)
        if count * min_bytes > self.left:
            problem = f"{count} items of at least {min_bytes} bytes, file has {self.left} left"
            raise self.error(field, problem)
        return count

    def string(self, field: str, max_bytes: int) -> str:
        """Read a UTF-8 string of at most `max_bytes` bytes."""
        length = self.integer("<Q", field)
        if length > min(max_bytes, self.left):
            problem = f"{length} bytes long, at most {max_bytes} allowed and {self.left} left"
            raise self.error(field, problem)
        start = self.take(length, field)
        try:
            return self.data[start : self.pos].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(field, f"not UTF-8: {error.reason} at byte {start}") from error

    def scalar(self, code: int) -> Scalar:
        """Read a metadata value that is not an array."""
        if code == _STRING:
            return self.string("value", _MAX_VALUE_BYTES)
        fmt = _FORMATS[code]
        start = self.take(struct.calcsize(fmt), "value")
        value: int | float = struct.unpack_from(fmt, self.data, start)[0]
        if code != _BOOL:
            return value
        if value not in (0, 1):
            raise self.error("value", f"a bool must be 0 or 1, not {value}")
        return bool(value)

    def value_type(self, field: str) -> int:
        """Read the code of a metadata value type."""
        code = self.integer("<I", field)
        if code not in _MIN_BYTES:
            raise self.error(field, f"unknown value type {code}, expected 0..12")
        return code

    def skip_array(self, depth: int = 1) -> None:
        """Step over an array; `depth` is 1 for an array that is itself a metadata value."""
        if depth > _MAX_ARRAY_DEPTH:
            raise self.error("array", f"nested more than {_MAX_ARRAY_DEPTH} deep")
        code = self.value_type("array type")
        count = self.count("array length", _MIN_BYTES[code])
        if code == _STRING:
            self._skip_strings(count)
        elif code == _ARRAY:
            for _ in range(count):
                self.skip_array(depth + 1)
        else:
            self.take(count * _MIN_BYTES[code], "array")

    def _skip_strings(self, count: int) -> None:
        # A vocabulary has some 100000 entries: a flat loop, several times faster than `string`.
        length_at = struct.Struct("<Q").unpack_from
        last = len(self.data) - 8
        pos = self.pos
        for index in range(count):
            if pos > last:
                raise self.error("array", f"string {index} of {count} starts past the end of file")
            pos += 8 + length_at(self.data, pos)[0]
        self.take(pos - self.pos, "array")


def _read_metadata(header: _Header, count: int) -> dict[str, Scalar]:
    metadata: dict[str, Scalar] = {}
    seen: set[str] = set()
    for index in range(count):
        header.subject = f"metadata entry {index}: "
        key = header.string("key", _MAX_KEY_BYTES)
        header.subject = f"metadata key {key[:80]!r}: "
        if not key or key in seen:
            raise header.error("key", "duplicate" if key else "empty")
        seen.add(key)
        code = header.value_type("value type")
        if key == _ALIGNMENT_KEY and code != _UINT32:
            raise header.error("value type", f"must be {_UINT32} (uint32), not {code}")
        if code == _ARRAY:
            header.skip_array()
        else:
            metadata[key] = header.scalar(code)
    header.subject = ""
    return metadata


def _alignment(header: _Header, metadata: Mapping[str, Scalar]) -> int:
    value = metadata.get(_ALIGNMENT_KEY, _DEFAULT_ALIGNMENT)
    assert isinstance(value, int), "the value type was checked on reading"
    if value < 8 or value & (value - 1):
        raise header.error(_ALIGNMENT_KEY, f"must be a power of two of at least 8, not {value}")
    return value


def _read_tensor_info(header: _Header, index: int, alignment: int) -> GgufTensor:
    """Read one entry of the tensor table; its offset still counts from the data section."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    header.subject = f"tensor {index}: "
    name = header.string("name", _MAX_NAME_BYTES)
    if not name:
        raise header.error("name", "empty")
    header.subject = f"tensor {name!r}: "
    rank = header.integer("<I", "n_dims")
    if not 1 <= rank <= _MAX_RANK:
        raise header.error("n_dims", f"rank must be 1..{_MAX_RANK}, not {rank}")
    dims = [header.integer("<Q", "dims") for _ in range(rank)]
    if 0 in dims:
        raise header.error("dims", f"every dimension must be positive, got {dims}")
    code = header.integer("<I", "type")
    try:
        kind = GGMLQuantizationType(code)
    except ValueError as error:
        raise header.error("type", f"unknown GGML type {code}") from error
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    if dims[0] % block_size:
        problem = f"row length {dims[0]} is not a multiple of the {kind.name} block {block_size}"
        raise header.error("dims", problem)
    offset = header.integer("<Q", "offset")
    if offset % alignment:
        raise header.error("offset", f"{offset} is not a multiple of the alignment {alignment}")
    nbytes = prod(dims) // block_size * block_bytes
    return GgufTensor(name, tuple(reversed(dims)), kind.name, block_size, offset, nbytes)


def _check_placement(header: _Header, tensors: Iterable[GgufTensor]) -> None:
    """Refuse tensors that leave the file or share bytes."""
    size = len(header.data)
    last_name, last_end = "", 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        header.subject = f"tensor {tensor.name!r}: "
        end = tensor.offset + tensor.nbytes
        if end > size:
            raise header.error("offset", f"data ends at byte {end}, file has {size} bytes")
        if tensor.offset < last_end:
            problem = f"data starts at byte {tensor.offset} and overlaps tensor {last_name!r}"
            raise header.error("offset", f"{problem}, which ends at byte {last_end}")
        last_name, last_end = tensor.name, end


def _read_tensor_table(header: _Header, count: int, alignment: int) -> dict[str, GgufTensor]:
    found: dict[str, GgufTensor] = {}
    for index in range(count):
        tensor = _read_tensor_info(header, index, alignment)
        if tensor.name in found:
            raise header.error("name", "duplicate")
        found[tensor.name] = tensor
    start = -(-header.pos // alignment) * alignment
    found = {name: replace(tensor, offset=start + tensor.offset) for name, tensor in found.items()}
    _check_placement(header, found.values())
    return found


def _check_magic_and_version(header: _Header) -> int:
    start = header.take(4, "magic")
    magic = header.data[start : header.pos]
    if magic != b"GGUF":
        raise header.error("magic", f"not a GGUF file, expected b'GGUF', got {magic!r}")
    version = header.integer("<I", "version")
    if version and version % 65536 == 0:  # a small number with its bytes swapped
        raise header.error("version", "big-endian files are not supported, expected little-endian")
    if version not in _VERSIONS:
        raise header.error("version", f"expected one of {_VERSIONS}, got {version}")
    return version


@lru_cache(maxsize=64)
def _can_dequantize(type_name: str) -> bool:
    """Whether the package ``gguf`` knows more of a type than its name."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[type_name]
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:  # what gguf raises for a type it only knows by name
        return False
    return True


class GgufFile:
    """An open GGUF file whose whole header has been checked.

    Parameters
    ----------
    path : Path
        The file.

    Attributes
    ----------
    version : int
        Format version, 2 or 3.
    metadata : Mapping of str to int, float, bool or str
        The metadata that are single values, such as ``general.architecture``; arrays are dropped.
    tensors : Mapping of str to GgufTensor
        All tensors by name, in the order of the table in the file.

    Raises
    ------
    InputError
        If any part of the header breaks the format; the message names the field.
    OSError
        If the file cannot be opened or mapped.
    """

    version: int
    metadata: Mapping[str, Scalar]
    tensors: Mapping[str, GgufTensor]

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb")
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def _read_header(self) -> None:
        if os.fstat(self._file.fileno()).st_size == 0:  # cannot be mapped
            raise InputError(f"{self._path}: field 'magic': the file is empty")
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _Header(data, self._path)
            self.version = _check_magic_and_version(header)
            tensor_count = header.count("tensor_count", _MIN_TENSOR_BYTES)
            key_count = header.count("metadata_kv_count", _MIN_KEY_VALUE_BYTES)
            metadata = _read_metadata(header, key_count)
            alignment = _alignment(header, metadata)
            tensors = _read_tensor_table(header, tensor_count, alignment)
        self.metadata = MappingProxyType(metadata)
        self.tensors = MappingProxyType(tensors)

    def close(self) -> None:
        """Close the file; arrays that were read stay valid."""
        self._file.close()

    def read_tensor(self, name: str, index: int | None = None) -> NDArray[np.float32]:
        """Read and dequantize one tensor, or one part of it.

        Besides the result, this needs memory for some rows and the mapped pages of this tensor.
        NaN and infinity pass through unchanged.

        Parameters
        ----------
        name : str
            A key of `tensors`.
        index : int, optional
            Position along the first axis of the part to read; all if not given.

        Returns
        -------
        ndarray of float32
            The weights, C-contiguous, of the shape in `tensors`, without its first axis if there
            is an `index`; no unit.

        Raises
        ------
        InputError
            If the type cannot be dequantized, or the file has become shorter since it was opened.
        KeyError
            If there is no such tensor.
        """
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        where = f"{self._path}: tensor {name!r}"
        self._check_size(tensor)  # reading past the end would kill the process
        shape = tensor.shape if index is None else tensor.shape[1:]
        rows, columns = prod(shape[:-1]), tensor.shape[-1]
        row_bytes = tensor.nbytes // prod(tensor.shape[:-1])
        offset = tensor.offset + (index or 0) * rows * row_bytes
        raw = np.asarray(np.memmap(self._file, np.uint8, "r", offset, (rows, row_bytes)))
        kind = GGMLQuantizationType[tensor.type_name]
        weights = np.empty((rows, columns), np.float32)
        try:
            with np.errstate(all="ignore"):  # odd values are for the caller to judge
                for start in range(0, rows, _ROWS_AT_ONCE):
                    part = slice(start, start + _ROWS_AT_ONCE)
                    weights[part] = dequantize(raw[part], kind)
        except NotImplementedError as error:  # what gguf raises for a type it only knows by name
            problem = f"{tensor.type_name} {_NO_FLOATS}"
            raise InputError(f"{where}: field 'type': {problem}") from error
        return weights.reshape(shape)

    def unreadable(self, name: str) -> str:
        """Why a tensor cannot be dequantized; empty if it can."""
        type_name = self.tensors[name].type_name
        return "" if _can_dequantize(type_name) else f"{type_name} {_NO_FLOATS}"

    def chunks(self, name: str, size: int) -> Iterator[bytes]:
        """Yield the stored bytes of one tensor, at most ``size`` at a time.

        Raises
        ------
        InputError
            If the file has become shorter since it was opened.
        KeyError
            If there is no such tensor.
        """
        tensor = self.tensors[name]
        self._check_size(tensor)
        stop = tensor.offset + tensor.nbytes
        for start in range(tensor.offset, stop, size):
            self._file.seek(start)
            yield self._file.read(min(size, stop - start))

    def _check_size(self, tensor: GgufTensor) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if tensor.offset + tensor.nbytes > size:
            problem = f"the file was cut to {size} bytes"
            raise InputError(f"{self._path}: tensor {tensor.name!r}: field 'offset': {problem}")
