"""Differences in the codes of one matrix that two checkpoints hold in the same format and shape."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from golden.checkpoint import StoredTensor
from golden.corrections import Corrections
from golden.formats import BF16
from golden.tensor import QuantizedTensor
from sop.checkpoints.differences import Difference, Found, Place, top_bit
from sop.files.tensor_info import Matrix
from sop.files.weights import Weights

__all__ = ["matrix_differences"]

_NO_ENTRY = -1  # among the bit patterns of corrections


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


def matrix_differences(
    matrix: Matrix, a: StoredTensor, b: StoredTensor, source: Weights | None
) -> Iterator[Found]:
    """All differences, in the order in which fields are stored; none if formats or shapes differ.

    Parameters
    ----------
    matrix : Matrix
        As the first checkpoint describes it.
    a, b : StoredTensor
        What the two hold.
    source : Weights or None
        The model that was quantized, to tell the quotient behind the first index that differs.

    Raises
    ------
    InputError
        If the source does not have the tensor of that index; raised when it is described.
    """
    if _codes_are_comparable(a.tensor, b.tensor):
        pair = _Pair(matrix, a.tensor, b.tensor)
        yield from _lut_differences(pair)
        yield from _row_scale_differences(pair)
        yield from _scale_differences(pair)
        yield from _index_differences(pair, source)
        yield from _correction_differences(matrix.name, a.corrections, b.corrections)


def _codes_are_comparable(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    same_levels = a.format.hif == b.format.hif or not a.format.codebooks
    return a.format.name == b.format.name and a.shape == b.shape and same_levels


def _first(differs: NDArray[np.bool_]) -> tuple[int, ...]:
    """Position of the first True in row-major order."""
    return tuple(int(i) for i in np.unravel_index(int(differs.argmax()), differs.shape))


def _number(value: Fraction | int) -> str:
    """Value as Python prints a float; exact, as all values here have few bits."""
    return f"{float(value)!r}".removesuffix(".0")


def _lut_differences(pair: _Pair) -> Iterator[Found]:
    codes = [np.array([lut.codes for lut in tensor.luts]) for tensor in pair.tensors]
    differs = codes[0] != codes[1]
    if not differs.any():
        return

    def first() -> Difference:
        lut, entry = _first(differs)
        one, two = (int(table[lut, entry]) for table in codes)
        values = [tensor.luts[lut].values[entry] for tensor in pair.tensors]
        facts = (f"values {values[0]} and {values[1]}",)
        place = Place(pair.name, key=f"LUT {lut}, entry {entry}", bit=top_bit(one ^ two))
        return Difference("luts", place, f"{one:#x}", f"{two:#x}", facts, "luts")

    yield Found("luts", int(differs.sum()), first)


def _row_scale_differences(pair: _Pair) -> Iterator[Found]:
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
        place = Place(pair.name, row, bit=top_bit(one ^ two))
        return Difference("row_scales", place, f"{one:#06x}", f"{two:#06x}", facts, "row_scales")

    yield Found("row_scales", int(differs.sum()), first)


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


def _scale_differences(pair: _Pair) -> Iterator[Found]:
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
            make = partial(_scale_difference, pair, field, place, top_bit(int(bits[place])))
            found.append((place != first, Found(field, int(np.count_nonzero(bits)), make)))
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


def _index_differences(pair: _Pair, source: Weights | None) -> Iterator[Found]:
    differs = pair.a.indices != pair.b.indices
    if differs.any():
        first = partial(_index_difference, pair, _first(differs), source)
        yield Found("indices", int(differs.sum()), first)


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
    place = Place(pair.name, row, block, weight, column, bit=top_bit(one ^ two))
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
) -> Iterator[Found]:
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
        yield Found("corrections", int(differs.sum()), first)
    elif (a is None) != (b is None):
        shown = ["none" if c is None else "stored but empty" for c in (a, b)]
        first = partial(
            Difference, "corrections", Place(name), shown[0], shown[1], (), "corrections"
        )
        yield Found("corrections", 1, first)


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
        place = replace(place, bit=top_bit(codes[0] ^ codes[1]))
    return Difference("corrections", place, shown[0], shown[1], tuple(facts), "corrections")
