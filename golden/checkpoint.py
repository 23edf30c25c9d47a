"""The checkpoint file: one safetensors file with the planes that the hardware streams.

docs/checkpoint.md is the specification, for readers in any language. Reading believes nothing in
the file: header, sizes, codes and positions are checked before a byte is used, and each error names
file, tensor and field. Writing and reading hold one tensor in memory, raw tensors not even that.

The container is that of the safetensors format (huggingface/safetensors, README, "Format"); it is
read and written here because the package of that name takes all tensors at once.
"""

import hashlib
import io
import json
import os
import re
import reprlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache
from math import isfinite, prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NoReturn

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from golden.codebooks import Lut
from golden.corrections import Corrections, column_dtype
from golden.errors import InputError
from golden.formats import BF16, HIF_FORMATS, Kind, NumberFormat
from golden.new_file import new_file
from golden.notation import QuantFormat, parse_format
from golden.packing import plane_bytes, unpack_bits
from golden.tensor import QuantizedTensor, decode

__all__ = [
    "METADATA_KEY",
    "VERSION",
    "Checkpoint",
    "CheckpointWriter",
    "QuantizedInfo",
    "RawInfo",
    "SourceInfo",
    "StoredTensor",
    "check_header",
    "check_names",
    "config_hash",
    "dtype_bits",
    "reconstruct",
]

VERSION = 2
METADATA_KEY = "scaled_outer_product"
"""Key of ``__metadata__`` that holds the JSON text of this format; others are ignored."""

_MAX_HEADER_BYTES = 100_000_000  # as the safetensors package
_MAX_NAME_BYTES = 1024
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")  # would break lines of text
_MAX_RANK = 32
_MAX_FORMAT_NAME = 64
_MAX_JSON_DEPTH = 16  # of the configuration and of the calibration summary
_MAX_JSON_MARKS = 4_000_000  # of , [ and {: bounds the values, so that parsing takes about a second
_MAX_DIGITS = 20  # of an integer in JSON: 64 bits and a sign
_COPY_BYTES = 1 << 20

_CORRECTION_FIELDS = ("corrections.indptr", "corrections.columns", "corrections.values")
_FIELDS = ("indices", "scales", "luts", "row_scales", *_CORRECTION_FIELDS)


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


@dataclass(frozen=True)
class SourceInfo:
    """Which part of a tensor of the model a quantized matrix is.

    Attributes
    ----------
    tensor : str
        Name of the model's tensor.
    index : int or None
        Position of the matrix along the tensor's first axis; None if it is the whole tensor.
    count : int or None
        Length of that axis; None with `index`.
    transposed : bool
        Whether the model holds the matrix as [inputs, outputs].
    """

    tensor: str
    index: int | None
    count: int | None
    transposed: bool

    @property
    def name(self) -> str:
        """Name that the quantized matrix must have."""
        return self.tensor if self.index is None else f"{self.tensor}[{self.index}]"

    def model_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """Shape of the model's tensor whose matrix has ``shape`` = (outputs, inputs)."""
        matrix = shape[::-1] if self.transposed else shape
        return matrix if self.count is None else (self.count, *matrix)


@dataclass(frozen=True)
class QuantizedInfo:
    """What the header says about a quantized tensor.

    Attributes
    ----------
    format : QuantFormat
    shape : tuple of int
        (rows, columns).
    layer_exponent : int
        f, in range(-128, 128).
    source_dtype : str
        Type of the weights before quantization, such as ``"BF16"`` or ``"Q4_1"``.
    source : SourceInfo or None
        None if the model's tensor of this name is the matrix as it is.
    """

    format: QuantFormat
    shape: tuple[int, int]
    layer_exponent: int
    source_dtype: str
    source: SourceInfo | None = None


@dataclass(frozen=True)
class RawInfo:
    """What the header says about a tensor that is stored as it came.

    Attributes
    ----------
    dtype : str
        Type name of the safetensors format, such as ``"F32"``.
    shape : tuple of int
    """

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A quantized tensor as read.

    Attributes
    ----------
    tensor : QuantizedTensor
        The dense part.
    corrections : Corrections or None
        The sparse part.
    """

    tensor: QuantizedTensor
    corrections: Corrections | None


def reconstruct(stored: StoredTensor) -> NDArray[np.float32]:
    """Weights that the stored tensor stands for: exact dense values plus sparse corrections.

    Returns
    -------
    weights : float32 array, shape (rows, columns)

    Raises
    ------
    InputError
        If a value is outside float32's range (see :func:`golden.tensor.decode` and
        :meth:`golden.corrections.Corrections.add_to`).
    """
    dense = decode(stored.tensor)
    if stored.corrections is None:
        return dense
    with _located_corrections():
        return stored.corrections.add_to(dense)


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Put ``where`` in front of every input error of the body."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


@contextmanager
def _located_corrections() -> Iterator[None]:
    """Name the stored field in every input error of the body, which begins with a part's name."""
    try:
        yield
    except InputError as error:
        part, _, problem = str(error).partition(": ")
        raise InputError(f"field 'corrections.{part}': {problem}") from error


# ------------------------------------------------------------------------------------------ JSON


def _canonical_json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def config_hash(config: Mapping[str, object]) -> str:
    """SHA-256, in lower-case hex, of a configuration's JSON text as the writer stores it.

    That text is ASCII (other characters escaped), with keys sorted, without spaces.

    Raises
    ------
    InputError
        If the configuration is not JSON (see :class:`CheckpointWriter`).
    """
    _check_json(config)
    return hashlib.sha256(_canonical_json(config).encode("ascii")).hexdigest()


def _check_json(value: object, depth: int = 1) -> None:
    """Refuse what JSON cannot hold or what this format does not allow in a configuration."""
    if depth > _MAX_JSON_DEPTH:
        raise InputError(f"nested more than {_MAX_JSON_DEPTH} deep")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise InputError(f"key {key!r} is not a string")
            _check_json(item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_json(item, depth + 1)
    elif isinstance(value, float):
        if not isfinite(value):
            raise InputError(f"{value} is not a finite number")
    elif isinstance(value, int):
        if len(str(value)) > _MAX_DIGITS:
            raise InputError(f"an integer has more than {_MAX_DIGITS} digits")
    elif value is not None and not isinstance(value, str):
        raise InputError(f"a value of type {type(value).__name__} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise InputError(f"duplicate key {_shown(key)}")
        table[key] = value
    return table


def _short_integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise InputError(f"an integer has more than {_MAX_DIGITS} digits")
    return int(text)


def _no_constant(text: str) -> NoReturn:
    raise InputError(f"{text} is not JSON")


def _parse_json(text: str) -> Any:
    if sum(map(text.count, ",[{")) > _MAX_JSON_MARKS:
        raise InputError(f"JSON of more than {_MAX_JSON_MARKS} commas and brackets")
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_int=_short_integer,
            parse_constant=_no_constant,
        )
    except RecursionError:
        raise InputError("JSON is nested too deep") from None
    except json.JSONDecodeError as error:
        raise InputError(f"not JSON: {error}") from error


_SHORT = reprlib.Repr()
_SHORT.maxstring = 80
_SHORT.maxlevel = 2


def _shown(value: object) -> str:
    """Representation of a value from a file: one line, short, however large or deep it is."""
    return _SHORT.repr(value)


def _object(value: object, required: frozenset[str]) -> dict[str, Any]:
    """``value``, if it is a JSON object with exactly these keys."""
    if not isinstance(value, dict):
        raise InputError(f"must be an object, not {_shown(value)}")
    for key in sorted(required - value.keys()):
        raise InputError(f"key {key!r} is missing")
    for key in sorted(value.keys() - required):
        raise InputError(f"unknown key {_shown(key)}")
    return value


def _integers(value: object, smallest: int) -> tuple[int, ...]:
    """``value``, if it is a JSON list of integers of at least ``smallest``."""
    if not isinstance(value, list) or any(type(n) is not int or n < smallest for n in value):
        raise InputError(f"must be a list of integers from {smallest} up, not {_shown(value)}")
    return tuple(value)


# ---------------------------------------------------------------------------------------- layout


def _check_name(name: str) -> None:
    try:
        length = len(name.encode("utf-8"))
    except UnicodeEncodeError:
        raise InputError(f"name {_shown(name)} is not valid Unicode") from None
    if not 1 <= length <= _MAX_NAME_BYTES or name == "__metadata__":
        raise InputError(f"name {_shown(name)} is reserved, empty or over {_MAX_NAME_BYTES} bytes")
    if _UNPRINTABLE.search(name):
        raise InputError(f"name {_shown(name)} holds a control character or line separator")


def _check_raw(info: RawInfo) -> int:
    """Bytes of a tensor; an error if there can be no such tensor."""
    if info.dtype not in _DTYPES:
        raise InputError(f"field 'dtype': {_shown(info.dtype)}, expected {', '.join(_DTYPES)}")
    if len(info.shape) > _MAX_RANK or any(not 0 <= size < 1 << 63 for size in info.shape):
        raise InputError(f"field 'shape': {_shown(info.shape)} is no shape of an array")
    bits = prod(info.shape) * _DTYPES[info.dtype].bits
    if bits % 8:
        raise InputError(f"field 'shape': {bits} bits of {info.dtype} are not whole bytes")
    return bits // 8


def _check_source_dtype(name: object) -> None:
    if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_]{1,32}", name)):
        raise InputError(f"field 'dtype': {_shown(name)} is not a type name")


def _check_source(name: str, source: SourceInfo | None) -> None:
    """Refuse a source that does not fit the name of the matrix, or that says nothing."""
    if source is None:
        return
    if source.name != name:
        raise InputError(f"field 'source': {_shown(source.name)}, expected the name of the matrix")
    if (source.index is None) != (source.count is None):
        raise InputError("field 'source': 'index' and 'count' must both be null or both numbers")
    if source.index is None and not source.transposed:
        raise InputError("field 'source': must be null for a matrix that is stored as it came")
    if source.index is not None and not 0 <= source.index < (source.count or 0):
        raise InputError(f"field 'source': index {source.index} is not below {source.count}")


def _check_slices(infos: Mapping[str, QuantizedInfo], taken: Iterable[str]) -> None:
    """Refuse stacked tensors that are not complete, not alike, or stored under their name too."""
    first: dict[str, tuple[str, QuantizedInfo]] = {}
    found: dict[str, int] = {}
    for name, info in infos.items():
        source = info.source
        if source is None or source.index is None:
            continue
        other, like = first.setdefault(source.tensor, (name, info))
        found[source.tensor] = found.get(source.tensor, 0) + 1
        assert like.source is not None, "kept are those with a source only"
        facts = (source.count, source.transposed, info.shape)
        if facts != (like.source.count, like.source.transposed, like.shape):
            problem = f"count, shape and 'transposed' must be those of {_shown(other)}"
            raise InputError(f"tensor {_shown(name)}: field 'source': {problem}")
    names = set(taken)
    for tensor, (name, info) in first.items():
        count = info.source.count if info.source is not None else 0
        if found[tensor] != count:
            problem = f"{found[tensor]} of {count} slices of {_shown(tensor)} are here"
            raise InputError(f"tensor {_shown(name)}: field 'source': {problem}")
        if tensor in names:
            problem = "is stored in slices and as a whole"
            raise InputError(f"tensor {_shown(tensor)}: {problem}")


def _matrices_of_tensors(infos: Mapping[str, QuantizedInfo]) -> dict[str, tuple[str, ...]]:
    places = sorted(
        (name, 0, name) if info.source is None
        else (info.source.tensor, info.source.index or 0, name)
        for name, info in infos.items()
    )  # fmt: skip
    found: dict[str, list[str]] = {}
    for tensor, _, name in places:
        found.setdefault(tensor, []).append(name)
    return {tensor: tuple(names) for tensor, names in found.items()}


def _counts(fmt: QuantFormat, shape: tuple[int, int]) -> tuple[tuple[int, int], int]:
    """(Rows, columns) of the scale words, and indices under each of them."""
    rows, columns = shape
    if fmt.block_size == 0:
        return (1, 1), rows * columns
    return (rows, -(-columns // fmt.block_size)), fmt.block_size


def check_names(matrices: Mapping[str, SourceInfo | None], raw: Mapping[str, RawInfo]) -> None:
    """Refuse a set of tensors that no checkpoint can hold, before any of them is made.

    Parameters
    ----------
    matrices : mapping of str to SourceInfo or None
        Those that will be quantized, by name.
    raw : mapping of str to RawInfo
        Those that will be stored as they came.

    Raises
    ------
    InputError
        If a name is not allowed, two tensors or their fields share one, or a raw tensor has a type
        or shape that the file cannot hold.
    """
    owners: dict[str, str] = {}
    for name, info in raw.items():
        with _located(f"tensor {_shown(name)}"):
            _check_name(name)
            _check_raw(info)
        owners[name] = name
    for name, source in matrices.items():
        with _located(f"tensor {_shown(name)}"):
            _check_source(name, source)
            for claimed in _claimed_names(name):
                _check_name(claimed)
                _claim(owners, claimed, name)
    for tensor in {source.tensor for source in matrices.values() if source is not None}:
        if owners.get(tensor, tensor) != tensor or tensor in raw:
            problem = f"name {_shown(tensor)} is taken by another tensor or its fields"
            raise InputError(f"tensor {_shown(tensor)}: {problem}")


def _claim(owners: dict[str, str], name: str, owner: str) -> None:
    if name in owners:
        raise InputError(
            f"its field or name {_shown(name)} is also that of tensor {_shown(owners[name])}"
        )
    owners[name] = owner


def _layout(info: QuantizedInfo, entries: int | None) -> dict[str, RawInfo]:
    """Type and shape of every stored field; ``entries`` is the number of corrections, if any."""
    fmt, (rows, columns) = info.format, info.shape
    blocks, size = _counts(fmt, info.shape)
    fields = {
        "indices": RawInfo("U8", (plane_bytes(prod(blocks) * size, fmt.index_bits),)),
        "scales": RawInfo("U8", (plane_bytes(prod(blocks), fmt.word.width),)),
    }
    if fmt.codebooks:
        fields["luts"] = RawInfo("U8", (len(fmt.codebooks), fmt.lut_entries))
    if fmt.row_scale:
        fields["row_scales"] = RawInfo("BF16", (rows,))
    if entries is not None:
        column_type = "U16" if column_dtype(columns) is np.uint16 else "U32"
        infos = RawInfo("U32", (rows + 1,)), RawInfo(column_type, (entries,))
        fields |= zip(_CORRECTION_FIELDS, (*infos, RawInfo("BF16", (entries,))), strict=True)
    return fields


def _field_arrays(
    tensor: QuantizedTensor, corrections: Corrections | None
) -> Iterator[tuple[str, NDArray[np.unsignedinteger]]]:
    """Stored fields in little-endian order, made one after the other."""
    yield "indices", tensor.index_plane
    yield "scales", tensor.scale_plane
    if tensor.luts:
        yield "luts", np.array([lut.codes for lut in tensor.luts], dtype=np.uint8)
    if tensor.row_scales is not None:
        yield "row_scales", tensor.row_scales.astype("<u2")
    if corrections is not None:
        width = corrections.columns.itemsize
        yield "corrections.indptr", corrections.indptr.astype("<u4")
        yield "corrections.columns", corrections.columns.astype(f"<u{width}")
        yield "corrections.values", corrections.values.astype("<u2")


def _claimed_names(name: str) -> tuple[str, ...]:
    """Names that no other tensor may have beside a quantized one, whatever fields it has."""
    return (name, *(f"{name}.{field}" for field in _FIELDS))


@lru_cache(maxsize=64)
def _codes_without_value(fmt: NumberFormat) -> NDArray[np.bool_]:
    kinds = [fmt.decode(code).kind for code in range(1 << fmt.width)]
    return np.array([kind in (Kind.NAN, Kind.RESERVED) for kind in kinds])


def _check_codes(field: str, codes: NDArray[np.unsignedinteger], fmt: NumberFormat) -> None:
    """Refuse NaN and reserved codes."""
    table = _codes_without_value(fmt)
    if not table.any():
        return
    invalid = table[codes]
    if invalid.any():
        first = np.unravel_index(int(invalid.argmax()), codes.shape)
        position = tuple(int(i) for i in first)
        code = int(codes[position])
        problem = f"{fmt.name} code {code:#x} at {position} is {fmt.decode(code).kind.value}"
        raise InputError(f"field {field!r}: {problem}")


def _check_tensor_codes(tensor: QuantizedTensor) -> None:
    if tensor.format.atom is not None:
        _check_codes("indices", tensor.indices, tensor.format.atom)
    _check_codes("scales", tensor.scale_codes, tensor.format.word.scale)
    if tensor.row_scales is not None:
        _check_codes("row_scales", tensor.row_scales, BF16)


# --------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class _Entry:
    """A tensor of the container and where its bytes start."""

    info: RawInfo
    start: int
    nbytes: int


def _header(metadata: Mapping[str, Any], entries: Mapping[str, _Entry]) -> bytes:
    """First bytes of a file whose tensors are these, in this order."""
    table: dict[str, Any] = {"__metadata__": {METADATA_KEY: _canonical_json(metadata)}}
    position = 0
    for name, entry in entries.items():
        stop = position + entry.nbytes
        table[name] = {
            "dtype": entry.info.dtype,
            "shape": list(entry.info.shape),
            "data_offsets": [position, stop],
        }
        position = stop
    text = json.dumps(table, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    if sum(map(text.count, (b",", b"[", b"{"))) > _MAX_JSON_MARKS:
        raise InputError(f"header of more than {_MAX_JSON_MARKS} commas and brackets")
    if len(text) > _MAX_HEADER_BYTES:
        size = f"{len(text)} bytes, at most {_MAX_HEADER_BYTES}"
        raise InputError(f"header of {size}")
    return len(text).to_bytes(8, "little") + text


def check_header(
    config: Mapping[str, object],
    calibration: Mapping[str, object] | None,
    matrices: Mapping[str, QuantizedInfo],
    raw: Mapping[str, RawInfo],
    *,
    sparse: bool,
) -> None:
    """Refuse a model whose header would be too long for a checkpoint, before it is quantized.

    Parameters
    ----------
    config, calibration
        As for :class:`CheckpointWriter`.
    matrices : mapping of str to QuantizedInfo
    raw : mapping of str to RawInfo
    sparse : bool
        Whether the matrices will have corrections.

    Raises
    ------
    InputError
        If the header has too many bytes or values.
    """
    metadata = _metadata(config, calibration)
    entries = {name: _Entry(info, 0, _check_raw(info)) for name, info in raw.items()}
    for name, info in matrices.items():
        metadata["tensors"][name] = _described(info)
        fields = _layout(info, prod(info.shape) if sparse else None)
        entries |= {f"{name}.{end}": _Entry(of, 0, _check_raw(of)) for end, of in fields.items()}
    _header(metadata, entries)


def _metadata(
    config: Mapping[str, object], calibration: Mapping[str, object] | None
) -> dict[str, Any]:
    """Metadata of a file without tensors."""
    for key, value in (("config", config), ("calibration", calibration)):
        with _located(key):
            _check_json(value)
    return {
        "version": VERSION,
        # Text, so that its hash needs no agreement on how numbers are printed.
        "config": _canonical_json(config),
        "config_hash": config_hash(config),
        "calibration": json.loads(_canonical_json(calibration)),  # a copy
        "tensors": {},
    }


def _described(info: QuantizedInfo) -> dict[str, Any]:
    """Entry of a quantized matrix in the metadata."""
    return {
        "format": info.format.name,
        "hif": info.format.hif.name,
        "shape": list(info.shape),
        "dtype": info.source_dtype,
        "layer_exponent": info.layer_exponent,
        "source": None if info.source is None else asdict(info.source),
    }


class CheckpointWriter:
    """Writes a checkpoint file; a context manager.

    Tensors may be added in any order: the bytes of the file depend on the content only. They are
    gathered in an unnamed file in the same folder and put into place at the end of the ``with``
    block, so the folder needs twice the size for a moment. If the block ends with an exception,
    nothing is left of it, and a file that was there before stays as it was.

    Parameters
    ----------
    path : str, Path or binary file
        File to write or replace, whose folder must exist; or an open file, to be written from where
        it stands and left open.
    config : mapping of str to JSON values
        How the model was quantized: at most 16 levels deep, finite numbers, integers of at most
        20 digits.
    calibration : mapping of str to JSON values, or None
        Summary of the calibration; None if there was none.

    Raises
    ------
    InputError
        If the path is a folder, or ``config`` or ``calibration`` is not JSON.
    """

    def __init__(
        self,
        path: str | Path | BinaryIO,
        config: Mapping[str, object],
        calibration: Mapping[str, object] | None = None,
    ) -> None:
        self._open_file = None if isinstance(path, (str, Path)) else path
        self.path = Path(path if isinstance(path, (str, Path)) else "(open file)")
        if self.path.is_dir():
            raise InputError(f"{self.path}: is a directory")
        with _located(str(self.path)):
            self._metadata = _metadata(config, calibration)
        self._entries: dict[str, _Entry] = {}
        self._claimed: set[str] = set()
        self._infos: dict[str, QuantizedInfo] = {}
        self._gathered: BinaryIO | None = None

    def __enter__(self) -> "CheckpointWriter":
        """Start gathering tensors."""
        if self._open_file is None:
            self._gathered = tempfile.TemporaryFile(dir=self.path.parent)
        else:
            self._gathered = io.BytesIO()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Put the file into place, or drop everything if the block failed."""
        gathered, self._gathered = self._gathered, None
        if gathered is None:
            return
        with gathered:
            if kind is None:
                with _located(str(self.path)):
                    _check_slices(self._infos, self._claimed)
                self._assemble(gathered)

    def add(
        self,
        name: str,
        tensor: QuantizedTensor,
        corrections: Corrections | None,
        source_dtype: str,
        source: SourceInfo | None = None,
    ) -> None:
        """Add a quantized tensor.

        Parameters
        ----------
        name : str
            Name of the tensor in the model.
        tensor : QuantizedTensor
        corrections : Corrections or None
            An empty one is stored and read back as an empty one.
        source_dtype : str
            Type of the weights before quantization: letters, digits and ``_``.
        source : SourceInfo or None
            Where the matrix lies in the model, if not as it is under its own name.

        Raises
        ------
        InputError
            If the name or that of a field is taken, the corrections have another shape, or a code
            is NaN or reserved; nothing is added then.
        """
        info = QuantizedInfo(
            tensor.format, tensor.shape, tensor.layer_exponent, source_dtype, source
        )
        with self._errors_at(name):
            self._check_free(_claimed_names(name))
            _check_source_dtype(source_dtype)
            _check_source(name, source)
            _check_tensor_codes(tensor)
            if corrections is not None and corrections.shape != tensor.shape:
                raise InputError(
                    f"corrections: shape {corrections.shape}, the tensor has {tensor.shape}"
                )
        layout = _layout(info, None if corrections is None else corrections.entries)
        added = {}
        for field, array in _field_arrays(tensor, corrections):
            added[f"{name}.{field}"] = self._gather(layout[field], [array.data])
        self._entries |= added
        self._claimed.update(_claimed_names(name))
        self._metadata["tensors"][name] = _described(info)
        self._infos[name] = info

    def add_raw(
        self, name: str, dtype: str, shape: tuple[int, ...], chunks: Iterable[bytes | memoryview]
    ) -> None:
        """Add a tensor that is stored as it came.

        Parameters
        ----------
        name : str
            Name of the tensor in the model.
        dtype : str
            Type name of the safetensors format.
        shape : tuple of int
        chunks : iterable of bytes
            The values, little-endian, row-major; cut anywhere.

        Raises
        ------
        InputError
            If the name is taken, there is no such type or shape, or the chunks have another length
            in total; nothing is added then.
        """
        with self._errors_at(name):
            self._check_free((name,))
            self._entries[name] = self._gather(RawInfo(dtype, tuple(shape)), chunks)
        self._claimed.add(name)

    @contextmanager
    def _errors_at(self, name: str) -> Iterator[None]:
        with _located(f"{self.path}: tensor {_shown(name)}"):
            yield

    def _check_free(self, names: tuple[str, ...]) -> None:
        for name in names:
            _check_name(name)
            if name in self._claimed:
                raise InputError(f"name {_shown(name)} is taken by another tensor or its fields")

    def _gather(self, info: RawInfo, chunks: Iterable[bytes | memoryview]) -> _Entry:
        if self._gathered is None:
            raise ValueError(f"{self.path}: tensors can be added inside the `with` block only")
        expected, nbytes = _check_raw(info), 0
        start = self._gathered.tell()
        for chunk in chunks:
            nbytes += memoryview(chunk).nbytes
            if nbytes > expected:
                break
            self._gathered.write(chunk)
        if nbytes != expected:
            size = f"{'more than ' * (nbytes > expected)}{min(nbytes, expected)}"
            raise InputError(
                f"field 'data': {size} bytes, {info.dtype} {info.shape} has {expected}"
            )
        return _Entry(info, start, nbytes)

    def _assemble(self, gathered: BinaryIO) -> None:
        # Widest type first, so that every tensor is aligned to its own element size.
        order = sorted(
            self._entries, key=lambda name: (-_DTYPES[self._entries[name].info.dtype].bits, name)
        )
        with _located(str(self.path)):
            header = _header(self._metadata, {name: self._entries[name] for name in order})
        opened = new_file(self.path) if self._open_file is None else nullcontext(self._open_file)
        with opened as file:
            file.write(header)
            for name in order:
                entry = self._entries[name]
                file.writelines(_read_chunks(gathered, entry.start, entry.nbytes))


def _read_chunks(file: BinaryIO, start: int, nbytes: int) -> Iterator[bytes]:
    """Bytes of a part of a file, at most 1 MiB at a time."""
    stop = start + nbytes
    for position in range(start, stop, _COPY_BYTES):
        wanted = min(_COPY_BYTES, stop - position)
        file.seek(position)  # each time: the consumer may read elsewhere in between
        chunk = file.read(wanted)
        if len(chunk) != wanted:
            raise InputError(f"the file ends at byte {position + len(chunk)}, before byte {stop}")
        yield chunk


# --------------------------------------------------------------------------------------- reading

_HEADER_ENTRY = frozenset({"dtype", "shape", "data_offsets"})
_METADATA_KEYS = frozenset({"version", "config", "config_hash", "calibration", "tensors"})
_TENSOR_KEYS = frozenset({"format", "hif", "shape", "dtype", "layer_exponent", "source"})
_SOURCE_KEYS = frozenset({"tensor", "index", "count", "transposed"})


def _read_header(file: BinaryIO, size: int) -> tuple[dict[str, Any], int]:
    """JSON object of the header, and the position of the first data byte."""
    if size < 8:
        raise InputError(f"header: the file has {size} bytes, the header length alone takes 8")
    length = int.from_bytes(file.read(8), "little")
    if length > min(_MAX_HEADER_BYTES, size - 8):
        raise InputError(
            f"header: length {length}, at most {_MAX_HEADER_BYTES} allowed and {size - 8} left"
        )
    raw = file.read(length)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"{error.reason} at byte {8 + error.start}"
        raise InputError(f"header: not UTF-8: {problem}") from error
    if not (text.startswith("{") and text.rstrip(" ").endswith("}")):
        raise InputError("header: must be a JSON object, padded with spaces only")
    with _located("header"):
        return _parse_json(text), 8 + length


def _read_entry(value: object, data_bytes: int) -> _Entry:
    """Entry of one tensor in the header, positions counted from the first data byte."""
    table = _object(value, _HEADER_ENTRY)
    with _located("field 'shape'"):
        shape = _integers(table["shape"], 0)
    with _located("field 'data_offsets'"):
        offsets = _integers(table["data_offsets"], 0)
        if len(offsets) != 2 or not offsets[0] <= offsets[1] <= data_bytes:
            raise InputError(f"{list(offsets)} is no part of {data_bytes} bytes of data")
    if not isinstance(table["dtype"], str):
        raise InputError(f"field 'dtype': {_shown(table['dtype'])} is not a string")
    info = RawInfo(table["dtype"], shape)
    nbytes = _check_raw(info)
    start, stop = offsets
    if stop - start != nbytes:
        raise InputError(
            f"field 'data_offsets': {stop - start} bytes, {info.dtype} {list(shape)} has {nbytes}"
        )
    return _Entry(info, start, nbytes)


def _read_entries(header: dict[str, Any], data_bytes: int) -> dict[str, _Entry]:
    """Entries of all tensors; together they cover the data without holes or overlap."""
    entries = {}
    for name, value in header.items():
        with _located(f"tensor {_shown(name)}"):
            _check_name(name)
            entries[name] = _read_entry(value, data_bytes)
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if entry.start != position:
            problem = f"starts at {entry.start}, the tensor before it ends at {position}"
            raise InputError(f"tensor {_shown(name)}: field 'data_offsets': {problem}")
        position += entry.nbytes
    if position != data_bytes:
        raise InputError(f"header: tensors cover {position} of {data_bytes} bytes of data")
    return entries


def _read_metadata(value: object) -> dict[str, Any]:
    """JSON object of this format, from the ``__metadata__`` of the container."""
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise InputError("__metadata__: must be an object of strings")
    if METADATA_KEY not in value:
        raise InputError(
            f"__metadata__: no key {METADATA_KEY!r}; this is a safetensors file, but no checkpoint "
            "of this program"
        )
    with _located(f"metadata {METADATA_KEY!r}"):
        metadata = _parse_json(value[METADATA_KEY])
        if not isinstance(metadata, dict):
            raise InputError(f"must be an object, not {_shown(metadata)}")
        version = metadata.get("version")
        if type(version) is not int or version != VERSION:
            raise InputError(
                f"version {_shown(version)}, this program reads version {VERSION}; no other was "
                "ever released: quantize the model again"
            )
        _object(metadata, _METADATA_KEYS)
        with _located("config"):
            metadata["config"] = _read_config(metadata["config"], metadata["config_hash"])
        if metadata["calibration"] is not None:
            with _located("calibration"):
                _check_summary(metadata["calibration"])
        if not isinstance(metadata["tensors"], dict):
            raise InputError(f"tensors: must be an object, not {_shown(metadata['tensors'])}")
    return metadata


def _read_config(text: object, digest: object) -> dict[str, Any]:
    """JSON object in the text of the configuration, whose hash is that of its bytes."""
    if not isinstance(text, str):
        raise InputError(f"must be a string, not {_shown(text)}")
    try:
        found = hashlib.sha256(text.encode()).hexdigest()
    except UnicodeEncodeError:
        raise InputError("is not valid Unicode") from None
    if digest != found:
        raise InputError(f"config_hash: {_shown(digest)}, config has {found!r}")
    return _check_summary(_parse_json(text))


def _check_summary(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"must be an object, not {_shown(value)}")
    _check_json(value)
    return value


def _read_tensor_info(name: str, value: object) -> QuantizedInfo:
    table = _object(value, _TENSOR_KEYS)
    with _located("field 'shape'"):
        shape = _integers(table["shape"], 1)
        if len(shape) != 2:
            raise InputError(f"must have two dimensions, not {_shown(list(shape))}")
    exponent = table["layer_exponent"]
    if type(exponent) is not int or not -128 <= exponent <= 127:
        raise InputError(f"field 'layer_exponent': {_shown(exponent)} is not in -128..127")
    _check_source_dtype(table["dtype"])
    fmt = _read_format(table["format"], table["hif"])
    source = _read_source(name, table["source"])
    return QuantizedInfo(fmt, (shape[0], shape[1]), exponent, table["dtype"], source)


def _read_source(name: str, value: object) -> SourceInfo | None:
    if value is None:
        return None
    with _located("field 'source'"):
        table = _object(value, _SOURCE_KEYS)
        if not isinstance(table["tensor"], str):
            raise InputError(f"'tensor' must be a string, not {_shown(table['tensor'])}")
        _check_name(table["tensor"])
        for key in ("index", "count"):
            if table[key] is not None and type(table[key]) is not int:
                raise InputError(f"{key!r} must be a number or null, not {_shown(table[key])}")
        if type(table["transposed"]) is not bool:
            raise InputError(
                f"'transposed' must be true or false, not {_shown(table['transposed'])}"
            )
    source = SourceInfo(**table)
    _check_source(name, source)
    return source


def _read_format(name: object, hif: object) -> QuantFormat:
    if not isinstance(hif, str) or hif not in HIF_FORMATS:
        raise InputError(f"field 'hif': {_shown(hif)}, expected {', '.join(HIF_FORMATS)}")
    if not isinstance(name, str) or len(name) > _MAX_FORMAT_NAME:
        raise InputError(f"field 'format': {_shown(name)} is not the name of a format")
    with _located("field 'format'"):
        fmt = parse_format(name, HIF_FORMATS[hif])
        if fmt.name != name:
            raise InputError(f"{name!r}, must be spelled {fmt.name!r}")
    return fmt


def _claim_fields(
    name: str, info: QuantizedInfo, entries: dict[str, _Entry], claimed: set[str]
) -> dict[str, _Entry]:
    """Entries of the fields of one tensor, each of the type and shape that it must have."""
    names = _claimed_names(name)
    for other in names:
        if other in claimed:
            raise InputError(f"name {_shown(other)} is also of another quantized tensor")
    claimed.update(names)
    if name in entries:
        raise InputError(f"name {_shown(name)} is stored quantized and as it came")
    present = {
        field: entries[f"{name}.{field}"] for field in _FIELDS if f"{name}.{field}" in entries
    }
    values = next(
        (present[field] for field in reversed(_CORRECTION_FIELDS) if field in present), None
    )
    layout = _layout(info, None if values is None else prod(values.info.shape))
    for field in _FIELDS:
        if (field in layout) != (field in present):
            problem = "is missing" if field in layout else f"{info.format.name} has no such field"
            raise InputError(f"field {field!r}: {problem}")
        if field in layout and present[field].info != layout[field]:
            has, needs = present[field].info, layout[field]
            raise InputError(
                f"field {field!r}: {has.dtype} {list(has.shape)}, expected {needs.dtype} "
                f"{list(needs.shape)}"
            )
    return present


class Checkpoint:
    """An open checkpoint file; use it as a context manager, or call :meth:`close`.

    Opening checks the whole header; each read checks the tensor that it reads, and reads no other.

    Parameters
    ----------
    path : str or Path

    Attributes
    ----------
    path : Path
    config : dict
        How the model was quantized.
    config_hash : str
        :func:`config_hash` of it.
    calibration : dict or None

    Raises
    ------
    InputError
        If the file is not a valid checkpoint; the message names file, tensor and field.
    OSError
        If the file cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():  # anything else may block, such as a pipe
            raise InputError(
                f"{self.path}: no such file" + " (not a regular file)" * self.path.exists()
            )
        self._file = self.path.open("rb")
        try:
            with _located(str(self.path)):
                self._open()
        except BaseException:
            self._file.close()
            raise

    def _open(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        header, self._data_start = _read_header(self._file, size)
        metadata = _read_metadata(header.pop("__metadata__", {}))
        entries = _read_entries(header, size - self._data_start)
        claimed: set[str] = set()
        self._infos: dict[str, QuantizedInfo] = {}
        self._fields: dict[str, dict[str, _Entry]] = {}
        for name, value in sorted(metadata["tensors"].items()):
            with _located(f"tensor {_shown(name)}"):
                self._infos[name] = _read_tensor_info(name, value)
                self._fields[name] = _claim_fields(name, self._infos[name], entries, claimed)
        _check_slices(self._infos, entries.keys() | claimed)
        self._model_tensors = _matrices_of_tensors(self._infos)
        self._raw = {name: entries[name] for name in sorted(entries.keys() - claimed)}
        self.config: dict[str, Any] = metadata["config"]
        self.config_hash: str = metadata["config_hash"]
        self.calibration: dict[str, Any] | None = metadata["calibration"]

    def __enter__(self) -> "Checkpoint":
        """Return the open checkpoint."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file; what was read stays valid."""
        self._file.close()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the quantized tensors, sorted."""
        return tuple(self._infos)

    @property
    def model_tensors(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the model's tensors that are quantized, sorted, and of the matrices of each.

        A tensor has one matrix, or one for each index of its first axis, in this order.
        """
        return self._model_tensors

    @property
    def raw_names(self) -> tuple[str, ...]:
        """Names of the tensors that are stored as they came, sorted."""
        return tuple(self._raw)

    def info(self, name: str) -> QuantizedInfo:
        """Format, shape and source of a quantized tensor, without reading it."""
        return self._infos[self._known(name, self._infos)]

    def raw_info(self, name: str) -> RawInfo:
        """Type and shape of a raw tensor, without reading it."""
        return self._raw[self._known(name, self._raw)].info

    def read(self, name: str) -> StoredTensor:
        """Read one quantized tensor.

        Raises
        ------
        InputError
            If there is no such tensor, a code is NaN or reserved, a LUT is not one, or corrections
            are not valid; the message names the field.
        """
        info = self.info(name)
        with self._errors_at(name):
            tensor = self._read_tensor(name, info)
            _check_tensor_codes(tensor)
            return StoredTensor(tensor, self._read_corrections(name, info))

    def read_raw(self, name: str) -> NDArray[Any]:
        """Read one raw tensor as an array of its own type (bfloat16 is that of ``ml_dtypes``).

        Raises
        ------
        InputError
            If there is no such tensor, or NumPy has no such type (4-bit and 6-bit floats); use
            :meth:`raw_chunks` then.
        """
        info = self.raw_info(name)
        with self._errors_at(name):
            dtype = _DTYPES[info.dtype].numpy
            if dtype is None:
                raise InputError(f"field 'dtype': NumPy has no type for {info.dtype}")
            data = self._bytes(self._raw[name])
            if info.dtype == "BOOL" and data.any() and int(data.max()) > 1:
                raise InputError("field 'data': a BOOL is neither 0 nor 1")
            little = np.dtype(dtype).newbyteorder("<")
            return data.view(little).astype(dtype, copy=False).reshape(info.shape)

    def raw_chunks(self, name: str) -> Iterator[bytes]:
        """Bytes of one raw tensor, at most 1 MiB at a time."""
        entry = self._raw[self._known(name, self._raw)]
        with self._errors_at(name):
            yield from _read_chunks(self._file, self._data_start + entry.start, entry.nbytes)

    def bits(self, name: str) -> int:
        """Bits that a tensor, quantized or raw, takes in the file (its data, not the header)."""
        if name in self._fields:
            return 8 * sum(entry.nbytes for entry in self._fields[name].values())
        return 8 * self._raw[self._known(name, self._raw)].nbytes

    @property
    def stored_bits_per_weight(self) -> Fraction:
        """Bits of all quantized tensors over their weights; corrections, LUTs, padding included.

        Raises
        ------
        InputError
            If no tensor is quantized.
        """
        weights = sum(prod(info.shape) for info in self._infos.values())
        if not weights:
            raise InputError(f"{self.path}: no tensor is quantized")
        return Fraction(sum(self.bits(name) for name in self._infos), weights)

    def _known(self, name: str, names: Mapping[str, object]) -> str:
        if name not in names:
            kind = "quantized" if names is self._infos else "raw"
            raise InputError(f"{self.path}: tensor {_shown(name)}: no such {kind} tensor")
        return name

    @contextmanager
    def _errors_at(self, name: str) -> Iterator[None]:
        with _located(f"{self.path}: tensor {_shown(name)}"):
            yield

    def _bytes(self, entry: _Entry) -> NDArray[np.uint8]:
        data = np.empty(entry.nbytes, dtype=np.uint8)
        self._file.seek(self._data_start + entry.start)
        filled = self._file.readinto(data.data)
        if filled != entry.nbytes:
            raise InputError(f"the file ends after {filled} of {entry.nbytes} bytes")
        return data

    def _field(self, name: str, field: str) -> NDArray[np.unsignedinteger]:
        """Elements of a field as unsigned integers, flat."""
        entry = self._fields[name][field]
        with _located(f"field {field!r}"):
            width = _DTYPES[entry.info.dtype].bits // 8
            return self._bytes(entry).view(f"<u{width}").astype(f"u{width}", copy=False)

    def _plane(self, name: str, field: str, width: int, count: int) -> NDArray[np.unsignedinteger]:
        plane = self._field(name, field)
        with _located(f"field {field!r}"):
            return unpack_bits(plane, width, count)

    def _read_tensor(self, name: str, info: QuantizedInfo) -> QuantizedTensor:
        fmt = info.format
        blocks, size = _counts(fmt, info.shape)
        words = self._plane(name, "scales", fmt.word.width, prod(blocks)).astype(np.uint16)
        luts = []
        if fmt.codebooks:
            tables = self._field(name, "luts").reshape(-1, fmt.lut_entries)
            for position, codes in enumerate(tables.tolist()):
                with _located(f"field 'luts[{position}]'"):
                    luts.append(Lut(fmt.hif, tuple(codes)))
        return QuantizedTensor(
            fmt,
            info.shape,
            self._plane(name, "indices", fmt.index_bits, prod(blocks) * size).reshape(
                *blocks, size
            ),
            words.reshape(blocks),
            tuple(luts),
            info.layer_exponent,
            self._field(name, "row_scales") if fmt.row_scale else None,
        )

    def _read_corrections(self, name: str, info: QuantizedInfo) -> Corrections | None:
        if _CORRECTION_FIELDS[0] not in self._fields[name]:
            return None
        indptr, columns, values = (self._field(name, field) for field in _CORRECTION_FIELDS)
        with _located_corrections():
            return Corrections(info.shape, indptr.astype(np.int64), columns, values)
