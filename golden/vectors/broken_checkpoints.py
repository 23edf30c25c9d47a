"""Ways to break a checkpoint, each in one respect, and what every reader says to it.

The names ``a`` to ``d`` and ``n`` are those of the tensors of one small file
(:func:`golden.vectors.checkpoints.whole_checkpoint`).
"""

import hashlib
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from golden.checkpoint import METADATA_KEY
from golden.formats import HIF7, HIF8
from golden.vectors.checkpoint_parts import CheckpointParts

__all__ = ["BROKEN", "Broken", "break_checkpoint", "verdict_on"]

_Change = Callable[[CheckpointParts], bytes | None]


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

    def change(file: CheckpointParts) -> None:
        file.tensors["b"]["layer_exponent"] = 0
        file.poke("b.indices", 0, *[0] * 64)
        file.poke("b.indices", position, index)
        for block in range(4):
            file.poke("b.scales", 2 * block, *scale.to_bytes(2, "little"))

    return change


def _overflowing_sum(file: CheckpointParts) -> None:
    """Make a weight of ``a`` and its correction of the same sign nearly 2^128."""
    largest = (0x7F7F).to_bytes(2, "little")
    file.append("e.indices", "U8", [16], bytes([0x7E] * 16))  # 448 in E4M3
    file.append("e.scales", "U8", [2], (0x7B00).to_bytes(2, "little"))  # 2^119
    file.append("e.corrections.indptr", "U32", [2], struct.pack("<2I", 0, 1))
    file.append("e.corrections.columns", "U16", [1], b"\0\0")
    file.append("e.corrections.values", "BF16", [1], largest)
    file.tensors["e"] = {**file.tensors["b"], "shape": [1, 16], "layer_exponent": 0}


def _hole(file: CheckpointParts) -> None:
    """Put four bytes in front of ``n``, behind all others."""
    file.remove("n")
    file.data += bytes(4)
    file.append("n", "F32", [3], bytes(12))


def _overlap(file: CheckpointParts) -> None:
    """Let ``n`` share its first four bytes with the tensor before it."""
    file.replace("n", "F32", [2], bytes(8))
    start, stop = file.header["n"]["data_offsets"]
    file.header["n"] = {"dtype": "F32", "shape": [3], "data_offsets": [start - 4, stop]}


def _named_as_a_field(file: CheckpointParts) -> None:
    """Store a complete tensor under the name of a field that ``b`` does not have."""
    name = "b.row_scales"
    file.tensors[name] = file.tensors["d"]
    for field, size in (("indices", 10), ("scales", 1)):
        file.append(f"{name}.{field}", "U8", [size], bytes(size))


def _swap_first_entries(file: CheckpointParts) -> None:
    """Exchange the first two entries of the second LUT of ``a``."""
    start = file.header["a.luts"]["data_offsets"][0] + 16
    file.data[start], file.data[start + 1] = file.data[start + 1], file.data[start]


def _not_canonical(file: CheckpointParts) -> None:
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


def _rename(file: CheckpointParts, old: str, new: str, source: dict[str, Any]) -> None:
    """Give a quantized tensor another name and a source."""
    file.tensors[new] = {**file.tensors.pop(old), "source": source}
    for name in list(file.header):
        if name.startswith(f"{old}."):
            file.header[new + name.removeprefix(old)] = file.header.pop(name)


def _renamed_slice(name: str, source: dict[str, Any]) -> _Change:
    """Make ``d`` a slice of that name."""
    return lambda file: _rename(file, "d", name, source)


def _index_outside(file: CheckpointParts) -> None:
    """Two slices of two, with the indices 0 and 2."""
    for name in ("indices", "scales"):
        dtype, shape, (start, stop) = file.header[f"d.{name}"].values()
        file.append(f"s[0].{name}", dtype, shape, bytes(file.data[start:stop]))
    file.tensors["s[0]"] = {**file.tensors["d"], "source": _source("s", 0, 2)}
    _rename(file, "d", "s[2]", _source("s", 2, 2))


def _unlike(file: CheckpointParts) -> None:
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


def break_checkpoint(name: str, whole: bytes) -> bytes:
    """One of :data:`BROKEN`, made from the file that has the tensors which they name."""
    file = CheckpointParts(whole)
    content = BROKEN[name].change(file)
    return content if isinstance(content, bytes) else file.build()


def verdict_on(name: str) -> dict[str, Any]:
    """JSON-ready entry of ``verdicts.json`` for one of :data:`BROKEN`."""
    broken = BROKEN[name]
    verdict = {"kind": broken.kind, "tensor": broken.tensor, "field": broken.field}
    return {"file": f"broken_{name}.safetensors", "verdict": verdict, "why": broken.why}
