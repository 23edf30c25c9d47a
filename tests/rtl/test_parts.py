"""Parts of the units, each alone: by simulation against a reference, or by proof."""

import json
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from amaranth.hdl import Cat, Const, Module, Mux
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.sim import Simulator

import rtl.parts.leading_zeros
import rtl.parts.pipeline
import rtl.parts.rounding
import rtl.parts.shifting
from golden.formats import ATOMS, UE8M0, Kind, NumberFormat, scale_format
from rtl.parts import float_adder, scaled_product
from rtl.parts.axi_stream import AxiStream
from rtl.parts.factor import code_factor
from rtl.verilog import to_verilog
from sim.installed import quickest_simulator
from sim.simulator import Design, SimulationError, simulate
from sop.hdl.synthesis import SynthesisError, run_yosys
from tb.faults import changed_module
from tb.float_parts import AddersUnderTest, ProductsUnderTest
from tb.float_parts_bench import VARIABLE

FASTEST = quickest_simulator()
WIDTHS = {
    "exhaustive": (5, 3, 11),
    "INT8": (23, 16, 11),
    "E4M3": (44, 16, 11),  # more than the 53 bits of a float64
}
"""Widths of integer, significand and exponent."""

Faults = dict[str, tuple[str, str] | tuple[str, str, ModuleType]]
"""Text and what it becomes; and the part that has it, if not the one under test."""

LEADING, ROUNDING = rtl.parts.leading_zeros, rtl.parts.rounding
PIPELINE, SHIFTING = rtl.parts.pipeline, rtl.parts.shifting

ADDER_FAULTS: Faults = {
    "infinite second operand not seen": (" | second.exponent.all()", ""),
    "sign of cancelled infinities lost": ("(value.any() | normalized.infinite)", "value.any()"),
    "signs ignored": ("first.sign ^ second.sign", "0"),
    "stage moves without advance": ("with m.If(advance):\n        m.d.sync += held",
                                    "if True:\n        m.d.sync += held", PIPELINE),
    "what moves out lost": ("lost.eq(rest | (shifted & value[:step].any()))", "lost.eq(rest)",
                            SHIFTING),
}  # fmt: skip
PRODUCT_FAULTS: Faults = {
    "sign of the scale lost": ("(integer < 0) ^ sign", "integer < 0"),
    "magnitude not taken": ("Mux(integer < 0, -integer, integer)", "integer"),
    "bias off by one": ("exponent + (bits - 1 + BIAS)", "exponent + (bits + BIAS)"),
    "exponent of the zeros not taken": ("product.exponent - zeros", "product.exponent"),
    "rest lost": ("shifted[:below].any()", "0"),
    "flushed to zero": ("Mux(far, 0, value)", "Mux(below, 0, value)"),
    "far subnormals wrap": ("Mux(far, 0, value)", "value"),
    "rest of subnormals lost": ("rest | (shifted & value[:step].any())", "rest", SHIFTING),
    "normal numbers moved": ("asked if when is None else when & asked", "asked", SHIFTING),
    "subnormals one place low": ("distance.eq(1 - exponent)", "distance.eq(2 - exponent)"),
    "truncated": ("denormalized.exponent) + up", "denormalized.exponent)"),
    "tie away from zero": ("increment(kept, denormalized.value[0], denormalized.rest)",
                           "denormalized.value[0]"),
    "overflow wraps": ("normalized.nonzero & (exponent >= TOP_EXPONENT)", "0"),
    "zero gets an exponent": ("Mux(below | ~normalized.nonzero, 0, exponent)",
                              "Mux(below, 0, exponent)"),
}  # fmt: skip


def versions(module: ModuleType, faults: Faults) -> list[ModuleType]:
    """The part as it is, and with each of the faults."""
    return [
        module,
        *(
            changed_module(module, old, new, part=part[0] if part else None)
            for old, new, *part in faults.values()
        ),
    ]


def bench(
    unit: AddersUnderTest | ProductsUnderTest, testcase: str, build_root: Path, simulator: str,
    widths: str = "INT8",
) -> None:  # fmt: skip
    name = f"{testcase}_under_test"
    integer, significand, _ = WIDTHS[widths]
    config = {
        "seed": 5, "versions": len(unit.versions),
        "integer_bits": integer, "significand_bits": significand,
    }  # fmt: skip
    simulate(
        Design(name, to_verilog(unit, name), randomize=True),
        module="tb.float_parts_bench",
        simulator=simulator,
        build_root=build_root,
        environment={VARIABLE: json.dumps(config)},
        testcase=testcase,
    )


def product(widths: str, faults: Faults) -> ProductsUnderTest:
    integer, significand, exponent = WIDTHS[widths]
    return ProductsUnderTest(
        integer_bits=integer, significand_bits=significand, exponent_bits=exponent,
        versions=versions(scaled_product, faults),
    )  # fmt: skip


def test_float_adder(simulator: str, build_root: Path, thorough: bool) -> None:
    if simulator != FASTEST and not thorough:
        pytest.skip("only with --all-simulations")
    bench(AddersUnderTest(), "sums", build_root, simulator)


@pytest.mark.parametrize("widths", WIDTHS)
def test_scaled_product(widths: str, simulator: str, build_root: Path, thorough: bool) -> None:
    if simulator != FASTEST and not thorough:
        pytest.skip("only with --all-simulations")
    bench(product(widths, {}), "products", build_root, simulator, widths)


def test_faults_of_the_adder_are_noticed(build_root: Path) -> None:
    bench(
        AddersUnderTest(versions=versions(float_adder, ADDER_FAULTS)), "sums", build_root, FASTEST
    )


def test_faults_of_the_product_are_noticed(build_root: Path) -> None:
    bench(product("INT8", PRODUCT_FAULTS), "products", build_root, FASTEST, "INT8")


def test_a_right_version_among_the_wrong_ones_is_noticed(build_root: Path) -> None:
    unit = AddersUnderTest(versions=[float_adder, float_adder])
    with pytest.raises(SimulationError, match=r"wrong versions not noticed: \[1\]"):
        bench(unit, "sums", build_root, FASTEST)


def test_a_wrong_version_0_is_noticed(build_root: Path) -> None:
    wrong = versions(float_adder, ADDER_FAULTS)[1]
    with pytest.raises(SimulationError, match="expected result 0x"):
        bench(AddersUnderTest(versions=[wrong]), "sums", build_root, FASTEST)


# --- factors --------------------------------------------------------------------------------------


class FactorOfACode(wiring.Component):  # type: ignore[misc]  # Amaranth is untyped
    """:func:`rtl.parts.factor.code_factor` of one format.

    Parameters
    ----------
    fmt : NumberFormat

    Members
    -------
    code : In(unsigned)
        Code.
    sign, significand, exponent, reserved : Out(unsigned)
        Its factor.
    """

    def __init__(self, fmt: NumberFormat) -> None:
        self.fmt = fmt
        factor = code_factor(Const(0, fmt.width), fmt)
        self.offset = factor.offset
        super().__init__(
            {
                "code": In(fmt.width),
                **{name: Out(len(getattr(factor, name))) for name in FACTOR},
            }
        )

    def elaborate(self, platform: object) -> Module:
        m = Module()
        factor = code_factor(self.code, self.fmt)
        m.d.comb += [getattr(self, name).eq(getattr(factor, name)) for name in FACTOR]
        return m


FACTOR = ("sign", "significand", "exponent", "reserved")


@pytest.mark.parametrize(
    "fmt",
    [*ATOMS.values(), UE8M0, scale_format("S1E5M5"), scale_format("UE4M4")],
    ids=lambda fmt: fmt.name,
)
def test_factor_of_every_code(fmt: NumberFormat) -> None:
    unit = FactorOfACode(fmt)

    async def check(context: Any) -> None:
        for code in range(1 << fmt.width):
            context.set(unit.code, code)
            sign, significand, exponent, reserved = (
                context.get(getattr(unit, name)) for name in FACTOR
            )
            wanted = fmt.decode(code)
            assert reserved == (wanted.kind in (Kind.NAN, Kind.RESERVED)), code
            if not reserved:
                value = Fraction(significand) * Fraction(2) ** (exponent + unit.offset)
                assert (value if not sign else -value) == wanted.value, code

    simulator = Simulator(unit)
    simulator.add_testbench(check)
    simulator.run()


# --- ports of streams -----------------------------------------------------------------------------


def test_ports_of_an_axi_stream() -> None:
    stream = AxiStream("s_axis_scales", 32, user=3)
    receiver = wiring.Component(stream.members(In))
    sender = wiring.Component(stream.members(Out))
    described = {
        name: (member.flow, member.shape) for name, member in receiver.signature.members.items()
    }
    assert described == {
        "s_axis_scales_tdata": (In, 32),
        "s_axis_scales_tvalid": (In, 1),
        "s_axis_scales_tready": (Out, 1),
        "s_axis_scales_tlast": (In, 1),
        "s_axis_scales_tuser": (In, 3),
    }
    assert sender.signature.members.keys() == described.keys()
    assert sender.signature.members["s_axis_scales_tready"].flow is In
    ports = stream.ports(receiver)
    assert ports.ready is receiver.s_axis_scales_tready
    assert ports.user is receiver.s_axis_scales_tuser
    assert ports.keep is None


# --- proofs ---------------------------------------------------------------------------------------


class Claim(wiring.Component):  # type: ignore[misc]  # Amaranth is untyped
    """Something that holds for every value.

    Parameters
    ----------
    width : int
    module : module
        Part that it is about.

    Members
    -------
    value : In(unsigned)
        Any value.
    holds : Out(1)
        Always 1.
    """

    def __init__(self, *, width: int, module: ModuleType) -> None:
        self.module = module
        super().__init__({"value": In(width), "holds": Out(1)})


class CountsZeros(Claim):
    """Moved up by the count, the highest bit is on top, and nothing fell out."""

    def elaborate(self, platform: object) -> Module:
        m = Module()
        value, width = self.value, len(self.value)
        nonzero, zeros = self.module.leading_zeros(value)
        moved = (value << zeros)[: 2 * width]
        m.d.comb += self.holds.eq(
            (nonzero == value.any()) & (~nonzero | (moved[width - 1] & ~moved[width:].any()))
        )
        return m


class RoundsToEven(Claim):
    """Adding just below half, or half above an odd place, then cutting, rounds to nearest even."""

    dropped = 5

    def elaborate(self, platform: object) -> Module:
        m = Module()
        value, dropped = self.value, self.dropped
        kept, up = self.module.nearest_even(value, dropped)
        raised = value + ((1 << dropped - 1) - 1) + value[dropped]
        m.d.comb += self.holds.eq(Cat(kept + up) == raised[dropped:])
        return m


class ShiftsDown(Claim):
    """Moved down by the low bits of the distance, if at all; nothing that fell out is forgotten."""

    def elaborate(self, platform: object) -> Module:
        m = Module()
        distance, when, below = self.value[:6], self.value[6], self.value[7]
        value = self.value[8:]
        kept, rest, far = self.module.shift_down(m, value, below, distance, when=when)
        places = Mux(when, distance[:5], 0)
        m.d.comb += self.holds.eq(
            (kept == value >> places)
            & (rest == below | ((kept << places) != value))
            & (far == (when & distance[5]))
        )
        return m


def prove(claim: Claim, folder: Path) -> str:
    (folder / "claim.v").write_text(to_verilog(claim, "claim"))
    commands = [
        "read_verilog claim.v",
        "synth -flatten -top claim",
        "sat -prove holds 1 -verify claim",
    ]
    return run_yosys(folder, commands)


@pytest.mark.parametrize("width", [1, 2, 11, 32, 64])
def test_leading_zeros_are_counted(width: int, tmp_path: Path) -> None:
    assert "SUCCESS" in prove(CountsZeros(width=width, module=LEADING), tmp_path)


def test_shifting_loses_nothing(tmp_path: Path) -> None:
    assert "SUCCESS" in prove(ShiftsDown(width=8 + 28, module=SHIFTING), tmp_path)


def test_rounding_is_to_nearest_even(tmp_path: Path) -> None:
    assert "SUCCESS" in prove(RoundsToEven(width=24, module=ROUNDING), tmp_path)


@pytest.mark.parametrize(
    ("claim", "module", "old", "new"),
    [
        (ShiftsDown, SHIFTING, "lost.eq(rest |", "lost.eq("),
        (CountsZeros, LEADING, "Mux(high, above, below)", "above"),
        (RoundsToEven, ROUNDING, "half & (rest | kept[0])", "half & kept[0]"),
    ],
    ids=["shifting", "leading zeros", "rounding"],
)
def test_a_wrong_part_is_disproved(
    claim: type[Claim], module: ModuleType, old: str, new: str, tmp_path: Path
) -> None:
    faulty = changed_module(module, old, new)
    with pytest.raises(SynthesisError, match="proof did fail"):
        prove(claim(width=16, module=faulty), tmp_path)
