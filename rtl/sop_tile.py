"""The scaled outer product: integer products inside a block, one product of scales after it."""

from collections.abc import Sequence
from dataclasses import dataclass

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from golden.codebooks import BLOCK_SIZES
from golden.formats import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    HIF7,
    HIF8,
    HIF8T,
    INT4,
    INT8,
    FloatFormat,
    NumberFormat,
)
from golden.kernel import unit_exponent
from rtl.layouts import (
    FLOAT32,
    tile_activations_layout,
    tile_outputs_layout,
    tile_weights_layout,
)
from rtl.parts import float_adder, scaled_product
from rtl.parts.choice import pick
from rtl.parts.factor import code_factor
from rtl.parts.float_adder import add_floats
from rtl.parts.pipeline import delayed
from rtl.products import DEFAULT_MULTIPLIER, MULTIPLIERS, largest_integer

__all__ = ["ELEMENTS", "LATENCY", "MAX_OUTPUTS", "SopTile", "TileShape"]

ELEMENTS = (HIF7, HIF8, HIF8T, INT4, INT8, E2M1, E2M3, E3M2, E4M3)
"""Formats of weights and activations. Wider atoms would need sums of up to 60 bits."""

MAX_OUTPUTS = 4096
"""Most outputs of a tile, rows times columns."""

# Operands, the block's sum, and a scale in a register each.
LATENCY = 3 + scaled_product.LATENCY + float_adder.LATENCY
"""Clocks from the last beat of a tile to its first outputs, while nothing stalls."""


@dataclass(frozen=True)
class _Block:
    """Registers of the block that is being summed.

    ``weights`` and ``activations`` are operands of this clock, ``first`` and ``ends`` its place in
    the block, ``closes`` whether that ends a tile; ``reserved``: a code of the operands is, or a
    scale that came with them. ``opens``, that this is a tile's first block, and the scales stay for
    the whole block.
    """

    weights: list[dict[str, Value]]
    activations: list[dict[str, Value]]
    valid: Value
    first: Value
    ends: Value
    closes: Value
    reserved: Value
    opens: Value
    scales: dict[str, list[Value]]
    layer_exponent: Value


@dataclass(frozen=True)
class _Turn:
    """Registers of the block that the scale units work at, and their step in it."""

    sums: list[Value]
    zero: Value
    scales: dict[str, list[Value]]
    layer_exponent: Value
    busy: Value
    step: Value
    opens: Value
    closes: Value
    reserved: Value


class TileShape:
    """Which scale unit works at which output in which step of a block.

    Outputs are numbered column by column: output ``column * rows + row``. Unit u has those from
    ``u * used`` on, one in each step, so in a tile of ``block_size`` rows it has one column, and
    all units have the same row in a step.

    Parameters
    ----------
    rows, columns, block_size : int

    Attributes
    ----------
    units : int
        Scale units: as few as finish their outputs within the clocks of a block.
    used : int
        Steps in which a unit has an output.
    steps : int
        Steps of a block: ``used``, but not fewer than the stages of the adder.
    """

    def __init__(self, rows: int, columns: int, block_size: int) -> None:
        self.rows, self.outputs = rows, rows * columns
        self.units = -(-self.outputs // block_size)
        self.used = -(-self.outputs // self.units)
        self.steps = max(self.used, float_adder.LATENCY)

    def place(self, unit: int, step: int) -> tuple[int, int] | None:
        """(Row, column) of a unit's output in a step; None where it has none."""
        number = unit * self.used + step
        if step >= self.used or number >= self.outputs:
            return None
        return number % self.rows, number // self.rows


class SopTile(wiring.Component):
    """Multiply rows of weights with columns of activations, block by block.

    Output-stationary: in every clock ``rows`` weights and ``columns`` activations of one k come in,
    and ``rows * columns`` integer products are added to as many sums. After the last k of a block
    the sums P move to a second set of registers and the next block starts without a bubble, while
    the scale units take one P after the other: T = round(P * weight scale * activation scale *
    2**layer exponent), then accumulator = round(accumulator + T), both to float32. Bit-equal to
    :func:`golden.kernel.matmul` without row scales and corrections.

    Throughput ``rows * columns`` products in every clock, across the ends of blocks and tiles too.
    Latency 12 cycles from the last beat of a tile to its first outputs (:data:`LATENCY`); a beat of
    outputs comes in each clock from then on, while the next tile is computed. A stalled output
    stalls both inputs; a beat goes in when both have one.

    A scale unit has at most ``block_size`` outputs, in as many steps. A sum of five clocks is in
    time for its output's next turn because a unit's accumulators are one ring of registers, as long
    as a block has steps: the stages of the adder and, behind them, a row of registers. What leaves
    the adder comes back to it exactly when the unit has its output again, so nothing can be read
    before it is written, whatever stalls. The ring moves only with a T, or to push the outputs of
    a complete tile out of the adder; then it is turned, but the next tile starts wherever it is.
    With fewer outputs than the adder has stages the ring is that long and some places are empty.

    Output beat s of a tile, s in ``range(shape.used)``, has in lane u the output of unit u in step
    s, row and column ``shape.place(u, s)``; lanes without one are +0. ``reserved``: a code of the
    tile has no meaning (:mod:`golden.float_output` says what is taken instead; elements of E4M3 and
    scales then have no defined value); in all beats of the tile. ``overflow``: an output of the
    beat is an infinity, which stays one whatever is added. Neither can occur with what the golden
    model accepts, but for sums that overflow there too.

    Parameters
    ----------
    rows, columns : int
        1 or more, at most :data:`MAX_OUTPUTS` outputs.
    block_size : int
        Weights per scale, 8, 16, 32 or 64. Where activations have longer blocks or none, their
        scales are repeated.
    weight, activation : NumberFormat
        Elements, of :data:`ELEMENTS`.
    weight_scale, activation_scale : FloatFormat
        Of a block of weights, and of a token's block or of the whole token.
    multiplier : str
        One of :data:`rtl.products.MULTIPLIERS`.

    Members
    -------
    i : In(stream.Signature(tile_weights_layout))
        Weights. A tile is whole blocks: ``last`` anywhere else is not looked at.
    i_activation : In(stream.Signature(tile_activations_layout))
        Activations.
    o : Out(stream.Signature(tile_outputs_layout))
        Outputs.
    """

    def __init__(
        self, *, rows: int, columns: int, block_size: int, weight: NumberFormat,
        activation: NumberFormat, weight_scale: FloatFormat, activation_scale: FloatFormat,
        multiplier: str = DEFAULT_MULTIPLIER,
    ) -> None:  # fmt: skip
        if rows < 1 or columns < 1 or rows * columns > MAX_OUTPUTS:
            raise ValueError(
                f"rows and columns must be at least 1 and have at most {MAX_OUTPUTS} outputs, not "
                f"{rows!r} x {columns!r}"
            )
        if block_size not in BLOCK_SIZES:
            raise ValueError(f"block_size must be one of {BLOCK_SIZES}, not {block_size!r}")
        for element in (weight, activation):
            if element not in ELEMENTS:
                names = ", ".join(fmt.name for fmt in ELEMENTS)
                raise ValueError(f"{element.name} is no element of a tile: elements are {names}")
        if multiplier not in MULTIPLIERS:
            raise ValueError(f"multiplier must be one of {tuple(MULTIPLIERS)}, not {multiplier!r}")
        self.rows = rows
        self.columns = columns
        self.block_size = block_size
        self.weight = weight
        self.activation = activation
        self.weight_scale = weight_scale
        self.activation_scale = activation_scale
        self.multiplier = multiplier
        self.shape = TileShape(rows, columns, block_size)
        weights = tile_weights_layout(rows=rows, element=weight, scale=weight_scale)
        activations = tile_activations_layout(
            columns=columns, element=activation, scale=activation_scale
        )
        outputs = tile_outputs_layout(units=self.shape.units)
        super().__init__(
            {
                "i": In(stream.Signature(weights)),
                "i_activation": In(stream.Signature(activations)),
                "o": Out(stream.Signature(outputs)),
            }
        )
        # Of a whole block of the largest codes; the magnitude of the lowest number does not occur.
        largest = block_size * largest_integer(weight) * largest_integer(activation)
        self.sum_shape = signed(largest.bit_length() + 1)

    def elaborate(self, platform):
        m = Module()
        advance = Signal()
        m.d.comb += [
            advance.eq(~self.o.valid | self.o.ready),
            self.i.ready.eq(advance & self.i_activation.valid),
            self.i_activation.ready.eq(advance & self.i.valid),
        ]
        block = self._take(m, advance)
        turn = self._hand_over(m, advance, block, self._add_products(m, advance, block))
        self._scale(m, advance, turn)
        return m

    def _take(self, m: Module, advance: Value) -> _Block:
        """Put a beat of both streams into registers."""
        weights, activations = self.i.p, self.i_activation.p
        place = Signal(range(self.block_size))  # of the next beat in its block
        fresh = Signal(init=1)  # the next block is the first of a tile
        begins, final, accept = Signal(), Signal(), Signal()
        m.d.comb += [
            accept.eq(self.i.valid & self.i.ready),
            begins.eq(accept & ~place.any()),
            final.eq(place == self.block_size - 1),
        ]
        with m.If(accept):
            # Whoever looks at `last`, here or below, does so after the final beat of a block.
            m.d.sync += [place.eq(place + 1), fresh.eq(weights.last)]
        scales = {
            "weight": weights.scales,
            "activation": activations.scales,
        }
        if self.activation_scale.exponent_bits < 8:
            scales["token_exponents"] = activations.token_exponents
        bad_scales = Cat(
            code_factor(code, fmt).reserved
            for fmt, codes in (
                (self.weight_scale, weights.scales),
                (self.activation_scale, activations.scales),
            )
            for code in codes
        ).any()
        kept, bad = {}, [~place.any() & bad_scales]
        for name, fmt, codes in (
            ("weight", self.weight, weights.codes),
            ("activation", self.activation, activations.codes),
        ):
            kept[name], reserved = self._operands(m, accept, codes, fmt, name)
            bad.extend(reserved)

        def held(value: Value, name: str, when: Value = accept) -> Value:
            return delayed(m, value, 1, advance=when, name=name)[0]

        return _Block(
            kept["weight"],
            kept["activation"],
            valid=delayed(m, accept, 1, advance=advance, name="operands", reset=True)[0],
            first=held(~place.any(), "first"),
            ends=held(final, "ends"),
            closes=held(weights.last, "closes"),
            reserved=held(Cat(bad).any(), "reserved"),
            opens=held(fresh, "opens", begins),
            scales={
                name: [
                    held(code, f"{name}_{number}_next", begins) for number, code in enumerate(codes)
                ]
                for name, codes in scales.items()
            },
            layer_exponent=held(weights.layer_exponent, "layer_exponent_next", begins),
        )

    def _operands(
        self, m: Module, accept: Value, codes: Sequence[Value], fmt: NumberFormat, name: str
    ) -> tuple[list[dict[str, Value]], list[Value]]:
        """Registers with what the multipliers keep of each code, and whether it is reserved."""
        kept, reserved = [], []
        for number, code in enumerate(codes):
            fields, bad = MULTIPLIERS[self.multiplier].operand(Value.cast(code), fmt)
            kept.append(
                {
                    field: delayed(m, value, 1, advance=accept, name=f"{name}_{number}_{field}")[0]
                    for field, value in fields.items()
                }
            )
            reserved.append(bad)
        return kept, reserved

    def _add_products(self, m: Module, advance: Value, block: _Block) -> list[Value]:
        """Sums of the block's products with those of this clock, by number of the output."""
        multiply = MULTIPLIERS[self.multiplier].product
        sums: list[Value] = []
        for activation in block.activations:
            for weight in block.weights:
                number = len(sums)
                partial = Signal(self.sum_shape, name=f"partial_{number}", reset_less=True)
                total = Signal(self.sum_shape, name=f"sum_{number}")
                before = Mux(block.first, 0, partial)
                m.d.comb += total.eq(before + multiply(weight, activation))
                with m.If(advance & block.valid):
                    m.d.sync += partial.eq(total)
                sums.append(total)
        return sums

    def _hand_over(self, m: Module, advance: Value, block: _Block, sums: list[Value]) -> _Turn:
        """Second set of registers, which the scale units work at during the next block."""
        steps = self.shape.steps
        complete = Signal()
        busy = Signal()
        step = Signal(range(steps))
        reserved, reserved_so_far = Signal(), Signal()
        m.d.comb += [
            complete.eq(advance & block.valid & block.ends),
            reserved.eq(block.reserved | (reserved_so_far & ~(block.opens & block.first))),
        ]
        with m.If(advance & block.valid):
            m.d.sync += reserved_so_far.eq(reserved)
        with m.If(advance & busy):
            m.d.sync += [step.eq(step + 1), busy.eq(step != steps - 1)]
        # A block has at least as many clocks as steps, so the units are done with the one before.
        with m.If(complete):
            m.d.sync += [busy.eq(1), step.eq(0)]

        def held(value: Value, name: str) -> Value:
            return delayed(m, value, 1, advance=complete, name=name)[0]

        return _Turn(
            [held(value, f"block_{number}") for number, value in enumerate(sums)],
            Const(0, self.sum_shape),
            {
                name: [held(code, f"{name}_{number}_now") for number, code in enumerate(codes)]
                for name, codes in block.scales.items()
            },
            held(block.layer_exponent, "layer_exponent_now"),
            busy,
            step,
            opens=held(block.opens, "opens_now"),
            closes=held(block.closes, "closes_now"),
            reserved=held(reserved, "reserved_now"),
        )

    def _scale(self, m: Module, advance: Value, turn: _Turn) -> None:
        """The scale units and the way out."""
        shape = self.shape
        leaves = turn.closes & (turn.step < shape.used)
        flags = {
            "opens": turn.opens,
            "leaves": leaves,
            "last": turn.step == shape.used - 1,
            "reserved": turn.reserved,
        }
        clocks = 1 + scaled_product.LATENCY
        valid = delayed(m, turn.busy, clocks, advance=advance, name="scaled", reset=True)[-1]
        opens, leaves, last, reserved = (
            delayed(m, value, clocks, advance=advance, name=f"scaled_{name}")[-1]
            for name, value in flags.items()
        )
        # The ring moves with every T, and until the last output has left the adder.
        ring = Signal()
        stages = float_adder.LATENCY
        leaving = delayed(m, valid & leaves, stages, advance=ring, name="leaves", reset=True)
        m.d.comb += [
            ring.eq(advance & (valid | Cat(leaving).any())),
            self.o.valid.eq(leaving[-1]),
            self.o.p.last.eq(delayed(m, last, stages, advance=ring, name="last")[-1]),
            self.o.p.reserved.eq(delayed(m, reserved, stages, advance=ring, name="bad")[-1]),
        ]
        choose = _Chooser(m, turn.step)
        overflows = []
        for unit in range(shape.units):
            product = self._scaled(m, advance, turn, unit, choose)
            returning = Signal(FLOAT32, name=f"returning_{unit}")
            before = Signal(FLOAT32, name=f"before_{unit}")
            m.d.comb += before.eq(Mux(opens, 0, returning))
            total, overflow = add_floats(m, before, product, ring)
            rest = delayed(m, total, shape.steps - stages, advance=ring, name=f"unit_{unit}")
            m.d.comb += [returning.eq([total, *rest][-1]), self.o.p.values[unit].eq(total)]
            overflows.append(overflow)
        m.d.comb += self.o.p.overflow.eq(Cat(overflows).any())

    def _scaled(
        self, m: Module, advance: Value, turn: _Turn, unit: int, choose: "_Chooser"
    ) -> Value:
        """T of a unit's output in this step, some clocks later."""
        places = [self.shape.place(unit, step) for step in range(self.shape.steps)]

        def of_step(name: str, axis: int) -> Value:
            values = turn.scales[name]
            return choose(name, [place and values[place[axis]] for place in places])

        # A step without an output adds products of 0 to 0.
        integer = choose(
            "sum",
            [
                turn.sums[place[1] * self.rows + place[0]] if place else turn.zero
                for place in places
            ],
        )
        scale = code_factor(of_step("weight", 0), self.weight_scale).times(
            code_factor(of_step("activation", 1), self.activation_scale)
        )
        unit_exponents = unit_exponent(self.weight) + unit_exponent(self.activation)
        exponent = scale.exponent + turn.layer_exponent + scale.offset + unit_exponents
        if "token_exponents" in turn.scales:
            exponent += of_step("token_exponents", 1)

        def registered(name: str, value: Value) -> Value:
            return delayed(m, value, 1, advance=advance, name=f"unit_{unit}_{name}")[0]

        return scaled_product.scaled_product(
            m,
            registered("integer", integer),
            registered("sign", scale.sign),
            registered("significand", scale.significand),
            registered("exponent", exponent),
            advance,
        )


class _Chooser:
    """Multiplexers by the step of a block; units that choose alike share one."""

    def __init__(self, m: Module, step: Value) -> None:
        self._m, self._step = m, step
        self._known: dict[tuple[int, ...], Value] = {}

    def __call__(self, name: str, values: Sequence[Value | None]) -> Value:
        """The value of this step; in a step without one anything.

        Parameters
        ----------
        name : str
            Prefix of the multiplexer's name.
        values : sequence of Value or None
        """
        key = tuple(map(id, values))
        if key not in self._known:
            chosen = pick(values, self._step)
            assert chosen is not None
            result = Signal(chosen.shape(), name=f"{name}_{len(self._known)}")
            self._m.d.comb += result.eq(chosen)
            self._known[key] = result
        return self._known[key]
