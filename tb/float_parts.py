"""Parts of :mod:`rtl.parts` as components, so that each can be simulated alone.

Several versions of a part, of which one is right and the others are wrong, can stand side by side:
one simulation then shows whether a bench notices each of them.
"""

from collections.abc import Sequence
from types import ModuleType

from amaranth.hdl import Module, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from rtl.layouts import FLOAT32
from rtl.parts import float_adder, scaled_product

__all__ = ["AddersUnderTest", "ProductsUnderTest"]


class AddersUnderTest(wiring.Component):  # type: ignore[misc]  # Amaranth is untyped
    """:func:`rtl.parts.float_adder.add_floats`.

    Parameters
    ----------
    versions : sequence of module
        Versions of :mod:`rtl.parts.float_adder`.

    Members
    -------
    first, second : In(FLOAT32)
        Operands.
    advance : In(1)
        All stages move.
    result_0, ... : Out(FLOAT32)
        Sum of each version.
    overflow_0, ... : Out(1)
        It is an infinity.
    """

    def __init__(self, *, versions: Sequence[ModuleType] = (float_adder,)) -> None:
        self.versions = tuple(versions)
        numbers = range(len(self.versions))
        super().__init__(
            {
                "first": In(FLOAT32),
                "second": In(FLOAT32),
                "advance": In(1),
                **{f"result_{number}": Out(FLOAT32) for number in numbers},
                **{f"overflow_{number}": Out(1) for number in numbers},
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Logic."""
        m = Module()
        for number, version in enumerate(self.versions):
            total, overflow = version.add_floats(m, self.first, self.second, self.advance)
            m.d.comb += [
                getattr(self, f"result_{number}").eq(total),
                getattr(self, f"overflow_{number}").eq(overflow),
            ]
        return m


class ProductsUnderTest(wiring.Component):  # type: ignore[misc]  # Amaranth is untyped
    """:func:`rtl.parts.scaled_product.scaled_product`.

    Parameters
    ----------
    integer_bits, significand_bits, exponent_bits : int
        Widths of the operands.
    versions : sequence of module
        Versions of :mod:`rtl.parts.scaled_product`.

    Members
    -------
    multiplicand : In(signed)
        Integer factor.
    sign : In(1)
        Of the scale.
    significand : In(unsigned)
        Of the scale.
    exponent : In(signed)
        Of the product's last place.
    advance : In(1)
        All stages move.
    result_0, ... : Out(FLOAT32)
        Product of each version.
    """

    def __init__(
        self, *, integer_bits: int, significand_bits: int, exponent_bits: int,
        versions: Sequence[ModuleType] = (scaled_product,),
    ) -> None:  # fmt: skip
        self.versions = tuple(versions)
        super().__init__(
            {
                "multiplicand": In(signed(integer_bits)),
                "sign": In(1),
                "significand": In(significand_bits),
                "exponent": In(signed(exponent_bits)),
                "advance": In(1),
                **{f"result_{number}": Out(FLOAT32) for number in range(len(self.versions))},
            }
        )

    def elaborate(self, platform: object) -> Module:
        """Logic."""
        m = Module()
        for number, version in enumerate(self.versions):
            product = version.scaled_product(
                m, self.multiplicand, self.sign, self.significand, self.exponent, self.advance
            )
            m.d.comb += getattr(self, f"result_{number}").eq(product)
        return m
