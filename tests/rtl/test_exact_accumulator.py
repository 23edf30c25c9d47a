"""What :mod:`scripts.exact_accumulator` measures computes what golden's exact accumulator does."""

import random
import runpy
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from amaranth.sim import Simulator

from tb.exact import float32_bits

MODULE = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "exact_accumulator.py"))
STEPS, BLOCKS = MODULE["STEPS"], 3


@pytest.mark.parametrize("lowest", [-20, -170, 90])
def test_sums_are_rounded_once(lowest: int) -> None:
    """Ordinary ones, subnormals, and the largest."""
    rng = random.Random(1)
    unit = MODULE["Exact"](24)
    terms = [
        [
            (rng.randint(-(1 << 18) + 1, (1 << 18) - 1), rng.getrandbits(1), rng.getrandbits(6),
             rng.randint(0, 24))
            for _ in range(STEPS)
        ]
        for _ in range(BLOCKS)
    ]  # fmt: skip
    found: list[int] = []

    async def drive(context: Any) -> None:
        context.set(unit.advance, 1)
        context.set(unit.lowest, lowest)
        for block in range(BLOCKS):
            for integer, sign, significand, exponent in terms[block]:
                context.set(unit.integer, integer)
                context.set(unit.sign, sign)
                context.set(unit.significand, significand)
                context.set(unit.exponent, exponent)
                context.set(unit.opens, int(not block))
                await context.tick()
                found.append(context.get(unit.o))
        for _ in range(16):
            await context.tick()
            found.append(context.get(unit.o))

    simulator = Simulator(unit)
    simulator.add_clock(1e-6)
    simulator.add_testbench(drive)
    simulator.run()
    expected = []
    for step in range(STEPS):
        exact = sum(
            integer * (-1) ** sign * significand * Fraction(2) ** (exponent + lowest)
            for integer, sign, significand, exponent in (block[step] for block in terms)
        )
        expected.append(float32_bits(abs(Fraction(exact)), negative=exact < 0))
    latency = 6  # two clocks to the term, one to its sum, and rounding
    first = (BLOCKS - 1) * STEPS + latency
    assert found[first : first + STEPS] == expected
