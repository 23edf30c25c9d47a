"""Every number format of the project, defined once and as data.

Three families are enough for all of them:

* :class:`FloatFormat`: sign, exponent and mantissa fields. The atoms (E2M3, E4M3, ...) and the
  scales (UE4M4, S1E5M5, BF16, ...).
* :class:`HifFormat`: a small two's-complement significand times a small power of two. The entries
  of every lookup table.
* :class:`IntFormat`: symmetric two's-complement integers.

A format answers ``decode(code)`` with an exact :class:`Decoded` and ``encode(value)`` with the code
of the nearest value. Both are the readable scalar reference; :mod:`golden.convert` holds the array
versions, which must agree exactly. This module imports only the standard library, so that ``rtl``
can take every width, bias and field position from here.
"""

import bisect
import enum
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

from golden.errors import InputError

__all__ = [
    "ATOMS",
    "BF16",
    "DEFAULT_HIF",
    "E2M1",
    "E2M3",
    "E3M2",
    "E3M4",
    "E4M3",
    "E4M5",
    "E5M6",
    "HIF7",
    "HIF8",
    "HIF8T",
    "HIF_FORMATS",
    "INT4",
    "INT8",
    "UE8M0",
    "Decoded",
    "FloatFormat",
    "HifFormat",
    "IntFormat",
    "Kind",
    "NumberFormat",
    "Specials",
    "scale_format",
]


class Kind(enum.Enum):
    """Class of a decoded code."""

    ZERO = "zero"
    SUBNORMAL = "subnormal"
    NORMAL = "normal"
    NAN = "nan"
    RESERVED = "reserved"  # no value is assigned to this code; decoding it is an error


@dataclass(frozen=True)
class Decoded:
    """Exact meaning of one code: ``(-1)**sign * significand * 2**exponent``.

    ``significand`` is a non-negative integer that includes the hidden bit; ``sign`` is 0 or 1. For
    NaN and reserved codes significand and exponent are 0 and mean nothing.
    """

    sign: int
    significand: int
    exponent: int
    kind: Kind

    @property
    def value(self) -> Fraction:
        """The exact value; -0 has the value 0.

        Raises
        ------
        InputError
            If the code has no value (NaN or reserved).
        """
        if self.kind in (Kind.NAN, Kind.RESERVED):
            raise InputError(f"a {self.kind.value} code has no value")
        return Fraction((-1) ** self.sign * self.significand) * Fraction(2) ** self.exponent


@dataclass(frozen=True)
class NumberFormat(ABC):
    """A set of codes and their exact values.

    Parameters
    ----------
    name : str
        Name as users write it, such as ``"E2M3"``.
    """

    name: str

    @property
    @abstractmethod
    def fields(self) -> tuple[tuple[str, int], ...]:
        """Field names and widths in bits, least significant field first."""

    @abstractmethod
    def decode(self, code: int) -> Decoded:
        """Exact meaning of ``code``, which must be in ``range(2**width)``."""

    def is_even(self, code: int) -> bool:
        """Whether ``code`` wins a tie: the last place of its significand is 0.

        In every family the last bit of a code is that place (for an exponent without mantissa, the
        last bit of the exponent).
        """
        return code & 1 == 0

    @property
    def width(self) -> int:
        """Bits of a code."""
        return sum(width for _, width in self.fields)

    def field_offset(self, name: str) -> int:
        """Position of the lowest bit of field ``name``."""
        names = [field for field, _ in self.fields]
        return sum(width for _, width in self.fields[: names.index(name)])

    @cached_property
    def canonical(self) -> dict[Fraction, int]:
        """Every distinct value, ascending, with the one code that encoders emit for it.

        Where a value has several codes the canonical one is the lowest: +0 rather than -0, and for
        HIF the smallest shift.
        """
        table: dict[Fraction, int] = {}
        for code in range(1 << self.width):
            decoded = self.decode(code)
            if decoded.kind not in (Kind.NAN, Kind.RESERVED):
                table.setdefault(decoded.value, code)
        return dict(sorted(table.items()))

    @cached_property
    def _values(self) -> list[Fraction]:
        return list(self.canonical)

    @property
    def distinct_values(self) -> int:
        """How many distinct values the format holds; -0 and 0 count once."""
        return len(self._values)

    @property
    def min_value(self) -> Fraction:
        """The lowest value."""
        return self._values[0]

    @property
    def max_value(self) -> Fraction:
        """The highest value."""
        return self._values[-1]

    def encode(self, value: Fraction | int | float) -> int:
        """Code of the value nearest to ``value``: ties to even, saturating at both ends.

        The result is canonical. The array version is :func:`golden.convert.encode_array`.

        Raises
        ------
        InputError
            If ``value`` is NaN.
        """
        if value != value:
            raise InputError(f"NaN has no code in {self.name}")
        if value in (float("inf"), float("-inf")):
            return self.canonical[self.max_value if value > 0 else self.min_value]
        exact = Fraction(value)
        above = bisect.bisect_left(self._values, exact)
        if above == 0:
            return self.canonical[self._values[0]]
        if above == len(self._values):
            return self.canonical[self._values[-1]]
        low, high = self._values[above - 1], self._values[above]
        low_code, high_code = self.canonical[low], self.canonical[high]
        if exact - low == high - exact:
            return low_code if self.is_even(low_code) else high_code
        return low_code if exact - low < high - exact else high_code


class Specials(enum.Enum):
    """Which codes of a float format are not finite values."""

    NONE = "every code is finite"
    NAN_ALL_ONES = "the code with all exponent and mantissa bits set is NaN"  # OCP FP8 E4M3
    TOP_EXPONENT = "codes with the highest exponent are reserved"  # IEEE infinities and NaNs


@dataclass(frozen=True)
class FloatFormat(NumberFormat):
    """Sign (optional), exponent and mantissa fields, with subnormals and no infinities.

    Bias is ``2**(exponent_bits - 1) - 1``. OCP Microscaling Formats (MX) 1.0, section 5.3, for
    E2M1, E2M3 and E3M2; OCP 8-bit Floating Point 1.0 for E4M3. With ``mantissa_bits`` 0 the
    subnormal range is the single code 0, whose value is zero.

    Parameters
    ----------
    signed : bool
        Whether the top bit is a sign.
    exponent_bits, mantissa_bits : int
        Field widths; the mantissa excludes the hidden bit.
    specials : Specials
        Which codes have no finite value.
    """

    signed: bool
    exponent_bits: int
    mantissa_bits: int
    specials: Specials = Specials.NONE

    @property
    def bias(self) -> int:
        """Subtracted from the exponent field to give the exponent of the hidden bit."""
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def fields(self) -> tuple[tuple[str, int], ...]:
        """Mantissa, exponent and, where signed, sign."""
        fields = (("mantissa", self.mantissa_bits), ("exponent", self.exponent_bits))
        return (*fields, ("sign", 1)) if self.signed else fields

    @property
    def exponent_mask(self) -> int:
        """The code with all exponent bits set and no other: infinity where IEEE 754 has one."""
        return (1 << self.exponent_bits) - 1 << self.mantissa_bits

    def exponent_field(self, code: Any) -> Any:
        """Biased exponent of a code, or of each of an array of codes."""
        return code >> self.mantissa_bits & (1 << self.exponent_bits) - 1

    def has_top_exponent(self, code: Any) -> Any:
        """Whether all exponent bits of a code, or of each of an array of codes, are set."""
        return (code & self.exponent_mask) == self.exponent_mask

    @property
    def min_exponent(self) -> int:
        """Exponent of the last place of subnormals and of the lowest normal binade."""
        return 1 - self.bias - self.mantissa_bits

    @property
    def max_exponent(self) -> int:
        """Exponent of the last place in the highest binade that holds finite values."""
        top = (1 << self.exponent_bits) - (2 if self.specials is Specials.TOP_EXPONENT else 1)
        return top - self.bias - self.mantissa_bits

    def decode(self, code: int) -> Decoded:
        """Exact meaning of ``code``."""
        mantissa = code & ((1 << self.mantissa_bits) - 1)
        exponent = self.exponent_field(code)
        sign = code >> (self.mantissa_bits + self.exponent_bits)
        all_ones = (1 << (self.exponent_bits + self.mantissa_bits)) - 1
        if self.specials is Specials.NAN_ALL_ONES and code & all_ones == all_ones:
            return Decoded(sign, 0, 0, Kind.NAN)
        if self.specials is Specials.TOP_EXPONENT and exponent == (1 << self.exponent_bits) - 1:
            return Decoded(sign, 0, 0, Kind.RESERVED)
        if exponent == 0:
            kind = Kind.SUBNORMAL if mantissa else Kind.ZERO
            return Decoded(sign, mantissa, self.min_exponent, kind)
        significand = mantissa | 1 << self.mantissa_bits
        return Decoded(sign, significand, exponent - self.bias - self.mantissa_bits, Kind.NORMAL)


@dataclass(frozen=True)
class HifFormat(NumberFormat):
    """Hardware-efficient integer float: ``m * 2**e``, m two's complement, e in ``range(shifts)``.

    The code is ``e << significand_bits | m``. A shift field that is wider than needed leaves
    reserved codes, whose decoding is an error. [rebuilt] from counts and ratios that the paper
    states; the evidence is in docs/formats.md.

    Parameters
    ----------
    significand_bits : int
        Width of the two's-complement significand, sign included.
    shifts : int
        Number of shift amounts.
    """

    significand_bits: int
    shifts: int

    @property
    def fields(self) -> tuple[tuple[str, int], ...]:
        """Significand, then shift."""
        return (("significand", self.significand_bits), ("shift", (self.shifts - 1).bit_length()))

    @property
    def full_scale(self) -> int:
        """Magnitude of the lowest value: the integer that a codebook level of -1 becomes."""
        return -int(self.min_value)

    def significand(self, code: int) -> int:
        """The signed significand m of ``code``."""
        m = code & ((1 << self.significand_bits) - 1)
        return m - (1 << self.significand_bits) if m >> (self.significand_bits - 1) else m

    def decode(self, code: int) -> Decoded:
        """Exact meaning of ``code``."""
        m, shift = self.significand(code), code >> self.significand_bits
        if shift >= self.shifts:
            return Decoded(int(m < 0), 0, 0, Kind.RESERVED)
        return Decoded(int(m < 0), abs(m), shift, Kind.NORMAL if m else Kind.ZERO)


@dataclass(frozen=True)
class IntFormat(NumberFormat):
    """Symmetric two's-complement integers ``-(2**(bits-1) - 1) .. 2**(bits-1) - 1``.

    The code of the most negative two's-complement number is reserved, so that the range is
    symmetric.

    Parameters
    ----------
    bits : int
        Width of a code.
    """

    bits: int

    @property
    def fields(self) -> tuple[tuple[str, int], ...]:
        """One field, the integer."""
        return (("integer", self.bits),)

    def decode(self, code: int) -> Decoded:
        """Exact meaning of ``code``."""
        half = 1 << (self.bits - 1)
        if code == half:
            return Decoded(1, 0, 0, Kind.RESERVED)
        value = code - 2 * half if code > half else code
        return Decoded(int(value < 0), abs(value), 0, Kind.NORMAL if value else Kind.ZERO)


# OCP MX 1.0, table 1 (FP4, FP6) and OCP FP8 1.0, table 1 (E4M3).
E2M1 = FloatFormat("E2M1", True, 2, 1)
E2M3 = FloatFormat("E2M3", True, 2, 3)
E3M2 = FloatFormat("E3M2", True, 3, 2)
E4M3 = FloatFormat("E4M3", True, 4, 3, Specials.NAN_ALL_ONES)
# The promotion ladder of the paper [paper: the names]; that every code is finite is our choice.
E3M4 = FloatFormat("E3M4", True, 3, 4)
E4M5 = FloatFormat("E4M5", True, 4, 5)
E5M6 = FloatFormat("E5M6", True, 5, 6)
INT4 = IntFormat("INT4", 4)
INT8 = IntFormat("INT8", 8)
# [rebuilt] from the paper's counts of 80 and 96 values and its name "tc6".
HIF7 = HifFormat("HIF7", 5, 4)
HIF8 = HifFormat("HIF8", 5, 5)
HIF8T = HifFormat("HIF8T", 6, 4)
HIF_FORMATS = {fmt.name: fmt for fmt in (HIF7, HIF8, HIF8T)}

DEFAULT_HIF = HIF8T
"""Format of LUT entries of every command that names none, for weights and for hardware alike."""

ATOMS: dict[str, NumberFormat] = {
    fmt.name: fmt
    for fmt in (E2M1, E2M3, E3M2, E4M3, E3M4, E4M5, E5M6, INT4, INT8, HIF7, HIF8, HIF8T)
}

UE8M0 = FloatFormat("UE8M0", False, 8, 0)
BF16 = FloatFormat("BF16", True, 8, 7, Specials.TOP_EXPONENT)
FP32 = FloatFormat("FP32", True, 8, 23, Specials.TOP_EXPONENT)
"""IEEE 754 binary32. Too wide to list: what needs all its codes or values takes for ever."""

OUTPUT_FORMATS = {"float32": FP32, "bfloat16": BF16}
"""What weights and products can be given as."""

# 24 bits of a float32 significand hold LUT entry (8) x scale (8) x row scale (8) exactly.
MAX_SCALE_MANTISSA_BITS = 7


def scale_format(name: str) -> FloatFormat:
    """Scale format of that name: ``UE{e}M{m}``, ``S1E{e}M{m}`` or ``BF16``.

    Raises
    ------
    InputError
        If the name is not of that form, or a field has a width that no scale can have.
    """
    if name == BF16.name:
        return BF16
    match = re.fullmatch(r"(U|S1)E([1-9][0-9]{0,2})M(0|[1-9][0-9]{0,2})", name)
    if match is None:
        raise InputError(f"unknown scale format {name!r}: expected UE<e>M<m>, S1E<e>M<m> or BF16")
    exponent_bits, mantissa_bits = int(match[2]), int(match[3])
    if not 2 <= exponent_bits <= 8:
        raise InputError(f"scale format {name!r}: exponent of {exponent_bits} bits, must be 2 to 8")
    if mantissa_bits > MAX_SCALE_MANTISSA_BITS:
        raise InputError(
            f"scale format {name!r}: mantissa of {mantissa_bits} bits, at most "
            f"{MAX_SCALE_MANTISSA_BITS} keep the product exact in float32"
        )
    if exponent_bits == 8 and name != UE8M0.name:
        # With every code finite, 8-bit exponents and a mantissa reach beyond float32.
        raise InputError(f"scale format {name!r}: 8-bit exponents exist only as UE8M0 and BF16")
    return FloatFormat(name, match[1] == "S1", exponent_bits, mantissa_bits)
