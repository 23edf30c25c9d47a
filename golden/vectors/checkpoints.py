"""Vectors of whole files: checkpoints with their decoded values, and broken ones with verdicts.

Good files come from the writer (:mod:`golden.checkpoint`). Broken ones are made from one of them by
changing its bytes, each in one respect; docs/vectors.md describes them for those who read them.
"""

import hashlib
import json
import re
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.checkpoint import METADATA_KEY, Checkpoint, CheckpointWriter, SourceInfo, reconstruct
from golden.corrections import Corrections, column_dtype
from golden.formats import HIF7, HIF8
from golden.notation import QuantFormat, parse_format
from golden.tensor import QuantizedTensor
from golden.vectors.decoding import moderate_bfloat16, vector_tensor
from golden.vectors.files import (
    VectorFile,
    VectorJob,
    VectorStream,
    float32_bits,
    hex_strings,
    json_text,
)
from golden.vectors.layers import file_stem

__all__ = ["BROKEN", "checkpoint_jobs"]

_FOLDER = "checkpoints"
_MAX_LISTED = 4096  # decoded values of larger tensors are given by their checksum only

# Every kind of value that JSON has, a string that needs escapes, and numbers that languages print
# in different ways: the hash is that of the text as stored.
_CONFIG: dict[str, Any] = {
    "note": 'größer, "quoted"\\',
    "budget": 4.75,
    "small": 1e-07,
    "large": 1e22,
    "list": [1, None, True, {"nested": []}],
}


def _written(add: Callable[[CheckpointWriter], None]) -> bytes:
    """Bytes of the checkpoint that the writer makes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.safetensors"
        with CheckpointWriter(path, _CONFIG, {"tokens": 4096}) as writer:
            add(writer)
        return path.read_bytes()


def _corrections(shape: tuple[int, int], seed: str, every: int) -> Corrections:
    """About one correction in so many weights; the first row of several has none."""
    stream = VectorStream(f"checkpoint/{seed}/corrections")
    mask = (stream.words(shape[0] * shape[1]) % every == 0).reshape(shape)
    mask[0] &= shape[0] == 1
    entries: NDArray[np.intp] = np.flatnonzero(mask)
    indptr = np.zeros(shape[0] + 1, dtype=np.int64)
    np.cumsum(mask.sum(axis=1), out=indptr[1:])
    columns: NDArray[np.unsignedinteger] = (entries % shape[1]).astype(column_dtype(shape[1]))
    return Corrections(shape, indptr, columns, stream.codes(len(entries), moderate_bfloat16()))


def _tensor(fmt: QuantFormat, shape: tuple[int, int], seed: str) -> QuantizedTensor:
    rows, columns = shape
    if fmt.block_size == 0:
        return vector_tensor(fmt, shape, (1, 1, rows * columns), f"checkpoint/{seed}")
    blocks = -(-columns // fmt.block_size)
    return vector_tensor(fmt, shape, (rows, blocks, fmt.block_size), f"checkpoint/{seed}")


# ---------------------------------------------------------------------------- good checkpoints

_RAW: tuple[tuple[str, str, tuple[int, ...], bytes], ...] = (
    ("model.norm.weight", "F32", (3,), struct.pack("<3f", 1.0, -0.0, 1e-40)),
    ("emb.weight", "BF16", (2, 2), bytes.fromhex("803f0040c07f80ff")),
    ("scalar", "F64", (), struct.pack("<d", 0.1)),
    ("leer", "F16", (0, 7), b""),
    ("flags", "BOOL", (2,), b"\x01\x00"),
    ("ids", "I64", (2,), struct.pack("<2q", -1, 1 << 40)),
    ("nibbles", "F4", (3, 2), b"\x21\x43\x65"),
    ("schicht.0.größe", "U8", (1,), b"\xff"),
)
"""Tensors stored as they came: name, type, shape, bytes."""


_SUMS: dict[tuple[int, int], int] = {
    (0, 0): 0x3380,  # 1 + 2^-24, a tie: down to 1
    (0, 1): 0x3440,  # 1 + 3 x 2^-24, a tie: up to 1 + 2^-22
    (0, 2): 0x3381,  # right above a tie
    (0, 3): 0xBF80,  # 1 - 1 is +0
    (0, 4): 0x8000,  # 1 - 0
    (0, 5): 0xB440,  # -1 - 3 x 2^-24, a tie: down to -1 - 2^-22
    (0, 6): 0x8000,  # +0 - 0 is +0
    (1, 0): 0x8040,  # 2^-126 - 2^-127 is subnormal, and kept
    (1, 1): 0x8080,  # 2^-126 - 2^-126 is +0
}
"""Corrections on which sums go wrong, as bfloat16 by row and column."""


def _sums() -> tuple[QuantizedTensor, Corrections]:
    """Ones under the scales 1 and 2^-126, and what is added to them."""
    one, minus, zero = 0x38, 0xB8, 0x00  # E4M3
    indices = np.full((2, 1, 16), one, dtype=np.uint8)
    indices[0, 0, 5:7] = minus, zero
    words = np.array([[0x3F80], [0x0080]], dtype=np.uint16)
    tensor = QuantizedTensor(parse_format("E4M3sBF16"), (2, 16), indices, words, (), 0)
    rows, columns = zip(*_SUMS, strict=True)
    indptr = np.searchsorted(rows, [0, 1, 2]).astype(np.int64)
    values = np.array(list(_SUMS.values()), dtype=np.uint16)
    return tensor, Corrections((2, 16), indptr, np.array(columns, dtype=np.uint16), values)


def _add_mixed(writer: CheckpointWriter, formats: Sequence[QuantFormat]) -> None:
    """One tensor of every format, some with corrections, hard sums, tensors of other types."""
    writer.add("sums", *_sums(), "F32")
    # A stack of two transposed matrices, and a transposed one.
    stack, shape = parse_format("BOF4-NF4sUE4M3"), (2, 19)
    for index in range(2):
        name = f"experts.gewölbe[{index}]"
        source = SourceInfo("experts.gewölbe", index, 2, True)
        writer.add(name, _tensor(stack, shape, f"stack/{index}"), None, "F32", source)
    source = SourceInfo("transposed", None, None, True)
    writer.add("transposed", _tensor(stack, shape, "transposed"), None, "F32", source)
    for position, fmt in enumerate(formats):
        shape = (2, 13) if fmt.block_size == 0 else (2, fmt.block_size + 3)
        # Empty corrections too, and names beyond ASCII and beyond 16 bits.
        name = ("blk.{}.q", "層.{}.重み", "blk.{}.\U0001f9ee")[position % 3].format(position)
        every = (0, 5, 1 << 40)[position % 3]
        seed = f"{fmt.name}/{fmt.hif.name}"
        sparse = _corrections(shape, seed, every) if every else None
        writer.add(name, _tensor(fmt, shape, seed), sparse, "BF16")
    for name, dtype, raw_shape, data in _RAW:
        writer.add_raw(name, dtype, raw_shape, [data])


def _add_wide(writer: CheckpointWriter) -> None:
    """65536 columns, the most whose corrections have 16-bit columns, and one more."""
    for columns in (1 << 16, (1 << 16) + 1):
        seed = f"wide/{columns}"
        sparse = _corrections((1, columns), seed, 8192)
        tensor = _tensor(parse_format("NF4^64sUE4M4"), (1, columns), seed)
        writer.add(f"columns.{columns}", tensor, sparse, "F32")


def _foreign() -> bytes:
    """What another program may write: nothing in it is as our writer does it, all is allowed."""
    file = _File(_base())
    config = '{ "z" : 1E2, "a": [0.10, -0],\n"ä": "\\u00e4\U0001f9ee" }'
    digest = hashlib.sha256(config.encode()).hexdigest()
    file.metadata.update(config=config, config_hash=digest, calibration=None)
    tensors = dict(reversed(file.header.items()))
    tensors["__metadata__"] = {
        "other": "not ours",
        METADATA_KEY: json.dumps(file.metadata, indent=1, ensure_ascii=False),
    }
    header = json.dumps(tensors, indent=1, ensure_ascii=False).encode()
    header += b" " * (1 + -len(header) % 8)  # never a multiple of 8
    return len(header).to_bytes(8, "little") + header + bytes(file.data)


def _expected(name: str, data: bytes) -> dict[str, Any]:
    """What a good checkpoint holds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.safetensors"
        path.write_bytes(data)
        with Checkpoint(path) as checkpoint:
            quantized = {}
            for tensor in checkpoint.names:
                weights = reconstruct(checkpoint.read(tensor))
                bits = float32_bits(weights).astype("<u4")
                listed = hex_strings(bits, 32) if bits.size <= _MAX_LISTED else None
                digest = hashlib.sha256(bits.tobytes()).hexdigest()
                quantized[tensor] = {
                    "shape": list(weights.shape),
                    "sha256": digest,
                    "float32": listed,
                }
            raw = {}
            for tensor in checkpoint.raw_names:
                info = checkpoint.raw_info(tensor)
                content = b"".join(checkpoint.raw_chunks(tensor)).hex()
                raw[tensor] = {"dtype": info.dtype, "shape": list(info.shape), "data": content}
    return {"file": name, "quantized": quantized, "raw": raw}


# -------------------------------------------------------------------------- broken checkpoints


class _File:
    """A checkpoint taken apart, to be changed and put together again."""

    def __init__(self, content: bytes) -> None:
        length = int.from_bytes(content[:8], "little")
        self.header: dict[str, Any] = json.loads(content[8 : 8 + length])
        self.data = bytearray(content[8 + length :])
        self.metadata: dict[str, Any] = json.loads(self.header["__metadata__"][METADATA_KEY])
        self.tensors: dict[str, Any] = self.metadata["tensors"]

    def build(self) -> bytes:
        """Bytes of the file."""
        text = json.dumps(self.metadata, separators=(",", ":"))
        self.header["__metadata__"] = {METADATA_KEY: text}
        header = json.dumps(self.header, separators=(",", ":")).encode("ascii")
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header + bytes(self.data)

    def poke(self, name: str, position: int, *values: int) -> None:
        """Change bytes of a tensor."""
        start = self.header[name]["data_offsets"][0] + position
        self.data[start : start + len(values)] = bytes(values)

    def append(self, name: str, dtype: str, shape: list[int], content: bytes) -> None:
        """Add a tensor behind the last one."""
        start = len(self.data)
        offsets = [start, start + len(content)]
        self.header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        self.data += content

    def remove(self, name: str) -> None:
        """Remove a tensor and its bytes."""
        start, stop = self.header.pop(name)["data_offsets"]
        del self.data[start:stop]
        for name in self.header.keys() - {"__metadata__"}:
            offsets = self.header[name]["data_offsets"]
            if offsets[0] >= stop:
                self.header[name]["data_offsets"] = [at - stop + start for at in offsets]

    def replace(self, name: str, dtype: str, shape: list[int], content: bytes) -> None:
        """Put another tensor under a name."""
        self.remove(name)
        self.append(name, dtype, shape, content)


def _add_base(writer: CheckpointWriter) -> None:
    """Tensors from which the broken files are made.

    ``a`` has everything: a pair of HIF8 LUTs, row scales, corrections; ``b`` numbers and bfloat16
    scales, with 15 elements of padding in each row; ``c`` planes that do not end on whole bytes;
    ``n`` came as it is.
    """
    a = _tensor(parse_format("NF4-DD4sRS1E2M4", HIF8), (2, 20), "a")
    columns = np.array([3, 7, 19], dtype=np.uint16)
    sparse = Corrections((2, 20), np.array([0, 2, 3]), columns, np.full(3, 0x3E20, np.uint16))
    writer.add("a", a, sparse, "BF16")
    writer.add("b", _tensor(parse_format("E4M3sBF16"), (2, 17), "b"), None, "F32")
    writer.add("c", _tensor(parse_format("DD5-DD5^8sS1E4M3", HIF7), (1, 20), "c"), None, "F16")
    writer.add("d", _tensor(parse_format("INT8^0sUE8M0"), (2, 5), "d"), None, "F16")
    writer.add_raw("n", "F32", (3,), [struct.pack("<3f", 1.0, 2.0, 3.0)])


@lru_cache(maxsize=1)
def _base() -> bytes:
    return _written(_add_base)


_Change = Callable[[_File], bytes | None]


@dataclass(frozen=True)
class Broken:
    """A way to break a checkpoint, and what every reader says to it.

    Attributes
    ----------
    kind : str
        Which check fails: container, metadata, layout, plane, code, corrections, range.
    tensor : str or None
        Which tensor is broken; None for the file as a whole.
    field : str or None
        Its field, or a key of the header or the metadata; None where the value of an element is
        what is wrong.
    why : str
        One sentence for people.
    change : callable
        Changes the file; what it returns, if anything, takes the place of the whole file.
    """

    kind: str
    tensor: str | None
    field: str | None
    why: str
    change: _Change


def _entry(name: str, key: str, value: object) -> _Change:
    """Change a tensor's entry in the header."""
    return lambda file: file.header[name].update({key: value})


def _about(name: str, key: str, value: object) -> _Change:
    """Change a quantized tensor's entry in the metadata."""
    return lambda file: file.tensors[name].update({key: value})


def _poke(name: str, position: int, *values: int) -> _Change:
    return lambda file: file.poke(name, position, *values)


def _rebuilt(change: Callable[[bytes], bytes]) -> _Change:
    """Change the bytes of the whole file."""
    return lambda file: change(file.build())


def _header_text(change: Callable[[bytes], bytes]) -> _Change:
    """Change the text of the header, with the length that it then has."""

    def changed(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        header = change(content[8 : 8 + length])
        return len(header).to_bytes(8, "little") + header + content[8 + length :]

    return _rebuilt(changed)


def _out_of_range(scale: int, index: int, position: int) -> _Change:
    """Give one block of ``b`` a scale, and one of its elements a code; all others become zero."""

    def change(file: _File) -> None:
        file.tensors["b"]["layer_exponent"] = 0
        file.poke("b.indices", 0, *[0] * 64)
        file.poke("b.indices", position, index)
        for block in range(4):
            file.poke("b.scales", 2 * block, *scale.to_bytes(2, "little"))

    return change


def _overflowing_sum(file: _File) -> None:
    """Make a weight of ``a`` and its correction of the same sign nearly 2^128."""
    largest = (0x7F7F).to_bytes(2, "little")
    file.append("e.indices", "U8", [16], bytes([0x7E] * 16))  # 448 in E4M3
    file.append("e.scales", "U8", [2], (0x7B00).to_bytes(2, "little"))  # 2^119
    file.append("e.corrections.indptr", "U32", [2], struct.pack("<2I", 0, 1))
    file.append("e.corrections.columns", "U16", [1], b"\0\0")
    file.append("e.corrections.values", "BF16", [1], largest)
    file.tensors["e"] = {**file.tensors["b"], "shape": [1, 16], "layer_exponent": 0}


def _hole(file: _File) -> None:
    """Put four bytes in front of ``n``, behind all others."""
    file.remove("n")
    file.data += bytes(4)
    file.append("n", "F32", [3], bytes(12))


def _overlap(file: _File) -> None:
    """Let ``n`` share its first four bytes with the tensor before it."""
    file.replace("n", "F32", [2], bytes(8))
    start, stop = file.header["n"]["data_offsets"]
    file.header["n"] = {"dtype": "F32", "shape": [3], "data_offsets": [start - 4, stop]}


def _named_as_a_field(file: _File) -> None:
    """Store a complete tensor under the name of a field that ``b`` does not have."""
    name = "b.row_scales"
    file.tensors[name] = file.tensors["d"]
    for field, size in (("indices", 10), ("scales", 1)):
        file.append(f"{name}.{field}", "U8", [size], bytes(size))


def _swap_first_entries(file: _File) -> None:
    """Exchange the first two entries of the second LUT of ``a``."""
    start = file.header["a.luts"]["data_offsets"][0] + 16
    file.data[start], file.data[start + 1] = file.data[start + 1], file.data[start]


def _not_canonical(file: _File) -> None:
    """Write the first entry of ``a`` that has another code with that code: half the significand."""
    start = file.header["a.luts"]["data_offsets"][0]
    for position, code in enumerate(file.data[start : start + 16]):
        half, shift = HIF8.significand(code) / 2, code >> HIF8.significand_bits
        if half == int(half) and half and shift + 1 < HIF8.shifts:
            mask = (1 << HIF8.significand_bits) - 1
            other = shift + 1 << HIF8.significand_bits | int(half) & mask
            return file.poke("a.luts", position, other)


_NEGATIVE = [code for value, code in HIF7.canonical.items() if value < 0][:32]


def _config(text: str) -> _Change:
    """Another configuration, with its right hash."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return lambda file: file.metadata.update(config=text, config_hash=digest)


def _source(tensor: str, index: int | None, count: int | None) -> dict[str, Any]:
    return {"tensor": tensor, "index": index, "count": count, "transposed": True}


def _rename(file: _File, old: str, new: str, source: dict[str, Any]) -> None:
    """Give a quantized tensor another name and a source."""
    file.tensors[new] = {**file.tensors.pop(old), "source": source}
    for name in list(file.header):
        if name.startswith(f"{old}."):
            file.header[new + name.removeprefix(old)] = file.header.pop(name)


def _renamed_slice(name: str, source: dict[str, Any]) -> _Change:
    """Make ``d`` a slice of that name."""
    return lambda file: _rename(file, "d", name, source)


def _index_outside(file: _File) -> None:
    """Two slices of two, with the indices 0 and 2."""
    for name in ("indices", "scales"):
        dtype, shape, (start, stop) = file.header[f"d.{name}"].values()
        file.append(f"s[0].{name}", dtype, shape, bytes(file.data[start:stop]))
    file.tensors["s[0]"] = {**file.tensors["d"], "source": _source("s", 0, 2)}
    _rename(file, "d", "s[2]", _source("s", 2, 2))


def _unlike(file: _File) -> None:
    """Make ``c`` and ``d``, of different shapes, slices of one tensor."""
    _rename(file, "c", "s[0]", _source("s", 0, 2))
    _rename(file, "d", "s[1]", _source("s", 1, 2))


def _without(name: str) -> _Change:
    return lambda file: file.remove(name)


_COLUMNS = "a.corrections.columns"

BROKEN: dict[str, Broken] = {
    # the container
    "header_length": Broken("container", None, "header", "the header is longer than the file",
        _rebuilt(lambda content: (1 << 20).to_bytes(8, "little") + content[8:])),
    "header_not_utf8": Broken("container", None, "header", "a byte that is not UTF-8",
        _header_text(lambda text: text.replace(b'"n"', b'"\xff"'))),
    "header_padding": Broken("container", None, "header", "padded with a newline",
        _header_text(lambda text: text.rstrip(b" ") + b"\n")),
    "cut_off": Broken("container", None, "header", "seven bytes",
        _rebuilt(lambda content: content[:7])),
    "duplicate_tensor": Broken("container", None, "header", "two tensors of one name",
        _header_text(lambda text: text.replace(b'"b.indices"', b'"b.scales"'))),
    "trailing_byte": Broken("container", None, "header", "a byte after the last tensor",
        lambda file: file.data.append(0)),
    "hole": Broken("container", "n", "data_offsets", "bytes that belong to no tensor", _hole),
    "overlap": Broken("container", "n", "data_offsets", "two tensors share bytes", _overlap),
    "shape_of_raw": Broken("container", "n", "data_offsets", "shape and bytes do not agree",
        _entry("n", "shape", [4])),
    "type_of_raw": Broken("container", "n", "dtype", "no type of the safetensors format",
        _entry("n", "dtype", "F31")),
    "bits_of_raw": Broken("container", "n", "shape", "three elements of 4 bits",
        lambda file: file.replace("n", "F4", [3], bytes(2))),
    "no_entry": Broken("container", "x", None, "a number for an entry",
        lambda file: file.header.update(x=3)),
    "no_name": Broken("container", "", "name", "an empty name",
        lambda file: file.append("", "U8", [0], b"")),
    # the metadata
    "another_program": Broken("metadata", None, "__metadata__", "metadata of another program",
        _header_text(lambda text: text.replace(METADATA_KEY.encode(), b"program"))),
    "metadata_list": Broken("metadata", None, METADATA_KEY, "a list for the metadata",
        _header_text(lambda text: re.sub(rb'(r_product":)"(\\.|[^"\\])*"', rb'\1"[]"', text))),
    "config_object": Broken("metadata", None, "config", "an object, as in version 1",
        lambda file: file.metadata.update(config={})),
    "config_list": Broken("metadata", None, "config", "the text of a list", _config("[]")),
    "config_deep": Broken("metadata", None, "config", "nested 17 deep",
        _config('{"a":' * 17 + "1" + "}" * 17)),
    "calibration_list": Broken("metadata", None, "calibration", "a list",
        lambda file: file.metadata.update(calibration=[])),
    "long_integer": Broken("metadata", None, METADATA_KEY, "an integer of 21 digits",
        lambda file: file.metadata.update(calibration={"tokens": 10**20})),
    "version": Broken("metadata", None, "version", "version 1",
        lambda file: file.metadata.update(version=1)),
    "config_hash": Broken("metadata", None, "config_hash", "a space more in the configuration",
        lambda file: file.metadata.update(config=file.metadata["config"] + " ")),
    "unknown_key": Broken("metadata", None, "extra", "a key that version 2 does not have",
        lambda file: file.metadata.update(extra=1)),
    "missing_key": Broken("metadata", "b", "layer_exponent", "no layer exponent",
        lambda file: file.tensors["b"].pop("layer_exponent")),
    "layer_exponent": Broken("metadata", "b", "layer_exponent", "128 does not fit",
        _about("b", "layer_exponent", 128)),
    "format_spelling": Broken("metadata", "b", "format", "not the canonical spelling",
        _about("b", "format", "E4M3^16sBF16")),
    "format_pair": Broken("metadata", "c", "format", "LUTs of 16 and of 32 entries",
        _about("c", "format", "DD4-DD5^8sS1E4M3")),
    "format_number": Broken("metadata", "b", "format", "a number", _about("b", "format", 4)),
    "format_word": Broken("metadata", "c", "format", "a scale word of 17 bits",
        _about("c", "format", "DD5-DD5^8sBF16")),
    "source_type": Broken("metadata", "b", "dtype", "not the name of a type",
        _about("b", "dtype", "F 32")),
    "rank": Broken("metadata", "d", "shape", "three dimensions", _about("d", "shape", [2, 5, 1])),
    "source_name": Broken("metadata", "b", "source", "a slice under another name",
        _about("b", "source", _source("b", 0, 1))),
    "source_key": Broken("metadata", "b", "source", "a key too much",
        _about("b", "source", {**_source("b", None, None), "axis": 0})),
    "source_no_name": Broken("metadata", "[0]", "source", "the name of the stack is empty",
        _renamed_slice("[0]", _source("", 0, 1))),
    "source_flag": Broken("metadata", "b", "source", "1 for true",
        _about("b", "source", {**_source("b", None, None), "transposed": 1})),
    "source_whole": Broken("metadata", "b", "source", "a source that says nothing",
        _about("b", "source", {**_source("b", None, None), "transposed": False})),
    "source_transposed_name": Broken("metadata", "b", "source", "transposed, of another name",
        _about("b", "source", _source("c", None, None))),
    "source_index": Broken("metadata", "s[2]", "source", "index 2 of 2",
        _index_outside),
    "source_incomplete": Broken("metadata", "s[0]", "source", "one slice of two",
        _renamed_slice("s[0]", _source("s", 0, 2))),
    "source_unlike": Broken("metadata", "s[1]", "source", "slices of different shapes", _unlike),
    "source_twice": Broken("layout", "n", None, "in slices and as a whole",
        _renamed_slice("n[0]", _source("n", 0, 1))),
    "lut_format": Broken("metadata", "a", "hif", "no such format of LUT entries",
        _about("a", "hif", "HIF9")),
    "no_rows": Broken("metadata", "d", "shape", "no rows",
        _about("d", "shape", [0, 5])),
    # which fields there are
    "luts_missing": Broken("layout", "a", "luts", "no LUTs", _without("a.luts")),
    "row_scales_unwanted": Broken("layout", "c", "row_scales", "the format has no row scales",
        lambda file: file.append("c.row_scales", "BF16", [1], b"\x80\x3f")),
    "indices_short": Broken("layout", "c", "indices", "a byte less than the shape needs",
        lambda file: file.replace("c.indices", "U8", [14], bytes(14))),
    "one_lut": Broken("layout", "a", "luts", "one LUT for a pair",
        lambda file: file.replace("a.luts", "U8", [1, 16], bytes(16))),
    "indptr_missing": Broken("layout", "a", "corrections.indptr", "no row pointers",
        _without("a.corrections.indptr")),
    "wide_columns": Broken("layout", "a", "corrections.columns", "32 bits for 20 columns",
        lambda file: file.replace(_COLUMNS, "U32", [3], struct.pack("<3I", 3, 7, 19))),
    "stored_twice": Broken("layout", "a", "name", "the same name as it came",
        lambda file: file.append("a", "U8", [0], b"")),
    "name_of_a_field": Broken("layout", "b.row_scales", "name", "named as a field that b may have",
        _named_as_a_field),
    # planes and codes
    "bits_after_the_last": Broken("plane", "c", "scales", "a bit after the last scale word",
        _poke("c.scales", 3, 0xF8)),
    "lut_not_canonical": Broken("code", "a", "luts[0]", "not the code of smallest shift",
        _not_canonical),
    "lut_descends": Broken("code", "a", "luts[1]", "two entries exchanged", _swap_first_entries),
    "lut_reserved": Broken("code", "a", "luts[1]", "shift 7 of HIF8", _poke("a.luts", 19, 0xE1)),
    "lut_wide": Broken("code", "c", "luts[0]", "eight bits for HIF7", _poke("c.luts", 0, 0xF0)),
    "lut_one_sided": Broken("code", "c", "luts[1]", "no entry above zero",
        lambda file: file.poke("c.luts", 32, *_NEGATIVE)),
    "element_nan": Broken("code", "b", "indices", "NaN of E4M3", _poke("b.indices", 1, 0xFF)),
    "padding_nan": Broken("code", "b", "indices", "NaN of E4M3 in padding",
        _poke("b.indices", 31, 0x7F)),
    "element_reserved": Broken("code", "d", "indices", "-128 of INT8", _poke("d.indices", 9, 0x80)),
    "scale_reserved": Broken("code", "b", "scales", "infinity of bfloat16",
        _poke("b.scales", 2, 0x80, 0x7F)),
    "row_scale_reserved": Broken("code", "a", "row_scales", "infinity of bfloat16",
        _poke("a.row_scales", 2, 0x80, 0xFF)),
    # corrections
    "indptr_start": Broken("corrections", "a", "corrections.indptr", "does not start at 0",
        _poke("a.corrections.indptr", 0, 1)),
    "indptr_descends": Broken("corrections", "a", "corrections.indptr", "descends",
        _poke("a.corrections.indptr", 4, 4)),
    "column_twice": Broken("corrections", "a", "corrections.columns", "one column twice in a row",
        _poke(_COLUMNS, 2, 3, 0)),
    "column_outside": Broken("corrections", "a", "corrections.columns", "a column past the last",
        _poke(_COLUMNS, 4, 20, 0)),
    "correction_nan": Broken("corrections", "a", "corrections.values", "NaN of bfloat16",
        _poke("a.corrections.values", 2, 0xC0, 0x7F)),
    # values
    "overflow": Broken("range", "b", None, "a weight of 2^128", _out_of_range(0x7F00, 0x40, 1)),
    "underflow": Broken("range", "b", None, "a weight of 2^-127", _out_of_range(0x0080, 0x30, 0)),
    "padding_overflow": Broken("range", "b", None, "2^128 in padding alone",
        _out_of_range(0x7F00, 0x40, 63)),
    "padding_underflow": Broken("range", "b", None, "2^-127 in padding alone",
        _out_of_range(0x0080, 0x30, 63)),
    "sum_overflow": Broken("range", "e", "corrections.values", "weight plus correction overflow",
        _overflowing_sum),
}  # fmt: skip
"""Broken checkpoints by file name without extension."""


def _broken(name: str) -> bytes:
    file = _File(_base())
    whole = BROKEN[name].change(file)
    return whole if isinstance(whole, bytes) else file.build()


def _verdict(name: str) -> dict[str, Any]:
    broken = BROKEN[name]
    verdict = {"kind": broken.kind, "tensor": broken.tensor, "field": broken.field}
    return {"file": f"broken_{name}.safetensors", "verdict": verdict, "why": broken.why}


# ---------------------------------------------------------------------------------------- jobs


def _json(cases: list[dict[str, Any]]) -> VectorFile:
    return VectorFile(json_text({"cases": cases}), len(cases))


def _binary(name: str, build: Callable[[], bytes]) -> VectorJob:
    return VectorJob(_FOLDER, name, lambda: VectorFile(build(), 1))


def checkpoint_jobs(formats: Sequence[QuantFormat], *, whole: bool) -> list[VectorJob]:
    """Checkpoints of a set.

    Parameters
    ----------
    formats : sequence of QuantFormat
        Of the checkpoint that mixes everything.
    whole : bool
        Also one of wide matrices, one that another program could have written, the one from which
        the broken ones are made, and the broken ones.
    """
    unique = list({file_stem(fmt): fmt for fmt in formats}.values())
    good: dict[str, Callable[[], bytes]] = {
        "mixed": lambda: _written(lambda writer: _add_mixed(writer, unique))
    }
    if whole:
        good |= {"wide": lambda: _written(_add_wide), "whole": _base, "foreign": _foreign}

    def expected() -> VectorFile:
        return _json([_expected(f"{name}.safetensors", build()) for name, build in good.items()])

    jobs = [_binary(f"{name}.safetensors", build) for name, build in good.items()]
    jobs.append(VectorJob(_FOLDER, "expected.json", expected))
    return jobs + (list(_broken_jobs()) if whole else [])


def _broken_jobs() -> Iterator[VectorJob]:
    for name in BROKEN:
        yield _binary(f"broken_{name}.safetensors", partial(_broken, name))
    yield VectorJob(_FOLDER, "verdicts.json", lambda: _json([_verdict(name) for name in BROKEN]))
