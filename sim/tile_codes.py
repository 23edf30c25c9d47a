"""Codes and payloads for the benches of tiles: which are legal, and random ones of every kind."""

import random

from amaranth.lib import data

from golden.formats import FloatFormat, HifFormat, Kind, NumberFormat

__all__ = [
    "difference",
    "element_code",
    "fields_of",
    "is_legal",
    "packed",
    "scale_code",
    "signed",
    "substitute",
]


def is_legal(fmt: NumberFormat, code: int) -> bool:
    """Whether a code has a meaning."""
    return fmt.decode(code).kind not in (Kind.NAN, Kind.RESERVED)


def substitute(fmt: NumberFormat, code: int) -> int:
    """A code with a meaning that the hardware takes a code for: itself, if it has one.

    HIF shifts that do not exist are the highest, the lowest integer is 0; NaN has no substitute and
    becomes 0.
    """
    if is_legal(fmt, code):
        return code
    if isinstance(fmt, HifFormat):
        return fmt.shifts - 1 << fmt.significand_bits | code & (1 << fmt.significand_bits) - 1
    return 0


def fields_of(layout: data.StructLayout, word: int, name: str) -> list[int]:
    """Elements of an array field, unsigned."""
    field = layout[name]
    width = field.width // field.shape.length
    part = word >> field.offset
    return [part >> number * width & (1 << width) - 1 for number in range(field.shape.length)]


def packed(layout: data.StructLayout, **fields: list[int] | int) -> int:
    """A payload from the codes of array fields and the values of others, negative ones too."""
    word = 0
    for name, values in fields.items():
        field = layout[name]
        items = values if isinstance(values, list) else [values]
        width = field.width // len(items)
        for number, value in enumerate(items):
            word |= (value & (1 << width) - 1) << field.offset + number * width
    return word


def signed(value: int, bits: int) -> int:
    """The number whose two's complement of so many bits this is."""
    return value - (1 << bits) if value >> bits - 1 else value


def element_code(rng: random.Random, fmt: NumberFormat, kind: int) -> int:
    """A legal code: the lowest (0), the highest (1), either of them (2), or any."""
    if kind < 3:
        ends = (fmt.min_value, fmt.max_value)
        return fmt.canonical[ends[kind] if kind < 2 else rng.choice(ends)]
    return substitute(fmt, rng.randrange(1 << fmt.width))


def scale_code(rng: random.Random, fmt: FloatFormat, kind: int) -> int:
    """A legal code of a scale: near 1 (0, 1), zero or at an end (2), or any."""
    binade = 1 << fmt.mantissa_bits
    if kind in (0, 1):
        one = fmt.bias << fmt.mantissa_bits
        code = one + rng.randrange(-2 * binade, 2 * binade + 1)
    elif kind == 2:
        top = (1 << fmt.exponent_bits) - 1 - (not is_legal(fmt, (binade << fmt.exponent_bits) - 1))
        code = rng.choice((0, 1, binade - 1, binade, (top + 1) * binade - 1, top * binade))
    else:
        code = rng.randrange(binade << fmt.exponent_bits)
    code |= rng.getrandbits(1) << fmt.width - 1 if fmt.signed else 0
    return code if is_legal(fmt, code) else 0


def difference(layout: data.StructLayout, expected: int, actual: int) -> str:
    """Where a beat of outputs is not as expected: units and flags."""
    pairs = zip(
        fields_of(layout, expected, "values"), fields_of(layout, actual, "values"), strict=True
    )
    lines = [
        f"unit {unit}: got {got:#x}, expected {wanted:#x}"
        for unit, (wanted, got) in enumerate(pairs)
        if wanted != got
    ]
    for flag in layout.members.keys() - {"values"}:
        got = actual >> layout[flag].offset & 1
        if got != expected >> layout[flag].offset & 1:
            lines.append(f"{flag}: got {got}")
    return "; ".join(lines)
