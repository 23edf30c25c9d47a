"""A tile of float accumulators, to compare the scaled outer product with; not for use."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from golden.notation import QuantFormat
from rtl.hif_to_float import HifToFloat
from rtl.layouts import FLOAT32
from rtl.modes import Modes
from rtl.parts import float_fields
from rtl.parts.float_adder import add_floats
from rtl.parts.scaled_product import scaled_product

__all__ = ["FloatTile"]


class FloatTile(wiring.Component):
    """Scale every weight, multiply in floating point, add every product in floating point.

    Each row has a :class:`rtl.hif_to_float.HifToFloat` for its weight, each product a multiplier,
    rounded to float32, and a float32 adder. An adder takes five clocks, so it keeps five sums in
    turn; what would add those up at the end is left out, as are handshakes, flags, and how
    activations become floats: all in favour of this tile.

    Parameters
    ----------
    rows, columns : int
    weights : QuantFormat
    float_layout : data.StructLayout
        Of weights and activations before they are multiplied, ``FLOAT32`` or ``BFLOAT16``.

    Members
    -------
    codes, scales : In(data.ArrayLayout)
        A code of a LUT entry or an atom, and a scale code, for each row.
    layer_exponent : In(8)
        Of all weights, signed.
    activations : In(data.ArrayLayout)
        For each column.
    opens : In(1)
        Sums begin anew with the products of this clock.
    values : Out(data.ArrayLayout)
        Sums, column by column.
    """

    def __init__(
        self, *, rows: int, columns: int, weights: QuantFormat, float_layout: data.StructLayout
    ) -> None:
        self.rows, self.columns, self.float_layout = rows, columns, float_layout
        self.modes = Modes((weights,))
        super().__init__(
            {
                "codes": In(data.ArrayLayout(self.modes.code_bits, rows)),
                "scales": In(data.ArrayLayout(self.modes.scale_bits, rows)),
                "layer_exponent": In(8),
                "activations": In(data.ArrayLayout(float_layout, columns)),
                "opens": In(1),
                "values": Out(data.ArrayLayout(FLOAT32, rows * columns)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        weights = [self._weight(m, row) for row in range(self.rows)]
        for column in range(self.columns):
            held = Signal(self.float_layout, name=f"activation_{column}", reset_less=True)
            m.d.sync += held.eq(self.activations[column])
            for row, weight in enumerate(weights):
                total = Signal(FLOAT32, name=f"total_{row}_{column}")
                product = self._product(m, weight, held)
                before = Mux(self.opens, 0, total.as_value())
                result, _ = add_floats(m, data.View(FLOAT32, before), product, Const(1))
                m.d.comb += [
                    total.eq(result),
                    self.values[column * self.rows + row].eq(total),
                ]
        return m

    def _weight(self, m: Module, row: int) -> Value:
        """The weight of a row as a float; of the decoder's lanes synthesis leaves the first."""
        unit = HifToFloat(lanes=8, modes=self.modes, float_layout=self.float_layout)
        m.submodules[f"decoder_{row}"] = unit
        m.d.comb += [
            unit.i.valid.eq(1),
            unit.o.ready.eq(1),
            Value.cast(unit.i.p.codes[0]).eq(self.codes[row]),
            unit.i.p.scales[0].eq(self.scales[row]),
            unit.i.p.layer_exponent.eq(self.layer_exponent.as_signed()),
        ]
        return unit.o.p.values[0]

    def _product(self, m: Module, first: Value, second: Value) -> Value:
        """Their product, rounded to float32."""

        def significand(value: Value) -> Value:
            return float_fields.significand(value.mantissa, value.exponent)

        def exponent(value: Value) -> Value:
            return float_fields.place(value.exponent)

        last_place = 2 * (float_fields.BIAS + self.float_layout["mantissa"].width)
        return scaled_product(
            m,
            Cat(significand(first), Const(0, 1)).as_signed(),
            first.sign ^ second.sign,
            significand(second),
            (exponent(first) + exponent(second)).as_signed() - last_place,
            Const(1),
        )
