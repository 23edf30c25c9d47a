"""Classes of numbers and of operations on them, as :mod:`tb.coverage` names its bins."""

import itertools
from collections.abc import Sequence

import numpy as np

from golden.formats import FloatFormat, HifFormat, IntFormat, NumberFormat, Specials

__all__ = ["element_class", "float_class", "result_class", "rounding_classes", "sum_classes"]


def float_class(code: int, fmt: FloatFormat) -> str:
    """Class of a code of a scale or of an atom, its sign in front if the format has one."""
    mantissa = code & (1 << fmt.mantissa_bits) - 1
    field = code >> fmt.mantissa_bits & (1 << fmt.exponent_bits) - 1
    magnitude = field << fmt.mantissa_bits | mantissa
    sign = f"{'+-'[code >> fmt.mantissa_bits + fmt.exponent_bits & 1]} " if fmt.signed else ""
    top = (1 << fmt.exponent_bits + fmt.mantissa_bits) - 1
    if fmt.specials is Specials.TOP_EXPONENT:
        if field == (1 << fmt.exponent_bits) - 1:
            return f"{sign}reserved"
        top -= 1 << fmt.mantissa_bits
    elif fmt.specials is Specials.NAN_ALL_ONES:
        if magnitude == top:
            return "NaN"
        top -= 1
    if not field:
        return sign + ("subnormal" if mantissa else "zero")
    if magnitude == 1 << fmt.mantissa_bits:
        return f"{sign}smallest normal"
    return sign + ("largest" if magnitude == top else "mid")


def element_class(code: int, fmt: NumberFormat) -> tuple[str, str]:
    """Group, without the unit, and bin of a decoded element."""
    if isinstance(fmt, HifFormat):
        significand = fmt.significand(code)
        sign = "negative" if significand < 0 else "positive" if significand else "zero"
        shift = code >> fmt.significand_bits
        return f"{fmt.name} shift x significand", (
            f"{shift} {sign}{' (reserved)' if shift >= fmt.shifts else ''}"
        )
    if isinstance(fmt, IntFormat):
        lowest = 1 << fmt.bits - 1
        kind = ("zero" if not code else "positive" if code < lowest else
                "negative" if code > lowest else "reserved")  # fmt: skip
        return "element of an atom", f"integer {kind}"
    assert isinstance(fmt, FloatFormat)
    return "element of an atom", f"float {float_class(code, fmt)}"


def result_class(bits: int, mantissa_bits: int) -> str:
    """Class of a floating-point value that comes out."""
    magnitude = bits & (1 << mantissa_bits + 8) - 1
    if not magnitude:
        return "zero"
    exponent = magnitude >> mantissa_bits
    kind = "infinity" if exponent == 255 else "normal" if exponent else "subnormal"
    return f"{'+-'[bits >> mantissa_bits + 8]} {kind}"


def sum_classes(dense: int, value: int) -> list[str]:
    """Kinds of one addition of two float32, both as bits."""
    a, b = (np.array(bits, np.uint32).view(np.float32)[()] for bits in (dense, value))
    with np.errstate(over="ignore", invalid="ignore"):
        total = a + b
        # What rounding changed, exactly (Knuth's two-sum; not where the sum is an infinity).
        part = total - a
        error = (a - (total - part)) + (b - part)
        near = np.nextafter(total, np.float32(np.copysign(np.inf, error)))
    kinds = []
    if np.isinf(total):
        kinds.append("overflow")
    elif not error:
        kinds.append("exact")
    else:
        kinds.append("rounded down" if error > 0 else "rounded up")
        if 2 * abs(error) == abs(near - total):
            kinds.append("tie")
    if total == a and b:
        kinds.append("nothing changed")
    if not total and a:
        kinds.append("cancelled to zero")
    tiny = np.finfo(np.float32).smallest_normal
    larger = max(abs(a), abs(b))
    if total and abs(total) < larger / 4:
        kinds.append("cancelled in part")
    if abs(total) < np.inf and larger >= tiny and np.frexp(total)[1] > np.frexp(larger)[1]:
        kinds.append("carry")
    if 0 < abs(total) < tiny:
        kinds.append("subnormal sum")
    kinds += ["of a zero"] * (not a) + ["by zero"] * (not b) + ["by a negative"] * bool(b < 0)
    return kinds + ["by a subnormal"] * bool(0 < abs(b) < tiny)


def rounding_classes(
    source: FloatFormat, hif: HifFormat, shift: int, reference: Sequence[int]
) -> list[str]:
    """How each source code is rounded; empty for a NaN."""
    names = []
    values = {code: float(value) for value, code in hif.canonical.items()}
    ascending = sorted(values.values())
    above = dict(itertools.pairwise(ascending))
    below = {higher: lower for lower, higher in itertools.pairwise(ascending)}
    mask, saturated, nan = (1 << hif.width) - 1, 1 << hif.width + 1, 1 << hif.width + 2
    for code, result in enumerate(reference):
        if result & nan:
            names.append("")
            continue
        rounded = values[result & mask]
        if result & saturated:
            names.append("high end" if rounded > 0 else "low end")
            continue
        exact = float(source.decode(code).value) * 2.0**shift
        other = above.get(rounded) if exact > rounded else below.get(rounded)
        side = "above" if rounded > exact else "below"
        tie = other is not None and abs(exact - rounded) == abs(exact - other)
        names.append("exact" if exact == rounded else f"{'tie to' if tie else 'nearest'} {side}")
    return names
