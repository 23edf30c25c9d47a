"""A quantized tensor and its exact meaning.

Decode is exact: ``LUT[metabit][index] * scale significand * 2**(scale exponent + f)`` (times a
bfloat16 row scale where the format has one) has at most 24 significant bits, so float32 holds it
without rounding. A zero is always +0, because the product of integers has no negative zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from golden.codebooks import Lut
from golden.convert import decode_array
from golden.errors import InputError
from golden.formats import BF16
from golden.notation import QuantFormat
from golden.packing import pack_bits

__all__ = [
    "QuantizedTensor",
    "check_code_array",
    "check_float32_range",
    "check_luts",
    "decode",
    "decode_elements",
    "decode_scales",
    "take_rows",
]

SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
LARGEST = float(np.finfo(np.float32).max)


def check_float32_range(smallest: float, largest: float) -> None:
    """Refuse dense values that float32 would flush or overflow.

    Parameters
    ----------
    smallest, largest : float
        Smallest non-zero and largest magnitude of the dense values.

    Raises
    ------
    InputError
        If either lies outside float32's normal range.
    """
    if smallest < SMALLEST_NORMAL:
        raise InputError(f"a decoded weight of {smallest:g} would be subnormal in float32")
    if largest > LARGEST:
        raise InputError(f"a decoded weight of {largest:g} would overflow float32")


def check_luts(fmt: QuantFormat, luts: Sequence[Lut]) -> None:
    """Refuse LUTs that a format cannot have.

    Raises
    ------
    InputError
        If their number, length or entry format is wrong; the message names the LUT.
    """
    if len(luts) != len(fmt.codebooks):
        raise InputError(f"luts: {fmt.name} has {len(fmt.codebooks)} LUTs, not {len(luts)}")
    for position, lut in enumerate(luts):
        if len(lut.codes) != fmt.lut_entries or lut.hif != fmt.hif:
            raise InputError(
                f"luts[{position}]: {fmt.name} has {fmt.lut_entries} entries of {fmt.hif.name}, "
                f"not {len(lut.codes)} of {lut.hif.name}"
            )


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Everything that is stored of one quantized weight matrix.

    Parameters
    ----------
    format : QuantFormat
    shape : tuple of int
        (rows, columns), that is (out_features, in_features), without padding.
    indices : uint8 or uint16 array, shape (rows, blocks, block_size)
        LUT indices or atom codes; shape (1, 1, rows * columns) for one scale per layer.
    scale_words : uint16 array, shape (rows, blocks)
        Laid out as ``format.word`` says; shape (1, 1) for one scale per layer.
    luts : tuple of Lut
        One per codebook of the format; empty for atoms.
    layer_exponent : int
        f, in range(-128, 128).
    row_scales : uint16 array, shape (rows,), or None
        bfloat16 bit patterns, where the format has row scales.

    Raises
    ------
    InputError
        If the parts do not fit each other, or a code is out of range; the message names the part.
        (Reserved codes are found by :func:`decode`.)
    """

    format: QuantFormat
    shape: tuple[int, int]
    indices: NDArray[np.unsignedinteger]
    scale_words: NDArray[np.uint16]
    luts: tuple[Lut, ...]
    layer_exponent: int
    row_scales: NDArray[np.uint16] | None = None

    def __post_init__(self) -> None:
        """Check every part against the format and the shape."""
        fmt, (rows, columns) = self.format, self.shape
        if rows < 1 or columns < 1:
            raise InputError(f"shape: {self.shape} has no weights")
        stored = fmt.block_shape(rows, columns)
        check_code_array("indices", self.indices, stored, 1 << fmt.index_bits)
        check_code_array("scale_words", self.scale_words, stored[:2], 1 << fmt.word.width)
        check_luts(fmt, self.luts)
        if not -128 <= self.layer_exponent <= 127:
            raise InputError(f"layer_exponent: {self.layer_exponent} is not in -128..127")
        if fmt.row_scale != (self.row_scales is not None):
            raise InputError(
                f"row_scales: {fmt.name} has {'' if fmt.row_scale else 'no '}row scales"
            )
        if self.row_scales is not None:
            check_code_array("row_scales", self.row_scales, (rows,), 1 << 16)

    @property
    def scale_codes(self) -> NDArray[np.uint16]:
        """Scale codes without metabit, shape (rows, blocks)."""
        return self.format.word.scale_code(self.scale_words)

    @property
    def metabits(self) -> NDArray[np.uint16]:
        """Metabit of every block, shape (rows, blocks); 0 where the format has none."""
        return self.format.word.metabit(self.scale_words)

    @property
    def index_plane(self) -> NDArray[np.uint8]:
        """Packed indices, as stored and streamed (see :mod:`golden.packing`)."""
        return pack_bits(self.indices, self.format.index_bits)

    @property
    def scale_plane(self) -> NDArray[np.uint8]:
        """Packed scale words, as stored and streamed."""
        return pack_bits(self.scale_words, self.format.word.width)


def check_code_array(
    name: str, array: NDArray[np.unsignedinteger], shape: tuple[int, ...], codes: int
) -> None:
    """Refuse an array of codes that is not of this shape, or has a code outside ``range(codes)``.

    Raises
    ------
    InputError
        The message starts with ``name``.
    """
    if array.shape != shape:
        raise InputError(f"{name}: shape {array.shape}, expected {shape}")
    if array.dtype not in (np.uint8, np.uint16):
        raise InputError(f"{name}: dtype {array.dtype}, expected uint8 or uint16")
    if array.size and int(array.max()) >= codes:
        raise InputError(f"{name}: {int(array.max())} is not in range({codes})")


def decode_elements(tensor: QuantizedTensor) -> NDArray[np.float64]:
    """Value of every element: a LUT entry or a number, before any scale.

    Returns
    -------
    elements : float64 array, of the shape of ``tensor.indices``
        Exact.

    Raises
    ------
    InputError
        If a code is NaN or reserved.
    """
    if tensor.format.atom is not None:
        return decode_array(tensor.indices, tensor.format.atom)
    luts = np.array([lut.values for lut in tensor.luts], dtype=np.float64)
    return luts[tensor.metabits[..., None], tensor.indices]


def decode_scales(tensor: QuantizedTensor) -> NDArray[np.float64]:
    """Real scale of every block, ``decode(code) * 2**f``, without row scales.

    Returns
    -------
    scales : float64 array, of the shape of ``tensor.scale_words``
        Exact.

    Raises
    ------
    InputError
        If a code is reserved.
    """
    scales = decode_array(tensor.scale_codes, tensor.format.word.scale)
    return np.ldexp(scales, tensor.layer_exponent)


def decode(tensor: QuantizedTensor, *, padded: bool = False) -> NDArray[np.float32]:
    """Exact dense values.

    Parameters
    ----------
    tensor : QuantizedTensor
        Not modified.
    padded : bool
        Keep the padding of the last block of each row, as the hardware streams it.

    Returns
    -------
    dense : float32 array, shape (rows, columns), or (rows, blocks * block_size) if padded

    Raises
    ------
    InputError
        If a code is NaN or reserved, or a value is outside float32's normal range.
    """
    rows, columns = tensor.shape
    # Exact in float64: at most 24 significant bits. Adding 0.0 turns -0.0 into +0.0.
    dense = decode_elements(tensor) * decode_scales(tensor)[..., None] + 0.0
    if tensor.row_scales is not None:
        dense *= decode_array(tensor.row_scales, BF16)[:, None, None]
        dense += 0.0
    magnitudes = np.abs(dense)
    if magnitudes.any():
        check_float32_range(float(magnitudes[magnitudes > 0].min()), float(magnitudes.max()))
    flat = dense.reshape(rows, -1).astype(np.float32)
    return flat if padded else flat[:, :columns]


def take_rows(tensor: QuantizedTensor, part: slice) -> QuantizedTensor:
    """Some rows of a tensor as a tensor.

    Parameters
    ----------
    tensor : QuantizedTensor
        Not modified.
    part : slice
        With ``start`` and ``stop`` in range, ``stop`` greater.
    """
    rows, columns = tensor.shape
    if tensor.format.block_size:
        indices, words = tensor.indices[part], tensor.scale_words[part]
    else:
        indices = tensor.indices.reshape(rows, columns)[part].reshape(1, 1, -1)
        words = tensor.scale_words
    row_scales = None if tensor.row_scales is None else tensor.row_scales[part]
    shape = part.stop - part.start, columns
    return replace(tensor, shape=shape, indices=indices, scale_words=words, row_scales=row_scales)
