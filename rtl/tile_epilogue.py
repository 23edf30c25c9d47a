"""What comes after the sums of a tile: row scales, corrections, and the format of the outputs."""

from collections.abc import Sequence

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from golden.formats import BF16, FloatFormat, NumberFormat
from rtl.column_capture import ColumnCapture
from rtl.layouts import (
    BFLOAT16,
    FLOAT32,
    column_layout,
    epilogue_activations_layout,
    epilogue_outputs_layout,
    tile_correction_layout,
    tile_outputs_layout,
    tile_row_scales_layout,
)
from rtl.parts import float_adder, scaled_product
from rtl.parts.choice import pick
from rtl.parts.factor import code_factor
from rtl.parts.float_adder import add_floats
from rtl.parts.pipeline import delayed
from rtl.parts.rounding import nearest_even
from rtl.parts.scaled_product import scaled_product as rounded_product
from rtl.tile_banks import Banks, EpilogueShape, Targets

__all__ = ["MAX_SLOTS", "TileEpilogue", "clocks_of_tile"]

MAX_SLOTS = 1 << 16

_BIAS = 127 + 23  # of the exponent of a float32's last place
_INFINITE = 255

# From a correction to its product: the memory, a register, the product; then the sum, from whose
# operands on a later correction of the same output has to wait.
_PRODUCT = 2 + scaled_product.LATENCY
_SUM = _PRODUCT + float_adder.LATENCY


def clocks_of_tile(shape: EpilogueShape, rows: Sequence[int], *, row_scales: bool) -> int:
    """Clocks from the first sums of a tile that come in to the first that may come in after them.

    While nothing is waited for.

    Parameters
    ----------
    shape : EpilogueShape
    rows : sequence of int
        Row of each correction of the tile, in their order.
    row_scales : bool
        Whether the hardware has them.
    """
    free: dict[tuple[int, int], int] = {}
    clock = 0
    for row in rows:
        for turn in range(shape.turns):
            clock = max(clock, free.get((row, turn), 0))
            free[row, turn] = clock + float_adder.LATENCY + 1
            clock += 1
    scaled = (1 + scaled_product.LATENCY) * row_scales
    work = clock + _SUM if rows else max(1, scaled)
    return 2 * shape.used + work


class TileEpilogue(wiring.Component):
    """Multiply the sums of a tile with row scales and add the corrections of their rows.

    ``y = round(sum * row scale)``, then for each correction of the row in the order in which they
    come ``y = round(y + round(value * activation))``, all to float32, then, if bfloat16 is to come
    out, rounded once more; nearest, ties to even. Infinities stay. Bit-equal to
    :func:`golden.kernel.finish`.

    The outputs of one tile are held in a memory, ``shape.units`` banks of ``shape.used`` float32.
    It is filled through the multipliers of the row scales; then corrections are added, each to all
    tokens at once (in ``shape.turns`` clocks), while :class:`rtl.column_capture.ColumnCapture` has
    kept the activations of their columns; then the outputs leave.

    Throughput one correction in ``shape.turns`` clocks. A correction of a row of which another one
    is being added waits for that sum, 6 clocks, so corrections of different rows should take turns.
    A tile with n corrections that need not wait takes 2 s + n + 11 clocks, s = ``shape.used``
    (:func:`clocks_of_tile`; without any 2 s + 1, with row scales 2 s + 5): a tile of that many
    input channels or more never waits for it. A stalled output stalls the sums that come next.

    ``overflow``: an output of the beat is an infinity. ``reserved``: as it came, or a row scale or
    a correction of the tile is no finite bfloat16; such a correction is dropped, such a row scale
    has no defined product. ``misplaced``: a correction or a column of the tile was dropped because
    there is no such row, slot or channel. Both in all beats of the tile.

    Parameters
    ----------
    rows, columns, block_size : int
        Of the tile.
    activation : NumberFormat
        Elements of the activations.
    activation_scale : FloatFormat
        Their scales.
    slots : int
        Most input channels of a tile with corrections, a power of two up to 65,536.
    row_scales : bool
        Whether there are row scales.
    float_layout : data.StructLayout
        ``FLOAT32`` or ``BFLOAT16`` of :mod:`rtl.layouts`: what comes out.

    Members
    -------
    i : In(stream.Signature(tile_outputs_layout))
        Sums as :class:`rtl.sop_tile.SopTile` gives them; ``last`` is not looked at.
    i_row_scale : In(stream.Signature(tile_row_scales_layout))
        Row scales of each tile; only with ``row_scales``.
    i_activation : In(stream.Signature(epilogue_activations_layout))
        Activations of each tile, as it got them.
    i_column : In(stream.Signature(column_layout))
        Columns that have corrections.
    i_correction : In(stream.Signature(tile_correction_layout))
        Corrections; those of a row with ascending columns.
    o : Out(stream.Signature(epilogue_outputs_layout))
        Outputs in the same order as the sums.
    """

    def __init__(
        self, *, rows: int, columns: int, block_size: int, activation: NumberFormat,
        activation_scale: FloatFormat, slots: int, row_scales: bool,
        float_layout: data.StructLayout = FLOAT32,
    ) -> None:  # fmt: skip
        if not 2 <= slots <= MAX_SLOTS or slots & (slots - 1):
            raise ValueError(f"slots must be a power of two from 2 to {MAX_SLOTS}, not {slots!r}")
        if float_layout not in (FLOAT32, BFLOAT16):
            raise ValueError(f"float_layout must be FLOAT32 or BFLOAT16, not {float_layout!r}")
        self.rows = rows
        self.columns = columns
        self.activation = activation
        self.activation_scale = activation_scale
        self.row_scales = row_scales
        self.float_layout = float_layout
        self.shape = EpilogueShape(rows, columns, block_size)
        self.capture = ColumnCapture(
            columns=columns, block_size=block_size, activation=activation,
            activation_scale=activation_scale, slots=slots,
        )  # fmt: skip
        activations = epilogue_activations_layout(
            columns=columns, element=activation, scale=activation_scale
        )
        units = self.shape.units
        scales = {"i_row_scale": In(stream.Signature(tile_row_scales_layout(rows=rows)))}
        super().__init__(
            {
                "i": In(stream.Signature(tile_outputs_layout(units=units))),
                **(scales if row_scales else {}),
                "i_activation": In(stream.Signature(activations)),
                "i_column": In(stream.Signature(column_layout())),
                "i_correction": In(
                    stream.Signature(tile_correction_layout(rows=rows, slots=slots))
                ),
                "o": Out(
                    stream.Signature(
                        epilogue_outputs_layout(units=units, float_layout=float_layout)
                    )
                ),
            }
        )

    def elaborate(self, platform):
        m = Module()
        filling, adding, leaving = Signal(init=1), Signal(), Signal()
        step, final = Signal(range(self.shape.used)), Signal()
        reserved, misplaced = Signal(reset_less=True), Signal(reset_less=True)
        m.d.comb += final.eq(step == self.shape.used - 1)
        banks = Banks(m, self.shape)
        accept, bad_scales, filled = self._fill(m, filling, step, final, banks)
        with m.If(accept):
            m.d.sync += [
                step.eq(Mux(final, 0, step + 1)),
                reserved.eq((reserved & step.any()) | self.i.p.reserved | bad_scales),
                misplaced.eq(0),
            ]
            with m.If(final):
                m.d.sync += [filling.eq(0), adding.eq(1)]

        taken, added = self._add(m, adding, reserved, misplaced, banks)
        with m.If(taken & self.i_correction.p.last):
            m.d.sync += [adding.eq(0), leaving.eq(1)]

        free, leaves = Signal(), Signal(name="outputs_leave")
        m.d.comb += [
            free.eq(~self.o.valid | self.o.ready),
            leaves.eq(leaving & ~filled & ~added),
            banks.step.eq(step),
            banks.leaves.eq(leaves),  # until then the last sums are read
        ]
        self._leave(m, free, banks.values, {"reserved": reserved, "misplaced": misplaced}, final)
        with m.If(free):
            m.d.sync += self.o.valid.eq(leaves)
            with m.If(leaves):
                m.d.sync += step.eq(Mux(final, 0, step + 1))
                with m.If(final):
                    m.d.sync += [leaving.eq(0), filling.eq(1)]
        return m

    def _fill(
        self, m: Module, filling: Value, step: Value, final: Value, banks: "Banks"
    ) -> tuple[Value, Value, Value]:
        """Put sums into the banks, times row scales.

        Returns
        -------
        accept, reserved, busy : Value
            A beat comes in; a row scale that comes with it is reserved; one is under way.
        """
        accept = Signal(name="accept_sums")
        if not self.row_scales:
            m.d.comb += [self.i.ready.eq(filling), accept.eq(self.i.valid & filling)]
            banks.fill(accept, step, [value.as_value() for value in self.i.p.values])
            return accept, Const(0), Const(0)
        scales = self.i_row_scale.p.scales
        m.d.comb += [
            self.i.ready.eq(filling & self.i_row_scale.valid),
            accept.eq(self.i.valid & self.i.ready),
            self.i_row_scale.ready.eq(accept & final),
        ]
        clocks = 1 + scaled_product.LATENCY
        # What a reset leaves here is written before the same address of the next tile is.
        valid = delayed(m, accept, clocks, advance=Const(1), name="scaled")
        address = delayed(m, step, clocks, advance=Const(1), name="scaled_step")[-1]
        chosen: dict[tuple[int, ...], Value] = {}
        values = []
        for unit in range(self.shape.units):
            places = [self.shape.place(unit, number) for number in range(self.shape.used)]
            rows = tuple(place[0] if place else 0 for place in places)
            if rows not in chosen:  # units that have the same rows share a multiplexer
                chosen[rows] = scale = Signal(16, name=f"row_scale_{unit}", reset_less=True)
                m.d.sync += scale.eq(pick([scales[row].as_value() for row in rows], step))
            values.append(self._row_scaled(m, unit, self.i.p.values[unit], chosen[rows]))
        banks.fill(valid[-1], address, values)
        reserved = Cat(scale.exponent.all() for scale in scales).any()
        return accept, reserved, Cat(valid).any()

    def _row_scaled(self, m: Module, unit: int, value: Value, scale: Value) -> Value:
        """A sum times the row scale that comes one clock later, rounded to float32."""
        held = Signal(FLOAT32, name=f"unscaled_{unit}", reset_less=True)
        m.d.sync += held.eq(value)
        factor = code_factor(scale, BF16)
        normal = held.exponent.any()
        exponent = Cat(held.exponent[0] | ~normal, held.exponent[1:]) + factor.exponent
        product = rounded_product(
            m,
            Cat(held.mantissa, normal, Const(0, 1)).as_signed(),
            held.sign ^ factor.sign,
            factor.significand,
            exponent + (factor.offset - _BIAS),
            Const(1),
        )
        clocks = scaled_product.LATENCY
        infinite = delayed(
            m, held.exponent.all(), clocks, advance=Const(1), name=f"unit_{unit}_infinite"
        )[-1]
        # An infinity stays; of the product, even with 0, it has only the sign.
        magnitude = Mux(infinite, _INFINITE << 23, product.as_value()[:-1])
        return Cat(magnitude, product.sign)

    def _add(
        self, m: Module, adding: Value, reserved: Value, misplaced: Value, banks: "Banks"
    ) -> tuple[Value, Value]:
        """Add corrections to what is in the banks.

        Returns
        -------
        taken, busy : Value
            A correction is done with or dropped; one is under way.
        """
        shape, entry = self.shape, self.i_correction.p
        m.submodules.capture = capture = self.capture
        connect(m, flipped(self.i_activation), capture.i)
        connect(m, flipped(self.i_column), capture.i_column)

        turn = Signal(range(shape.turns))
        outside, infinite, usable = Signal(), Signal(), Signal()
        ready, waits, issue, taken = Signal(), Signal(), Signal(), Signal()
        key = Cat(turn, entry.row)
        valid = delayed(m, issue, _SUM, advance=Const(1), name="correction", reset=True)
        keys = delayed(m, key, float_adder.LATENCY, advance=Const(1), name="correction_key")
        m.d.comb += [
            ready.eq(adding & self.i_correction.valid & capture.complete),
            outside.eq((entry.row >= self.rows) | (entry.slot >= capture.count)),
            infinite.eq(entry.value.exponent.all()),
            usable.eq(~(entry.empty | outside | infinite)),
            waits.eq(
                Cat(
                    there & (before == key)
                    for there, before in zip(valid[: len(keys)], keys, strict=True)
                ).any()
            ),
            issue.eq(ready & usable & ~waits),
            taken.eq(ready & (~usable | (~waits & (turn == shape.turns - 1)))),
            self.i_correction.ready.eq(taken),
            capture.slot.eq(entry.slot),
            capture.release.eq(taken & entry.last),
        ]
        with m.If(issue):
            m.d.sync += turn.eq(turn + 1)
        with m.If(taken):
            m.d.sync += [
                turn.eq(0),
                misplaced.eq(
                    misplaced | (~entry.empty & outside) | (entry.last & capture.misplaced)
                ),
                reserved.eq(reserved | (~entry.empty & ~outside & infinite)),
            ]
        value = Signal(BFLOAT16, name="correction_value", reset_less=True)
        m.d.sync += value.eq(entry.value)
        targets = Targets(m, shape, self.rows, key, valid)
        for lane in range(shape.lanes):
            column = targets.column(lane)
            product = self._product(m, lane, value, column)
            before = banks.before(lane, targets.bank(lane, _PRODUCT))
            banks.read_at(lane, targets.address(lane, _PRODUCT))
            total = self._sum(m, before, product)
            banks.add(
                lane, targets.writes(lane), targets.bank(lane, _SUM),
                targets.address(lane, _SUM), total,
            )  # fmt: skip
        return taken, Cat(valid).any()

    def _product(self, m: Module, lane: int, value: Value, column: Value) -> Value:
        """A correction times the activation of one token, rounded to float32.

        ``value`` and what is kept are there in this clock.
        """
        kept = {
            name: self._of_token(m, lane, name, column) for name in self.capture.kept_layout.members
        }
        element = code_factor(kept["codes"], self.activation)
        scale = code_factor(kept["scales"], self.activation_scale)
        factor = code_factor(value.as_value(), BF16).times(scale)
        # An activation of zero is +0 whatever the signs of its factors.
        zero = ~element.significand.any() | ~scale.significand.any()
        sign = value.sign ^ ((element.sign ^ scale.sign) & ~zero)
        exponent = factor.exponent + element.exponent + (factor.offset + element.offset)
        if "token_exponents" in kept:
            exponent = exponent + kept["token_exponents"].as_signed()

        def registered(name: str, part: Value) -> Value:
            return delayed(m, part, 1, advance=Const(1), name=f"lane_{lane}_{name}")[0]

        return rounded_product(
            m,
            registered("integer", Cat(element.significand, Const(0, 1))).as_signed(),
            registered("sign", sign),
            registered("significand", factor.significand),
            registered("exponent", exponent),
            Const(1),
        )

    def _of_token(self, m: Module, lane: int, name: str, column: Value) -> Value:
        """What is kept of a lane's token."""
        items = [Value.cast(item) for item in self.capture.kept[name]]
        if isinstance(column, Const):
            return items[column.value]
        chosen = Signal(len(items[0]), name=f"lane_{lane}_{name}")
        m.d.comb += chosen.eq(pick(items, column))
        return chosen

    def _sum(self, m: Module, before: Value, product: Value) -> Value:
        """Their sum; of -0 and -0 it is -0, which the adder does not know."""
        total, _ = add_floats(m, data.View(FLOAT32, before), product, Const(1))
        negative = (before == 1 << 31) & (product.as_value() == 1 << 31)
        negative = delayed(
            m, negative, float_adder.LATENCY, advance=Const(1), name="negative_zero"
        )[-1]
        return Cat(total.as_value()[:-1], total.sign | negative)

    def _leave(
        self, m: Module, free: Value, values: Sequence[Value], flags: dict[str, Value], last: Value
    ) -> None:
        """The register of the outputs."""
        beat = Signal(self.o.p.shape(), reset_less=True)
        m.d.comb += self.o.p.eq(beat)
        overflows = []
        with m.If(free):
            for unit, value in enumerate(values):
                if self.float_layout == BFLOAT16:
                    kept, up = nearest_even(value, 16)
                    rounded = Signal(16, name=f"rounded_{unit}")
                    m.d.comb += rounded.eq(kept + up)
                    value = rounded
                result = Signal(self.float_layout, name=f"result_{unit}")
                m.d.comb += result.eq(value)
                overflows.append(result.exponent.all())
                m.d.sync += beat.values[unit].eq(result)
            m.d.sync += [
                *(beat[name].eq(flag) for name, flag in flags.items()),
                beat.overflow.eq(Cat(overflows).any()),
                beat.last.eq(last),
            ]
