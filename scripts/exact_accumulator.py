"""What the kernel's exact accumulator would cost in hardware, beside the float32 one.

Both are what a scale unit of a tile of 16 outputs a unit has behind the product of a block (weights
HIF7 under S1E5M5, activations INT8 under UE8M0, blocks of 16): the multiplication with the scale,
the accumulators of all 16 outputs, and rounding to float32. The exact one has a window of so many
binades of products of scales; nothing may lie outside. Run it as
`python scripts/exact_accumulator.py 8 16 24 --liberty cells.lib`; docs/kernel.md has the figures.
"""

import argparse
import tempfile
from pathlib import Path

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from rtl.layouts import FLOAT32
from rtl.parts import float_adder, scaled_product
from rtl.parts.float_adder import add_floats
from rtl.parts.leading_zeros import leading_zeros
from rtl.parts.pipeline import delayed
from rtl.parts.rounding import increment
from rtl.verilog import to_verilog
from sop.hdl.synthesis import passes, resources, run_yosys

STEPS = 16  # outputs of a unit
INTEGER = 19  # bits of P and its sign: 16 x 128 x 127
SIGNIFICAND = 6  # of S1E5M5 times UE8M0
BLOCKS = 8  # bits for as many blocks: 4096 input channels
BIAS = 127
TOP_EXPONENT = 255


class _Accumulator(wiring.Component):  # type: ignore[misc]  # Amaranth is untyped
    """``integer * (-1)**sign * significand * 2**exponent`` of each output in turn."""

    def __init__(self, exponent_bits: int) -> None:
        super().__init__(
            {
                "integer": In(signed(INTEGER)),
                "sign": In(1),
                "significand": In(SIGNIFICAND),
                "exponent": In(signed(exponent_bits)),
                "lowest": In(signed(10)),
                "opens": In(1),
                "advance": In(1),
                "o": Out(32),
            }
        )


class Float32(_Accumulator):
    """As :class:`rtl.sop_tile.SopTile` has it."""

    def __init__(self) -> None:
        super().__init__(11)

    def elaborate(self, platform: object) -> Module:
        """Logic."""
        m, advance = Module(), self.advance
        product = scaled_product.scaled_product(
            m, self.integer, self.sign, self.significand, self.exponent, advance
        )
        opens = delayed(m, self.opens, scaled_product.LATENCY, advance=advance, name="opens")[-1]
        returning, before = Signal(FLOAT32), Signal(FLOAT32)
        m.d.comb += before.eq(Mux(opens, 0, returning))
        total, _ = add_floats(m, before, product, advance)
        rest = delayed(m, total, STEPS - float_adder.LATENCY, advance=advance, name="ring")
        m.d.comb += [returning.eq(rest[-1]), self.o.eq(total)]
        return m


class Exact(_Accumulator):
    """Fixed-point, rounded at the end in four clocks; exponents count from the window's lowest.

    Parameters
    ----------
    binades : int
        Of the window.
    """

    def __init__(self, binades: int) -> None:
        self.bits = INTEGER + SIGNIFICAND + binades + BLOCKS
        super().__init__(binades.bit_length() + 1)

    def elaborate(self, platform: object) -> Module:
        """Logic."""
        m, advance, bits = Module(), self.advance, self.bits
        significand = Cat(self.significand, Const(0, 1)).as_signed()
        product = self.integer * Mux(self.sign, -significand, significand)
        held = delayed(m, product, 1, advance=advance, name="product")[0]
        distance = delayed(m, self.exponent[:-1], 1, advance=advance, name="distance")[0]
        shifted, returning, total = (
            Signal(signed(bits), name=name) for name in ("shifted", "returning", "total")
        )
        m.d.comb += shifted.eq(held << distance)
        term = delayed(m, shifted, 1, advance=advance, name="term")[0]
        opens = delayed(m, self.opens, 2, advance=advance, name="opens")[-1]
        m.d.comb += total.eq(term + Mux(opens, 0, returning))
        ring = delayed(m, total, STEPS, advance=advance, name="ring")
        m.d.comb += returning.eq(ring[-1])
        self._round(m, ring[0])
        return m

    def _round(self, m: Module, total: Signal) -> None:
        """Magnitude; top bit up; subnormals; rounding."""
        bits, advance = self.bits, self.advance
        magnitude = Mux(total < 0, -total, total)[:bits]
        held = delayed(m, magnitude, 1, advance=advance, name="magnitude")[0]
        sign = delayed(m, total[-1], 2, advance=advance, name="sign")[-1]
        filled = 1 << (bits - 1).bit_length()
        nonzero, zeros = leading_zeros(Cat(Const(0, filled - bits), held))
        moved = Signal(bits)
        m.d.comb += moved.eq(held << zeros)
        kept = scaled_product.SIGNIFICAND + 1
        layout = data.StructLayout(
            {"sign": 1, "value": kept, "rest": 1, "exponent": signed(12), "nonzero": 1}
        )
        normalized = Signal(layout)
        m.d.comb += [
            normalized.value.eq(moved[bits - kept :]),
            normalized.rest.eq(moved[: bits - kept].any()),
            normalized.exponent.eq(self.lowest + (bits - 1 + BIAS) - zeros),
            normalized.nonzero.eq(nonzero),
        ]
        stage = delayed(m, normalized, 1, advance=advance, name="normalized")[0]
        self._pack(m, stage, sign)

    def _pack(self, m: Module, normalized: Signal, sign: Signal) -> None:
        below, exponent = Signal(), normalized.exponent
        distance, value, rest = Signal(5), normalized.value, normalized.rest
        m.d.comb += [
            below.eq(exponent < 1),
            distance.eq(Mux(1 - exponent > 31, 31, 1 - exponent)),
        ]
        for bit in range(5):
            step, moves = 1 << bit, below & distance[bit]
            rest = rest | (moves & value[:step].any())
            value = Mux(moves, value >> step, value)
        infinite = normalized.nonzero & (exponent >= TOP_EXPONENT)
        field = Mux(below | ~normalized.nonzero, 0, exponent)[:8]
        fields = Cat(value, rest, field, infinite, sign)
        held = delayed(m, fields, 1, advance=self.advance, name="denormalized")[0]
        width = len(value)
        kept, rest = held[1:width], held[width]
        up = increment(kept, held[0], rest)
        packed = Cat(kept[:-1], held[width + 1 : width + 9]) + up
        result = Cat(Mux(held[-2], TOP_EXPONENT << 23, packed[:31])[:31], held[-1])
        m.d.comb += self.o.eq(delayed(m, result, 1, advance=self.advance, name="result")[0])


def area(verilog: str, top: str, liberty: Path) -> str:
    """Area with the cells of a library, flip-flops included, in the library's unit."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "design.v").write_text(verilog)
        commands = [
            "read_verilog design.v",
            f"synth -flatten -top {top}",
            f"dfflibmap -liberty {liberty.resolve()}",
            f"abc -liberty {liberty.resolve()}",
            "opt_clean",
            f"tee -o area.txt stat -liberty {liberty.resolve()}",
        ]
        run_yosys(Path(folder), commands)
        text = (Path(folder) / "area.txt").read_text()
    return next(line.split()[-1] for line in text.splitlines() if "Chip area" in line)


def main() -> None:
    """Print gates, flip-flops and areas."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("binades", type=int, nargs="+", help="windows of exponents")
    parser.add_argument("--liberty", type=Path, action="append", default=[])
    options = parser.parse_args()
    units = {"float32": Float32(), **{f"exact_{n}": Exact(n) for n in options.binades}}
    for name, unit in units.items():
        verilog = to_verilog(unit, name)
        gates, ecp5 = (resources(verilog, passes(target, name)) for target in ("gates", "ecp5"))
        areas = [area(verilog, name, liberty) for liberty in options.liberty]
        print(
            f"{name}: {gates['gate_equivalents']} gate equivalents, {gates['flip_flops']} "
            f"flip-flops, depth {gates['logic_depth']}, {ecp5['luts']} LUTs; areas {areas}",
            flush=True,
        )


if __name__ == "__main__":
    main()
