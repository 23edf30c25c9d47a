"""Vectors of decoding: packed tensors, every index under every scale word, and single products."""

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.codebooks import Lut
from golden.convert import decode_array, round_bfloat16
from golden.float_output import FloatOutput, element_to_float
from golden.formats import BF16, FP32, FloatFormat, HifFormat, NumberFormat
from golden.notation import QuantFormat
from golden.packing import pack_bits
from golden.tensor import QuantizedTensor, decode
from golden.vectors.files import (
    VectorFile,
    VectorStream,
    hex_lines,
    hex_strings,
    json_text,
    word_fields,
)
from golden.vectors.layers import describe_layer, vector_luts
from golden.vectors.numbers import has_value

__all__ = [
    "PRODUCT_WORD",
    "decode_table_bits",
    "decode_table_file",
    "moderate_bfloat16",
    "product_file",
    "tensor_file",
    "vector_tensor",
]

_ROWS = 3
_FULL_BLOCKS = 2  # of each row; a third block is partly padding
_LAYER_EXPONENT = -4  # of cases that do not care, but should notice if it is left out

# Layer exponents at which random scales fall on both sides of the ends of float32.
_EDGE_EXPONENTS = {"near_overflow": 122, "near_underflow": -128}


def _moderate(fmt: NumberFormat, limit: int) -> NDArray[np.bool_]:
    """Codes whose value is zero or has a magnitude from ``2**-limit`` to ``2**limit``."""
    allowed = has_value(fmt).copy()
    magnitudes = np.abs(decode_array(np.flatnonzero(allowed), fmt))
    inside = (magnitudes >= 2.0**-limit) & (magnitudes <= 2.0**limit)
    allowed[allowed] = inside | (magnitudes == 0)
    return allowed


def _every_code(width: int) -> NDArray[np.bool_]:
    return np.ones(1 << width, dtype=bool)


def _flag_digits(output: FloatOutput) -> NDArray[np.uint8]:
    """Flags of each value: 4 reserved, 2 overflow, 1 underflow."""
    digits = output.reserved * 4 + output.overflow * 2 + output.underflow * 1
    return digits.astype(np.uint8)


# ---------------------------------------------------------------------------------------- tensors


def _shape(fmt: QuantFormat) -> tuple[int, int]:
    """Rows and columns."""
    return _ROWS, _FULL_BLOCKS * fmt.block_size + 3 if fmt.block_size else 13


def _hex_plane(elements: NDArray[np.uint16], width: int) -> str:
    return pack_bits(elements, width).tobytes().hex()


def _case(
    fmt: QuantFormat, name: str, exponent: int, luts: list[list[int]],
    indices: NDArray[np.uint16], words: NDArray[np.uint16], row_scales: list[str] | None,
) -> dict[str, Any]:  # fmt: skip
    rows, columns = _shape(fmt)
    stored = fmt.block_shape(rows, columns)
    return {
        "name": name,
        "rows": rows,
        "columns": columns,
        "stored_columns": prod(stored) // rows,
        "weights_per_block": stored[2],
        "layer_exponent": exponent,
        "luts": luts,
        "row_scales": row_scales,
        "index_plane": _hex_plane(indices, fmt.index_bits),
        "scale_plane": _hex_plane(words, fmt.word.width),
    }


def vector_tensor(
    fmt: QuantFormat, shape: tuple[int, int], stored: tuple[int, int, int], seed: str,
    luts: tuple[Lut, ...] | None = None,
) -> QuantizedTensor:  # fmt: skip
    """Tensor of random codes of which every value is a normal float32 number or zero.

    Parameters
    ----------
    fmt : QuantFormat
    shape : tuple of int
        (rows, columns), without padding.
    stored : tuple of int
        (rows, blocks of a row, weights of a block).
    seed : str
        Ends the seed of :class:`VectorStream`.
    luts : tuple of Lut, optional
        Those of :func:`golden.vectors.layers.vector_luts` if not given.
    """
    stream = VectorStream(f"tensor/{seed}")
    rows, blocks, size = stored
    allowed = np.tile(_moderate(fmt.word.scale, 64), 1 << fmt.word.metabit_bits)
    words = stream.codes(rows * blocks, allowed)
    elements = has_value(fmt.atom) if fmt.atom is not None else _every_code(fmt.index_bits)
    indices = stream.codes(rows * blocks * size, elements)
    row_scales = stream.codes(shape[0], moderate_bfloat16()) if fmt.row_scale else None
    return QuantizedTensor(
        fmt, shape, indices.reshape(stored), words.reshape(rows, blocks),
        vector_luts(fmt) if luts is None else luts, _LAYER_EXPONENT, row_scales,
    )  # fmt: skip


def moderate_bfloat16() -> NDArray[np.bool_]:
    """Which bfloat16 codes are zero or of a magnitude from 1/256 to 256."""
    return _moderate(BF16, 8)


def _accepted_case(fmt: QuantFormat) -> dict[str, Any]:
    """Tensor of which every value is a normal float32 number or zero: no flags."""
    shape = _shape(fmt)
    seed = f"{fmt.name}/{fmt.hif.name}/accepted"
    tensor = vector_tensor(fmt, shape, fmt.block_shape(*shape), seed)
    row_scales = tensor.row_scales
    dense = decode(tensor, padded=bool(fmt.block_size))
    luts = [list(lut.codes) for lut in tensor.luts]
    scales = None if row_scales is None else hex_strings(row_scales, 16)
    case = _case(
        fmt, "accepted", _LAYER_EXPONENT, luts,
        tensor.indices.reshape(-1), tensor.scale_words.reshape(-1), scales,
    )  # fmt: skip
    return case | {
        "float32": hex_strings(dense.view(np.uint32), 32),
        "float32_flags": [],
        "bfloat16": hex_strings(round_bfloat16(dense), 16),
        "bfloat16_flags": [],
    }


def _hardware_case(
    fmt: QuantFormat, name: str, exponent: int, lut_codes: NDArray[np.uint16]
) -> dict[str, Any]:
    """Tensor with any indices, any scale words and any LUT entries, as hardware decodes it."""
    rows, blocks, size = fmt.block_shape(*_shape(fmt))
    stream = VectorStream(f"tensor/{fmt.name}/{fmt.hif.name}/{name}")
    words = stream.codes(rows * blocks, _every_code(fmt.word.width))
    indices = stream.codes(rows * blocks * size, _every_code(fmt.index_bits))
    scale = fmt.word.scale
    codes = lut_codes[fmt.word.metabit(words).repeat(size), indices]
    scales = fmt.word.scale_code(words).repeat(size)
    case = _case(fmt, name, exponent, lut_codes.tolist(), indices, words, None)
    for output, width in (("float32", 32), ("bfloat16", 16)):
        result = element_to_float(
            codes, scales, exponent, element=fmt.hif, scale=scale, output=output
        )
        flags = _flag_digits(result)
        raised = np.flatnonzero(flags)
        case[output] = hex_strings(result.bits, width)
        case[f"{output}_flags"] = np.stack([raised, flags[raised]], axis=1).tolist()
    return case


def tensor_file(fmt: QuantFormat) -> VectorFile:
    """Packed planes of small tensors and what they decode to.

    Parameters
    ----------
    fmt : QuantFormat
        Formats of LUTs without row scales also get cases that raise the hardware's flags.
    """
    cases = [_accepted_case(fmt)]
    if fmt.atom is None and not fmt.row_scale:
        canonical = np.array([lut.codes for lut in vector_luts(fmt)], dtype=np.uint16)
        for name, exponent in _EDGE_EXPONENTS.items():
            cases.append(_hardware_case(fmt, name, exponent, canonical))
        stream = VectorStream(f"tensor/{fmt.name}/{fmt.hif.name}/luts")
        codes = stream.codes(canonical.size, _every_code(fmt.hif.width))
        any_codes = codes.reshape(canonical.shape)
        cases.append(_hardware_case(fmt, "any_lut_codes", _LAYER_EXPONENT, any_codes))
    weights = sum(len(case["float32"]) for case in cases)
    return VectorFile(json_text({**describe_layer(fmt), "cases": cases}), weights)


# ------------------------------------------------------------------------------------- full tables


def decode_table_bits(fmt: QuantFormat) -> int:
    """Address bits of a format's decode table."""
    return fmt.word.width + fmt.index_bits


def decode_table_file(fmt: QuantFormat, output: str) -> VectorFile:
    """Decoded value of every index under every scale word, in address order.

    Parameters
    ----------
    fmt : QuantFormat
        With LUTs and without row scales.
    output : str
        ``"float32"`` or ``"bfloat16"``.
    """
    scale = fmt.word.scale
    luts = np.array([lut.codes for lut in vector_luts(fmt)], dtype=np.uint16)
    words = np.arange(1 << fmt.word.width, dtype=np.uint32)
    codes = luts[fmt.word.metabit(words)]  # (words, entries): the order of the addresses
    scales = fmt.word.scale_code(words)[:, None]
    result = element_to_float(
        codes, scales, _LAYER_EXPONENT, element=fmt.hif, scale=scale, output=output
    )
    width = 8 * result.bits.itemsize
    fields = [(name, bits) for name, bits in reversed(fmt.word.fields) if bits]
    facts = {
        **describe_layer(fmt),
        "luts": luts.tolist(),
        "layer_exponent": _LAYER_EXPONENT,
        "address": word_fields(*fields, ("index", fmt.index_bits)),
        "word": word_fields((output, width)),
    }
    return VectorFile(hex_lines([(result.bits, width)]), result.bits.size, facts)


# ---------------------------------------------------------------------------------------- products

PRODUCT_WORD = (
    ("hif_code", 8), ("scale_code", 16), ("layer_exponent", 8),
    ("float32_flags", 4), ("float32", 32), ("bfloat16_flags", 4), ("bfloat16", 16),
)  # fmt: skip
"""Fields of a product word, from the top bit down."""

_DIRECTED_CASES = 64


def _exponents(fmt: NumberFormat) -> NDArray[np.int64]:
    """Exponent e of each code with ``2**(e-1) <= |value| < 2**e``; 0 where there is no such e."""
    usable = np.flatnonzero(has_value(fmt))
    exponents = np.zeros(1 << fmt.width, dtype=np.int64)
    exponents[usable] = np.frexp(decode_array(usable, fmt))[1]
    return exponents


_Codes = NDArray[np.unsignedinteger]
_Operands = tuple[_Codes, _Codes, NDArray[np.int64]]  # HIF codes, scale codes, layer exponents


def _random_products(hif: HifFormat, scale: FloatFormat, count: int) -> _Operands:
    """Any codes; layer exponents anywhere, near overflow, and near underflow, in turn."""
    stream = VectorStream(f"product/{hif.name}/{scale.name}")
    codes = stream.words(count) & ((1 << hif.width) - 1)
    scales = stream.words(count) & ((1 << scale.width) - 1)
    draws = stream.words(count)
    size = _exponents(hif)[codes] + _exponents(scale)[scales]
    anywhere = (draws & 0xFF) - 128
    near_top = 128 - size + draws % 2
    near_bottom = -127 - size + draws % 4
    kind = np.arange(count) % 3
    exponents = np.where(kind == 0, anywhere, np.where(kind == 1, near_top, near_bottom))
    exponents = np.clip(exponents, -128, 127)
    return codes.astype(np.uint8), scales.astype(np.uint16), exponents


def _carry_products(hif: HifFormat, scale: FloatFormat) -> _Operands:
    """Products that bfloat16 rounds up to a power of two, put right below 2**128 and 2**-126.

    There the two outputs differ in their flags, because range is judged after rounding.
    """
    every_scale = np.arange(1 << scale.width, dtype=np.uint16)
    binade = scale.exponent_field(every_scale)
    scale_codes = every_scale[np.isin(binade, [1, scale.bias])]
    hif_codes = np.array(list(hif.canonical.values()), dtype=np.uint8)
    codes, scales = (grid.reshape(-1) for grid in np.meshgrid(hif_codes, scale_codes))
    exact = FP32.exponent_field(element_to_float(codes, scales, 0, element=hif, scale=scale).bits)
    rounded = element_to_float(codes, scales, 0, element=hif, scale=scale, output="bfloat16").bits
    carries = BF16.exponent_field(rounded) > exact
    positions, exponents = [], []
    for target in (254, 0):  # biased float32 exponents right below 2**128 and below 2**-126
        wanted = target - exact.astype(np.int64)
        found = np.flatnonzero(carries & (wanted >= -128) & (wanted <= 127))
        found = found[:: max(1, len(found) // _DIRECTED_CASES)][:_DIRECTED_CASES]
        positions.append(found)
        exponents.append(wanted[found])
    chosen = np.concatenate(positions)
    return codes[chosen], scales[chosen], np.concatenate(exponents)


def product_file(hif: HifFormat, scale: FloatFormat, *, count: int) -> VectorFile:
    """Float32 and bfloat16 of ``HIF code * scale code * 2**f`` with flags, for any codes.

    Parameters
    ----------
    hif : HifFormat
    scale : FloatFormat
    count : int
        Random products; directed ones are added.
    """
    random, directed = _random_products(hif, scale, count), _carry_products(hif, scale)
    codes = np.concatenate([random[0], directed[0]])
    scales = np.concatenate([random[1], directed[1]])
    exponents = np.concatenate([random[2], directed[2]])
    wide = element_to_float(codes, scales, exponents, element=hif, scale=scale)
    narrow = element_to_float(codes, scales, exponents, element=hif, scale=scale, output="bfloat16")
    columns: list[NDArray[np.unsignedinteger]] = [
        codes, scales, exponents.astype(np.int8).view(np.uint8),
        _flag_digits(wide), wide.bits, _flag_digits(narrow), narrow.bits,
    ]  # fmt: skip
    widths = [width for _, width in PRODUCT_WORD]
    facts = {
        "hif": hif.name,
        "scale_format": scale.name,
        "random": count,
        "directed": len(directed[0]),
        "word": word_fields(*PRODUCT_WORD),
    }
    return VectorFile(hex_lines(zip(columns, widths, strict=True)), len(codes), facts)
