"""Format names: ``ATOM[^BLOCK]sSCALE`` and ``CODEBOOK[-CODEBOOK][^BLOCK]s[R]SCALE``.

The notation is the paper's [paper], with the leading ``R`` of a row scale added by this project.
Examples: ``E2M3sUE4M4`` (blocks of 16, 6.5 bits per weight), ``E2M3^32sUE8M0`` (MXFP6),
``E4M3^0sUE8M0`` (one scale for the whole layer), ``BOF4-NF4sS1E5M5`` (a pair, 4.75 bits per
weight).
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import prod
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from golden.codebooks import BLOCK_SIZES, FIXED_CODEBOOKS
from golden.errors import InputError
from golden.formats import ATOMS, HIF7, FloatFormat, HifFormat, NumberFormat, scale_format

__all__ = [
    "DEFAULT_BLOCK_SIZE",
    "TRAINED_CODEBOOKS",
    "QuantFormat",
    "ScaleWord",
    "is_user_codebook",
    "parse_format",
]

DEFAULT_BLOCK_SIZE = 16

TRAINED_CODEBOOKS = {"DD4": 4, "DD5": 5, "DD6": 6}
"""Codebooks trained per layer, with their index width in bits."""

ROW_SCALE_BITS = 16  # bfloat16
MAX_SCALE_WORD_BITS = 16

Word = TypeVar("Word", int, NDArray[np.uint16], NDArray[np.uint32])


@dataclass(frozen=True)
class ScaleWord:
    """What is stored once per block: from the top bit down metabit, sign, exponent, mantissa.

    Parameters
    ----------
    scale : FloatFormat
        Format of the scale code, which fills the low ``scale.width`` bits.
    metabit_bits : int
        0 for one LUT, 1 for a pair.
    """

    scale: FloatFormat
    metabit_bits: int

    @property
    def width(self) -> int:
        """Bits of a scale word."""
        return self.scale.width + self.metabit_bits

    @property
    def fields(self) -> tuple[tuple[str, int], ...]:
        """Field names and widths, least significant first."""
        metabit = (("metabit", self.metabit_bits),) if self.metabit_bits else ()
        return self.scale.fields + metabit

    def join(self, scale_code: Word, metabit: Word) -> Word:
        """Scale words of scale codes and metabits, integers or arrays of unsigned integers."""
        width: Any = self.scale.width  # NumPy's annotations lose the type of shifted integers
        return metabit << width | scale_code

    def scale_code(self, word: Word) -> Word:
        """Scale codes of scale words, without the metabits."""
        mask: Any = (1 << self.scale.width) - 1
        return word & mask

    def metabit(self, word: Word) -> Word:
        """Metabits of scale words; 0 where the format has none."""
        width: Any = self.scale.width
        return word >> width & (1 << self.metabit_bits) - 1


@dataclass(frozen=True)
class QuantFormat:
    """A parsed format name; made by :func:`parse_format`.

    Attributes
    ----------
    name : str
        Canonical spelling: without ``^16``.
    atom : NumberFormat or None
        Element format where elements are numbers themselves.
    codebooks : tuple of str
        One or two codebook names where elements are LUT indices, else empty.
    hif : HifFormat
        Format of LUT entries.
    block_size : int
        Weights per scale word; 0 is one scale word for the whole tensor.
    word : ScaleWord
        Layout of the scale word.
    row_scale : bool
        Whether each row has a bfloat16 multiplier.
    """

    name: str
    atom: NumberFormat | None
    codebooks: tuple[str, ...]
    hif: HifFormat
    block_size: int
    word: ScaleWord
    row_scale: bool

    @property
    def index_bits(self) -> int:
        """Bits of one stored element: a LUT index or an atom's code."""
        if self.atom is not None:
            return self.atom.width
        return _codebook_bits(self.codebooks[0])

    @property
    def lut_entries(self) -> int:
        """Entries of each LUT; 0 for atoms."""
        return 0 if self.atom is not None else 1 << self.index_bits

    @property
    def bits_per_weight(self) -> Fraction:
        """Stored bits of indices and scale words per weight, for rows that are whole blocks.

        LUTs, row scales, padding and the one scale word of ``^0`` vanish in a large tensor and are
        not in this figure; :meth:`stored_bits` counts them.
        """
        per_block = Fraction(self.word.width, self.block_size) if self.block_size else Fraction(0)
        return self.index_bits + per_block

    def with_codebooks(self, codebooks: tuple[str, ...]) -> "QuantFormat":
        """The same format with other codebooks; errors as :func:`parse_format`."""
        _, _, rest = self.name.partition("-".join(self.codebooks))
        return parse_format("-".join(codebooks) + rest, self.hif)

    def block_shape(self, rows: int, columns: int) -> tuple[int, int, int]:
        """How a matrix is stored: rows, blocks of a row, weights of a block with its padding.

        One scale word for the whole tensor (``^0``) makes all of it one block of one row.
        """
        if self.block_size == 0:
            return 1, 1, rows * columns
        return rows, -(-columns // self.block_size), self.block_size

    def stored_bits(self, rows: int, columns: int) -> int:
        """Bits that a tensor of that many weights occupies, planes and LUTs included."""
        block_shape = self.block_shape(rows, columns)
        planes = [prod(block_shape) * self.index_bits, prod(block_shape[:2]) * self.word.width]
        planes.append(8 * len(self.codebooks) * self.lut_entries)
        planes.append(ROW_SCALE_BITS * rows if self.row_scale else 0)
        return sum(8 * -(-bits // 8) for bits in planes)


def is_user_codebook(name: str) -> bool:
    """Whether a name is one that users may give to codebooks of their own, all of 16 levels.

    At most 24 characters, so that two fit into the 64 of a format name in a file.
    """
    return re.fullmatch(r"[a-z][a-z0-9]{0,23}", name) is not None


def _codebook_bits(name: str) -> int:
    return TRAINED_CODEBOOKS.get(name, 4)


def _parse_elements(name: str, text: str) -> tuple[NumberFormat | None, tuple[str, ...]]:
    if text in ATOMS:
        return ATOMS[text], ()
    books = tuple(text.split("-"))
    known = (*FIXED_CODEBOOKS, *TRAINED_CODEBOOKS)
    for book in books:
        if book in ATOMS:
            raise InputError(f"format {name!r}: atom {book} cannot be part of a codebook pair")
        if book not in known and not is_user_codebook(book):
            raise InputError(
                f"format {name!r}: unknown element {book!r}; atoms are {', '.join(ATOMS)}; "
                f"codebooks are {', '.join(known)} and lower-case names of your own"
            )
    if len(books) > 2:
        raise InputError(f"format {name!r}: {len(books)} codebooks, but a metabit picks one of two")
    if len({_codebook_bits(book) for book in books}) > 1:
        raise InputError(
            f"format {name!r}: both codebooks of a pair must have the same index width"
        )
    if len(books) == 2 and books[0] == books[1] and books[0] not in TRAINED_CODEBOOKS:
        raise InputError(f"format {name!r}: a pair of one codebook with itself holds nothing new")
    return None, books


def _parse_block_size(name: str, text: str | None, codebooks: tuple[str, ...]) -> int:
    block_size = DEFAULT_BLOCK_SIZE if text is None else int(text)
    allowed = BLOCK_SIZES if codebooks else (0, *BLOCK_SIZES)
    if block_size not in allowed:
        sizes = ", ".join(str(size) for size in allowed)
        raise InputError(f"format {name!r}: block size {block_size}, must be one of {sizes}")
    return block_size


@lru_cache(maxsize=256)
def parse_format(name: str, hif: HifFormat = HIF7) -> QuantFormat:
    """Parse a format name.

    Parameters
    ----------
    name : str
        Such as ``"BOF4-NF4sS1E5M5"``; case matters.
    hif : HifFormat
        Format of LUT entries; atoms ignore it.

    Raises
    ------
    InputError
        If the name is not of the notation, or names something that cannot exist; the message says
        which part.
    """
    # A scale has no lower-case letter, so the "s" before it is the last one of the name.
    match = re.fullmatch(r"([A-Za-z0-9-]+?)(?:\^([0-9]{1,4}))?s(R?)([A-Z][A-Z0-9]*)", name)
    if match is None:
        raise InputError(
            f"format {name!r} is not of the form ATOM[^BLOCK]sSCALE or "
            "CODEBOOK[-CODEBOOK][^BLOCK]s[R]SCALE, such as E2M3sUE4M4 or BOF4-NF4sS1E5M5"
        )
    atom, codebooks = _parse_elements(name, match[1])
    block_size = _parse_block_size(name, match[2], codebooks)
    try:
        word = ScaleWord(scale_format(match[4]), int(len(codebooks) == 2))
    except InputError as error:
        raise InputError(f"format {name!r}: {error}") from None
    if word.width > MAX_SCALE_WORD_BITS:
        raise InputError(
            f"format {name!r}: a scale word of {word.width} bits, at most {MAX_SCALE_WORD_BITS}"
        )
    row_scale = bool(match[3])
    if row_scale and not codebooks:
        raise InputError(f"format {name!r}: row scales exist for codebook formats only")
    block = "" if block_size == DEFAULT_BLOCK_SIZE else f"^{block_size}"
    canonical = f"{match[1]}{block}s{match[3]}{match[4]}"
    return QuantFormat(canonical, atom, codebooks, hif, block_size, word, row_scale)
