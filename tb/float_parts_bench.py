"""Cocotb bench of floating-point parts: operands in, a float32 out so many clocks later.

The references are NumPy's float32 addition and exact fractions. The module under test is one of
:mod:`tb.float_parts`: version 0 has to be right always, each of the others wrong at least once.
"""

import json
import os
import random
from collections import deque
from fractions import Fraction
from typing import Any

import cocotb
import numpy as np
from cocotb.triggers import RisingEdge
from numpy.typing import NDArray

from golden.formats import FP32
from rtl.parts import float_adder, scaled_product
from sim.clock import start_clock
from tb.exact import float32_bits

__all__ = ["SUMS", "VARIABLE", "products", "sums"]

VARIABLE = "SOP_PART"
"""Environment variable: number of versions, widths of a product's operands and seed, as JSON."""

SUMS = 4000
PRODUCTS = 2000

INFINITY = np.uint32(FP32.exponent_mask)
SIGN = np.uint32(0x80000000)

Bits = NDArray[np.uint32]


def float_pairs(rng: np.random.Generator, count: int) -> tuple[Bits, Bits]:
    """Operands of every kind: near in size, opposite, half a last place apart, at both ends."""
    first = rng.integers(1 << 32, size=count, dtype=np.uint32)
    second = rng.integers(1 << 32, size=count, dtype=np.uint32)
    kind = rng.integers(10, size=count)
    exponent = FP32.exponent_field(first).astype(np.int64)
    near = np.clip(exponent + rng.integers(-27, 28, size=count), 0, 254).astype(np.uint32)
    at_exponent = second & np.uint32(0x807FFFFF) | near << np.uint32(23)
    second = np.where(kind < 4, at_exponent, second)
    # Cancellation, to zero or to a few last places.
    opposite = (first ^ SIGN) + rng.integers(-2, 3, size=count).astype(np.uint32)
    second = np.where(kind == 4, opposite, second)
    # Half of a last place: a tie.
    tie = np.clip(exponent - 24, 0, 254).astype(np.uint32) << np.uint32(23) | second & SIGN
    second = np.where(kind == 5, tie, second)
    small = np.uint32(0x80FFFFFF)  # subnormals and the first binade above them
    first, second = (np.where(kind == 6, bits & small, bits) for bits in (first, second))
    # The largest numbers, whose sums are infinities or nearly so; infinities; zeros.
    large = first | np.uint32(0x7F000000)
    first = np.where(kind == 7, np.where(rng.random(count) < 0.5, large, large | 0x7FFFFF), first)
    second = np.where(kind == 7, second | np.uint32(0x70000000), second)
    first = np.where((kind == 8) & (rng.random(count) < 0.5), first | INFINITY, first)
    second = np.where((kind == 8) & (rng.random(count) < 0.5), second | INFINITY, second)
    first = np.where((kind == 9) & (rng.random(count) < 0.5), first & SIGN, first)
    second = np.where((kind == 9) & (rng.random(count) < 0.5), second & SIGN, second)
    return _without_nan(first.astype(np.uint32)), _without_nan(second.astype(np.uint32))


def _without_nan(bits: Bits) -> Bits:
    top = bits & INFINITY == INFINITY
    return np.where(top, bits & (SIGN | INFINITY), bits).astype(np.uint32)


def sums_of(first: Bits, second: Bits) -> Bits:
    """The sums that the adder promises."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = first.view(np.float32) + second.view(np.float32) + np.float32(0)
    infinite = first & ~SIGN == INFINITY
    return np.where(infinite, first, total.view(np.uint32)).astype(np.uint32)


async def check(
    dut: Any, operands: dict[str, list[int]], expected: list[dict[str, int]], latency: int
) -> None:
    """Give operands clock by clock, with and without pauses, and compare every result."""
    config = json.loads(os.environ[VARIABLE])
    start_clock(dut)
    dut.rst.value = 0
    rng, edge = random.Random(config["seed"]), RisingEdge(dut.clk)
    unnoticed = set(range(1, config["versions"]))
    under_way: deque[int] = deque()
    await edge
    for number in range(len(expected) + latency):
        index = min(number, len(expected) - 1)
        for name, values in operands.items():
            getattr(dut, name).value = values[index]
        if config["versions"] > 1 and not unnoticed:
            return  # version 0 alone has a run of its own
        # Half of the time without any pause.
        pauses = rng.choice((0, 0, 0, 1, 3)) if number % 256 < 128 else 0
        for pause in range(pauses + 1):
            dut.advance.value = int(pause == pauses)
            await edge
            if len(under_way) < latency:
                continue
            wanted = expected[under_way[0]]
            case = [values[under_way[0]] for values in operands.values()]
            for version in (0, *unnoticed):
                given = {name: int(getattr(dut, f"{name}_{version}").value) for name in wanted}
                if version and given != wanted:
                    unnoticed.discard(version)
                elif given != wanted:
                    raise AssertionError(f"{case}: {_hex(given)}, expected {_hex(wanted)}")
        if len(under_way) == latency:
            under_way.popleft()
        under_way.append(index)
    assert not unnoticed, f"wrong versions not noticed: {sorted(unnoticed)}"


def _hex(values: dict[str, int]) -> str:
    return ", ".join(f"{name} {value:#x}" for name, value in values.items())


@cocotb.test()
async def sums(dut: Any) -> None:
    """Sums of every kind."""
    seed = json.loads(os.environ[VARIABLE])["seed"]
    first, second = float_pairs(np.random.default_rng(seed), SUMS)
    total = sums_of(first, second)
    # The traffic must hold the hard cases.
    infinite = [bits & ~SIGN == INFINITY for bits in (first, second, total)]
    assert ((total & ~SIGN != 0) & (total & INFINITY == 0)).any(), "no subnormal sum"
    assert ((total == 0) & (first & ~SIGN != 0)).any(), "nothing cancels"
    assert (infinite[2] & ~infinite[0] & ~infinite[1]).any(), "no sum overflows"
    assert (infinite[0] & infinite[1] & (first != second)).any(), "no opposite infinities"
    expected = [
        {"result": value, "overflow": int(flag)}
        for value, flag in zip(total.tolist(), infinite[2].tolist(), strict=True)
    ]
    operands = {"first": first.tolist(), "second": second.tolist()}
    await check(dut, operands, expected, float_adder.LATENCY)


def factors(rng: random.Random, integer_bits: int, significand_bits: int) -> tuple[int, ...]:
    """One case: integer, sign, significand, and an exponent, often at an end of float32's range."""
    limit = (1 << integer_bits - 1) - 1
    # Of any length, so that products begin at any bit.
    integer = rng.randint(0, limit) >> rng.randrange(integer_bits)
    significand = rng.getrandbits(significand_bits) >> rng.choice((0, 0, rng.randrange(8)))
    chance = rng.random()
    if chance < 0.15:  # a tie with many zeros below it
        integer = min(limit, (2 * rng.getrandbits(3) + 1) << rng.randrange(integer_bits))
    elif chance < 0.2:
        integer, significand = limit, (1 << significand_bits) - 1
    length = integer.bit_length() + significand.bit_length()
    exponent = rng.choice((
        rng.randint(-40, 40), -length + rng.randint(-153, -120), -length + rng.randint(124, 131),
        rng.randint(-400, 400),
    ))  # fmt: skip
    return rng.choice((-1, 1)) * integer, rng.getrandbits(1), significand, exponent


def exact_product(integer: int, sign: int, significand: int, exponent: int) -> int:
    """Bits of the product, rounded once."""
    value = Fraction(abs(integer) * significand) * Fraction(2) ** exponent
    return float32_bits(value, negative=bool(sign) != (integer < 0))


@cocotb.test()
async def products(dut: Any) -> None:
    """Products of every kind; of short operands all, at every exponent where something changes."""
    config = json.loads(os.environ[VARIABLE])
    bits = config["integer_bits"], config["significand_bits"]
    rng = random.Random(config["seed"])
    if sum(bits) < 10:
        limit = (1 << bits[0] - 1) - 1
        cases: list[tuple[int, ...]] = [
            (integer, rng.getrandbits(1), significand, exponent)
            for integer in range(-limit, limit + 1)
            for significand in range(1 << bits[1])
            for exponent in (*range(-159, -145), -130, 0, *range(120, 129))
        ]
    else:
        cases = [factors(rng, *bits) for _ in range(PRODUCTS)]
        # The smallest normal number, exactly and by rounding 2**24 - 1 half places.
        cases += [(1, 0, 1, -126), (4097, 0, 4095, -150), (-4097, 0, 4095, -151)]
    expected = [{"result": exact_product(*case)} for case in cases]
    magnitudes = {result["result"] & 0x7FFFFFFF for result in expected}
    assert {0, int(INFINITY), 1, 1 << 23} <= magnitudes, "an end of the range is missing"
    operands: dict[str, list[int]] = {
        name: [case[place] for case in cases]
        for place, name in enumerate(("multiplicand", "sign", "significand", "exponent"))
    }
    await check(dut, operands, expected, scaled_product.LATENCY)
