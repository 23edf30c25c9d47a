"""The fields of a quantized tensor: their names, types and sizes, and their bytes both ways."""

from collections.abc import Callable, Collection, Iterator
from functools import lru_cache
from math import prod

import numpy as np
from numpy.typing import NDArray

from golden.checkpoint.info import QuantizedInfo, StoredTensor, located_corrections
from golden.codebooks import Lut
from golden.container import RawInfo
from golden.corrections import Corrections, column_dtype
from golden.errors import InputError, located
from golden.formats import BF16, Kind, NumberFormat
from golden.packing import plane_bytes, unpack_bits
from golden.tensor import QuantizedTensor

__all__ = [
    "CORRECTION_FIELDS",
    "FIELDS",
    "check_codes",
    "field_arrays",
    "field_infos",
    "tensor_of_fields",
]

CORRECTION_FIELDS = ("corrections.indptr", "corrections.columns", "corrections.values")
FIELDS = ("indices", "scales", "luts", "row_scales", *CORRECTION_FIELDS)


def field_infos(info: QuantizedInfo, entries: int | None) -> dict[str, RawInfo]:
    """Type and shape of every stored field; ``entries`` is the number of corrections, if any."""
    fmt, (rows, columns) = info.format, info.shape
    stored = fmt.block_shape(rows, columns)
    fields = {
        "indices": RawInfo("U8", (plane_bytes(prod(stored), fmt.index_bits),)),
        "scales": RawInfo("U8", (plane_bytes(prod(stored[:2]), fmt.word.width),)),
    }
    if fmt.codebooks:
        fields["luts"] = RawInfo("U8", (len(fmt.codebooks), fmt.lut_entries))
    if fmt.row_scale:
        fields["row_scales"] = RawInfo("BF16", (rows,))
    if entries is not None:
        column_type = "U16" if column_dtype(columns) is np.uint16 else "U32"
        infos = RawInfo("U32", (rows + 1,)), RawInfo(column_type, (entries,))
        fields |= zip(CORRECTION_FIELDS, (*infos, RawInfo("BF16", (entries,))), strict=True)
    return fields


def field_arrays(
    tensor: QuantizedTensor, corrections: Corrections | None
) -> Iterator[tuple[str, NDArray[np.unsignedinteger]]]:
    """Name and elements of every stored field, little-endian, made one after the other."""
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


def tensor_of_fields(
    info: QuantizedInfo, present: Collection[str], read: Callable[[str], NDArray[np.uint8]]
) -> StoredTensor:
    """Quantized tensor of its stored fields; the inverse of :func:`field_arrays`.

    Parameters
    ----------
    info : QuantizedInfo
    present : collection of str
        Names of the fields, which must be those of :func:`field_infos`.
    read : callable
        Gives the bytes of a field.

    Raises
    ------
    InputError
        If a code is NaN or reserved, a LUT is not one, corrections are not valid, or ``read``
        raises one; the message names the field.
    """

    def elements(field: str, width: int) -> NDArray[np.unsignedinteger]:
        with located(f"field {field!r}"):
            return read(field).view(f"<u{width}").astype(f"u{width}", copy=False)

    def plane(field: str, width: int, shape: tuple[int, ...]) -> NDArray[np.unsignedinteger]:
        with located(f"field {field!r}"):
            return unpack_bits(read(field), width, prod(shape)).reshape(shape)

    fmt, stored = info.format, info.format.block_shape(*info.shape)
    words = plane("scales", fmt.word.width, stored[:2]).astype(np.uint16)
    luts = []
    if fmt.codebooks:
        tables = elements("luts", 1).reshape(-1, fmt.lut_entries)
        for position, codes in enumerate(tables.tolist()):
            with located(f"field 'luts[{position}]'"):
                luts.append(Lut(fmt.hif, tuple(codes)))
    tensor = QuantizedTensor(
        fmt,
        info.shape,
        plane("indices", fmt.index_bits, stored),
        words,
        tuple(luts),
        info.layer_exponent,
        elements("row_scales", 2) if fmt.row_scale else None,
    )
    check_codes(tensor)
    if CORRECTION_FIELDS[0] not in present:
        return StoredTensor(tensor, None)
    widths = 4, np.dtype(column_dtype(info.shape[1])).itemsize, 2
    indptr, columns, values = map(elements, CORRECTION_FIELDS, widths)
    with located_corrections():
        corrections = Corrections(info.shape, indptr.astype(np.int64), columns, values)
    return StoredTensor(tensor, corrections)


@lru_cache(maxsize=64)
def _codes_without_value(fmt: NumberFormat) -> NDArray[np.bool_]:
    kinds = [fmt.decode(code).kind for code in range(1 << fmt.width)]
    return np.array([kind in (Kind.NAN, Kind.RESERVED) for kind in kinds])


def _refuse_codes(field: str, codes: NDArray[np.unsignedinteger], fmt: NumberFormat) -> None:
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


def check_codes(tensor: QuantizedTensor) -> None:
    """Refuse NaN and reserved codes of elements, scales and row scales.

    Raises
    ------
    InputError
        The message names the field and the position.
    """
    if tensor.format.atom is not None:
        _refuse_codes("indices", tensor.indices, tensor.format.atom)
    _refuse_codes("scales", tensor.scale_codes, tensor.format.word.scale)
    if tensor.row_scales is not None:
        _refuse_codes("row_scales", tensor.row_scales, BF16)
