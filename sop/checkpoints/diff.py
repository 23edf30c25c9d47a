"""The first difference of two checkpoints, the rule that decides what differs, and counts.

Parts are looked at in a fixed order: configuration, calibration, list of tensors; then tensor by
tensor, in order of name, its format, layer exponent, LUTs, row scales, scale words, indices and
corrections; then the tensors that are stored as they came. Blocks, weights and entries are taken in
the order in which they are stored, bits from the top of a code down.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.checkpoint import Checkpoint, QuantizedInfo
from golden.corrections import Corrections
from golden.formats import BF16
from golden.tensor import QuantizedTensor
from sop.checkpoints.diff_rules import RULES
from sop.files.tensor_info import Matrix
from sop.files.weights import Weights
from sop.shared.progress import Report

__all__ = ["FIELDS", "DiffReport", "Difference", "Place", "diff_checkpoints"]

FIELDS = (
    "config", "calibration", "tensors", "format", "layer_exponent", "luts", "row_scales",
    "metabit", "sign", "exponent", "mantissa", "indices", "corrections", "raw",
)  # fmt: skip
"""What is counted, in the order in which the first difference is looked for.

A LUT entry, a row scale, each field of a scale word, an index and a correction count one each; of a
format each of its parts; of a raw tensor the tensor.
"""

_NO_ENTRY = -1  # among the bit patterns of corrections


@dataclass(frozen=True)
class Place:
    """Where a difference is; what does not apply is None.

    Attributes
    ----------
    tensor : str or None
    row, block, weight : int or None
        The block is counted in its row, the weight in its block.
    column : int or None
        Column of the weight in the matrix.
    key : str or None
        What else tells the place: a key of the configuration, a LUT and its entry, a byte.
    bit : int or None
        The highest bit of the code (for a scale word: of the whole word) that differs; 0 is the
        least significant.
    """

    tensor: str | None = None
    row: int | None = None
    block: int | None = None
    weight: int | None = None
    column: int | None = None
    key: str | None = None
    bit: int | None = None

    def __str__(self) -> str:
        """Return the place as words."""
        parts = [] if self.tensor is None else [f"tensor {self.tensor!r}"]
        for what in ("row", "block", "weight", "column", "key", "bit"):
            value = getattr(self, what)
            if value is not None:
                parts.append(value if what == "key" else f"{what} {value}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Difference:
    """One difference.

    Attributes
    ----------
    field : str
        One of :data:`FIELDS`.
    place : Place
    a, b : str
        What the two files hold.
    facts : tuple of str
        What the values mean and were decided by.
    rule : str
        A key of :data:`RULES`.
    """

    field: str
    place: Place
    a: str
    b: str
    facts: tuple[str, ...]
    rule: str

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        document, words = RULES[self.rule].source
        place = {key: value for key, value in vars(self.place).items() if value is not None}
        return {
            "field": self.field,
            **place,
            "a": self.a,
            "b": self.b,
            "facts": list(self.facts),
            "rule": RULES[self.rule].text,
            "rule_source": f"{document}: {words.strip('*')}",
        }


@dataclass(frozen=True)
class DiffReport:
    """Result of :func:`diff_checkpoints`.

    Attributes
    ----------
    first : Difference or None
        None if the files hold the same.
    counts : dict of str to int
        Number of differences of each of :data:`FIELDS`.
    """

    first: Difference | None
    counts: dict[str, int]

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return self.first is None


@dataclass(frozen=True)
class _Found:
    """Differences of one field in one tensor or file: how many, and how to describe the first."""

    field: str
    count: int
    first: Callable[[], Difference]


def diff_checkpoints(
    a: Checkpoint, b: Checkpoint, source: Weights | None, report: Report
) -> DiffReport:
    """Compare everything that two checkpoints hold; memory holds one pair of tensors.

    Parameters
    ----------
    a, b : Checkpoint
    source : Weights or None
        The model that was quantized, to tell the quotient behind the first index that differs.
    report : callable
        See :data:`sop.shared.progress.Report`; counts tensors.

    Raises
    ------
    InputError
        If a tensor is broken, or the source does not have the tensor of that index.
    """
    first = None
    counts = dict.fromkeys(FIELDS, 0)
    for found in _all_differences(a, b, source, report):
        first = first or found.first()
        counts[found.field] += found.count
    return DiffReport(first, counts)


def _all_differences(
    a: Checkpoint, b: Checkpoint, source: Weights | None, report: Report
) -> Iterator[_Found]:
    yield from _file_differences(a, b)
    both = [name for name in a.names if name in b.names]
    raw = [name for name in a.raw_names if name in b.raw_names]
    for done, name in enumerate(both):
        report(done, len(both) + len(raw))
        yield from _info_differences(name, a.info(name), b.info(name))
        # Read also what cannot be compared, so that a broken tensor is found.
        one, two = a.read(name), b.read(name)
        if _codes_are_comparable(one.tensor, two.tensor):
            pair = _Pair(Matrix.of_checkpoint(name, a.info(name)), one.tensor, two.tensor)
            yield from _lut_differences(pair)
            yield from _row_scale_differences(pair)
            yield from _scale_differences(pair)
            yield from _index_differences(pair, source)
            yield from _correction_differences(name, one.corrections, two.corrections)
    for done, name in enumerate(raw, len(both)):
        report(done, len(both) + len(raw))
        yield from _raw_differences(a, b, name)


# -------------------------------------------------------------------------------------- the header


def _file_differences(a: Checkpoint, b: Checkpoint) -> Iterator[_Found]:
    yield from _table_differences("config", *(_leaves(c.config) for c in (a, b)))
    yield from _table_differences("calibration", *(_leaves(c.calibration) for c in (a, b)))
    kinds = [
        dict.fromkeys(c.names, "quantized") | dict.fromkeys(c.raw_names, "stored as it came")
        for c in (a, b)
    ]
    yield from _table_differences("tensors", *kinds)


def _leaves(value: object, key: str = "") -> dict[str, str]:
    """JSON values by their path, such as ``scales.mode``; as JSON, so that 1 is not true."""
    if isinstance(value, dict) and value:
        leaves: dict[str, str] = {}
        for name, item in value.items():
            leaves |= _leaves(item, f"{key}.{name}" if key else name)
        return leaves
    return {key or "(whole)": json.dumps(value)}


def _table_differences(field: str, a: dict[str, str], b: dict[str, str]) -> Iterator[_Found]:
    keys = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    if keys:
        key = keys[0]
        values = a.get(key, "absent"), b.get(key, "absent")
        place = Place(tensor=key) if field == "tensors" else Place(key=key)
        yield _Found(field, len(keys), lambda: Difference(field, place, *values, (), field))


def _info_differences(name: str, a: QuantizedInfo, b: QuantizedInfo) -> Iterator[_Found]:
    parts = [
        {
            "format": info.format.name,
            "LUT entries": info.format.hif.name,
            "shape": f"{info.shape[0]}x{info.shape[1]}",
            "type before quantization": info.source_dtype,
            "place in the model": _place(info),
        }
        for info in (a, b)
    ]
    keys = [key for key in parts[0] if parts[0][key] != parts[1][key]]
    if keys:
        key = keys[0]
        values = parts[0][key], parts[1][key]
        place = Place(name, key=key)
        yield _Found(
            "format", len(keys), lambda: Difference("format", place, *values, (), "format")
        )
    if a.layer_exponent != b.layer_exponent:
        field, exponents = "layer_exponent", (str(a.layer_exponent), str(b.layer_exponent))
        yield _Found(field, 1, lambda: Difference(field, Place(name), *exponents, (), field))


def _place(info: QuantizedInfo) -> str:
    source = info.source
    if source is None:
        return "as it is"
    part = "whole" if source.index is None else f"slice {source.index} of {source.count}"
    return f"{source.tensor!r}, {part}{', transposed' * source.transposed}"


def _raw_differences(a: Checkpoint, b: Checkpoint, name: str) -> Iterator[_Found]:
    infos = [f"{info.dtype} {list(info.shape)}" for info in (a.raw_info(name), b.raw_info(name))]
    if infos[0] != infos[1]:
        values = infos[0], infos[1]
        yield _Found("raw", 1, lambda: Difference("raw", Place(name), *values, (), "raw"))
        return
    start = 0
    for one, two in zip(a.raw_chunks(name), b.raw_chunks(name), strict=True):
        if one != two:
            yield _Found("raw", 1, partial(_raw_difference, name, one, two, start))
            return
        start += len(one)


def _raw_difference(name: str, a: bytes, b: bytes, start: int) -> Difference:
    position = next(i for i, (one, two) in enumerate(zip(a, b, strict=True)) if one != two)
    one, two = a[position], b[position]
    place = Place(name, key=f"byte {start + position}", bit=_top_bit(one ^ two))
    return Difference("raw", place, f"{one:#04x}", f"{two:#04x}", (), "raw")


# --------------------------------------------------------------------------------------- one tensor


@dataclass(frozen=True)
class _Pair:
    """The same matrix of both files, of one format and shape."""

    matrix: Matrix
    a: QuantizedTensor
    b: QuantizedTensor

    @property
    def name(self) -> str:
        """Name of the matrix."""
        return self.matrix.name

    @property
    def tensors(self) -> tuple[QuantizedTensor, QuantizedTensor]:
        """Both tensors."""
        return self.a, self.b


def _codes_are_comparable(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    same_levels = a.format.hif == b.format.hif or not a.format.codebooks
    return a.format.name == b.format.name and a.shape == b.shape and same_levels


def _top_bit(mask: int) -> int:
    return mask.bit_length() - 1


def _first(differs: NDArray[np.bool_]) -> tuple[int, ...]:
    """Position of the first True in row-major order."""
    return tuple(int(i) for i in np.unravel_index(int(differs.argmax()), differs.shape))


def _number(value: Fraction | int) -> str:
    """Value as Python prints a float; exact, as all values here have few bits."""
    return f"{float(value)!r}".removesuffix(".0")


def _lut_differences(pair: _Pair) -> Iterator[_Found]:
    codes = [np.array([lut.codes for lut in tensor.luts]) for tensor in pair.tensors]
    differs = codes[0] != codes[1]
    if not differs.any():
        return

    def first() -> Difference:
        lut, entry = _first(differs)
        one, two = (int(table[lut, entry]) for table in codes)
        values = [tensor.luts[lut].values[entry] for tensor in pair.tensors]
        facts = (f"values {values[0]} and {values[1]}",)
        place = Place(pair.name, key=f"LUT {lut}, entry {entry}", bit=_top_bit(one ^ two))
        return Difference("luts", place, f"{one:#x}", f"{two:#x}", facts, "luts")

    yield _Found("luts", int(differs.sum()), first)


def _row_scale_differences(pair: _Pair) -> Iterator[_Found]:
    if pair.a.row_scales is None or pair.b.row_scales is None:
        return
    codes = pair.a.row_scales, pair.b.row_scales
    differs = codes[0] != codes[1]
    if not differs.any():
        return

    def first() -> Difference:
        (row,) = _first(differs)
        one, two = (int(scales[row]) for scales in codes)
        values = [_number(BF16.decode(code).value) for code in (one, two)]
        facts = (f"values {values[0]} and {values[1]}",)
        place = Place(pair.name, row, bit=_top_bit(one ^ two))
        return Difference("row_scales", place, f"{one:#06x}", f"{two:#06x}", facts, "row_scales")

    yield _Found("row_scales", int(differs.sum()), first)


def _block_scale(tensor: QuantizedTensor, row: int, block: int) -> Fraction:
    """What the elements of a block are multiplied with, row scale included."""
    code = int(tensor.scale_codes[row, block])
    scale = tensor.format.word.scale.decode(code).value * Fraction(2) ** tensor.layer_exponent
    if tensor.row_scales is not None:
        scale *= BF16.decode(int(tensor.row_scales[row])).value
    return scale


def _describe_scale(tensor: QuantizedTensor, row: int, block: int) -> str:
    text = f"scale code {int(tensor.scale_codes[row, block]):#x}, "
    text += f"scale {_number(_block_scale(tensor, row, block))}"
    if tensor.format.word.metabit_bits:
        text = f"metabit {int(tensor.metabits[row, block])}, {text}"
    return text


def _scale_differences(pair: _Pair) -> Iterator[_Found]:
    """One for each field of the scale word; those that differ in the first word come first."""
    changed = pair.a.scale_words ^ pair.b.scale_words
    if not changed.any():
        return
    first = _first(changed != 0)
    found = []
    offset = pair.a.format.word.width
    for field, width in reversed(pair.a.format.word.fields):
        offset -= width
        bits = changed & np.uint16(((1 << width) - 1) << offset)
        if bits.any():
            place = _first(bits != 0)
            make = partial(_scale_difference, pair, field, place, _top_bit(int(bits[place])))
            found.append((place != first, _Found(field, int(np.count_nonzero(bits)), make)))
    # The sort is stable: fields run from the top bit down among those of the first word.
    yield from (one for _, one in sorted(found, key=lambda item: item[0]))


def _scale_difference(pair: _Pair, field: str, where: tuple[int, ...], bit: int) -> Difference:
    row, block = where
    digits = 2 + -(-pair.a.format.word.width // 4)
    words = [f"{int(tensor.scale_words[where]):#0{digits}x}" for tensor in pair.tensors]
    facts = [
        f"{file}: {_describe_scale(tensor, row, block)}"
        for file, tensor in zip("AB", pair.tensors, strict=True)
    ]
    place = Place(pair.name, row, block, bit=bit)
    rule = _scale_rule(pair, field, where)
    return Difference(field, place, words[0], words[1], tuple(facts), rule)


def _scale_rule(pair: _Pair, field: str, where: tuple[int, ...]) -> str:
    if 0 in (int(tensor.scale_codes[where]) for tensor in pair.tensors):
        return "zero_block"
    return "metabit" if field == "metabit" else "scale"


def _index_differences(pair: _Pair, source: Weights | None) -> Iterator[_Found]:
    differs = pair.a.indices != pair.b.indices
    if differs.any():
        first = partial(_index_difference, pair, _first(differs), source)
        yield _Found("indices", int(differs.sum()), first)


def _index_difference(pair: _Pair, where: tuple[int, ...], source: Weights | None) -> Difference:
    stored_row, block, weight = where
    columns = pair.a.shape[1]
    # With one scale for the whole tensor, all of it is stored as one row of one block.
    size = pair.a.format.block_size
    row, column = (stored_row, block * size + weight) if size else divmod(weight, columns)
    one, two = (int(tensor.indices[where]) for tensor in pair.tensors)
    facts, rule = [], "padding"
    if column < columns:
        rule = "index"
        facts = _index_facts(pair.a, (stored_row, block), (one, two))
        if source is not None:
            facts += _quotient(pair, (stored_row, block), (row, column), source)
    place = Place(pair.name, row, block, weight, column, bit=_top_bit(one ^ two))
    return Difference("indices", place, str(one), str(two), tuple(facts), rule)


def _index_facts(
    tensor: QuantizedTensor, where: tuple[int, int], indices: tuple[int, int]
) -> list[str]:
    """What two indices of a block mean; exponent, LUTs and scale words were found to be equal."""
    one, two = (_level(tensor, where, index) for index in indices)
    middle, scale = (one + two) / 2, _block_scale(tensor, *where)
    return [
        f"levels {_number(one)} and {_number(two)}, {_describe_scale(tensor, *where)}",
        f"midpoint {_number(middle)}, that is a weight of {_number(middle * scale)}",
    ]


def _level(tensor: QuantizedTensor, where: tuple[int, int], index: int) -> Fraction:
    if tensor.format.atom is not None:
        return tensor.format.atom.decode(index).value
    return Fraction(int(tensor.luts[int(tensor.metabits[where])].values[index]))


def _quotient(
    pair: _Pair, where: tuple[int, int], position: tuple[int, int], source: Weights
) -> list[str]:
    """Weight of the model and, unless the block is zero, its quotient."""
    weight = float(source.read_matrix(pair.matrix)[position])
    scale = _block_scale(pair.a, *where)
    fact = f"weight of the model {weight!r}"
    if isfinite(weight) and scale:
        fact += f", quotient {float(Fraction(weight) / scale)!r}"
    return [fact]


def _correction_differences(
    name: str, a: Corrections | None, b: Corrections | None
) -> Iterator[_Found]:
    entries = [_entries(corrections) for corrections in (a, b)]
    positions = np.union1d(entries[0][0], entries[1][0])
    values = [np.full(len(positions), _NO_ENTRY) for _ in entries]
    for found, (places, codes) in zip(values, entries, strict=True):
        found[np.searchsorted(positions, places)] = codes
    differs = values[0] != values[1]
    if differs.any():
        columns = next(c.shape[1] for c in (a, b) if c is not None)
        where = int(differs.argmax())
        row, column = divmod(int(positions[where]), columns)
        pair = [int(found[where]) for found in values]
        first = partial(_correction_difference, Place(name, row, column=column), pair)
        yield _Found("corrections", int(differs.sum()), first)
    elif (a is None) != (b is None):
        shown = ["none" if c is None else "stored but empty" for c in (a, b)]
        first = partial(
            Difference, "corrections", Place(name), shown[0], shown[1], (), "corrections"
        )
        yield _Found("corrections", 1, first)


def _entries(corrections: Corrections | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions in the flat matrix, ascending, and bfloat16 bit patterns."""
    if corrections is None:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    rows, columns = corrections.shape
    row = np.repeat(np.arange(rows, dtype=np.int64), np.diff(corrections.indptr))
    return row * columns + corrections.columns, corrections.values.astype(np.int64)


def _correction_difference(place: Place, codes: Sequence[int]) -> Difference:
    shown, facts = [], []
    for file, code in zip("AB", codes, strict=True):
        shown.append("no entry" if code == _NO_ENTRY else f"{code:#06x}")
        if code != _NO_ENTRY:
            facts.append(f"{file}: value {_number(BF16.decode(code).value)}")
    if _NO_ENTRY not in codes:
        place = replace(place, bit=_top_bit(codes[0] ^ codes[1]))
    return Difference("corrections", place, shown[0], shown[1], tuple(facts), "corrections")
