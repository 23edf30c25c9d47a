"""Decoded codes and their scales to IEEE float32 or bfloat16."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.formats import BF16
from rtl.layouts import BFLOAT16, FLOAT32, float_beat_layout, hif_beat_layout
from rtl.modes import Modes, by_mode, check_lanes
from rtl.parts.factor import code_factor
from rtl.parts.float_fields import BIAS, TOP_EXPONENT
from rtl.parts.leading_zeros import leading_zeros
from rtl.parts.pipeline import Handshakes
from rtl.parts.rounding import nearest_even

__all__ = ["HifToFloat"]

# Biased exponent of a product's top bit. Fields of block scale and row scale reach 255 each, an
# element's shift 31, the layer exponent 127; biases bring the sum down to -540..520.
EXPONENT = signed(11)


class HifToFloat(wiring.Component):
    """Multiply decoded codes by their scales and ``2**layer_exponent``; give floating point.

    Latency 4 cycles (unpack, multiply, normalize, round), throughput 1 beat per cycle; a stalled
    output stalls the input. With float32 the result is exact and bit-equal to
    :func:`golden.tensor.decode`; with bfloat16 it is that value rounded to nearest, ties to even
    (:func:`golden.convert.round_bfloat16`). A zero is +0. Block scale and row scale are multiplied
    once per block, so a lane has one multiplier.

    Flags, each the OR over the lanes of the beat: ``reserved``, a code of an element, scale or row
    scale has no meaning (:mod:`golden.float_output` says what is taken instead); ``overflow``, the
    result is an infinity; ``underflow``, a result below the normal range became +0. None of them
    can occur with a tensor that the golden model accepts.

    Parameters
    ----------
    lanes : int
        Values per beat, a multiple or a divisor of the block size, 8 to 512.
    modes : Modes
        Formats of the input.
    float_layout : data.StructLayout
        ``FLOAT32`` or ``BFLOAT16`` of :mod:`rtl.layouts`.

    Members
    -------
    i : In(stream.Signature(hif_beat_layout))
        Codes, scale codes, row scales, layer exponent and mode.
    o : Out(stream.Signature(float_beat_layout))
        Floating-point values and flags.
    """

    def __init__(
        self, *, lanes: int, modes: Modes, float_layout: data.StructLayout = FLOAT32
    ) -> None:
        check_lanes(lanes, modes.block_size)
        if float_layout not in (FLOAT32, BFLOAT16):
            raise ValueError(f"float_layout must be FLOAT32 or BFLOAT16, not {float_layout!r}")
        self.lanes = lanes
        self.modes = modes
        self.float_layout = float_layout
        self.slots = modes.slots(lanes)
        beat = hif_beat_layout(lanes=lanes, modes=modes)
        out = float_beat_layout(lanes=lanes, float_layout=float_layout)
        super().__init__({"i": In(stream.Signature(beat)), "o": Out(stream.Signature(out))})
        decoded = [
            code_factor(Const(0, modes.code_bits), modes.decoded(fmt)) for fmt in modes.formats
        ]
        self._element_layout = data.StructLayout(
            {
                "sign": 1,
                "significand": modes.element_significand_bits,
                "exponent": max(len(factor.exponent) for factor in decoded),
            }
        )
        self._scale_layout = data.StructLayout(
            {"sign": 1, "significand": modes.scale_significand_bits, "exponent": EXPONENT}
        )
        self._product_layout = data.StructLayout(
            {"sign": 1, "product": modes.product_bits, "exponent": EXPONENT}
        )

    def elaborate(self, platform):
        m = Module()
        # Payload registers need no reset: nothing reads them while `valid` is low.
        elements = Signal(data.ArrayLayout(self._element_layout, self.lanes), reset_less=True)
        scales = Signal(data.ArrayLayout(self._scale_layout, self.slots), reset_less=True)
        products = Signal(data.ArrayLayout(self._product_layout, self.lanes), reset_less=True)
        normalized = Signal(data.ArrayLayout(self._product_layout, self.lanes), reset_less=True)
        reserved = [Signal(name=f"reserved_{stage}", reset_less=True) for stage in range(3)]
        last = [Signal(name=f"last_{stage}", reset_less=True) for stage in range(3)]
        beat = Signal(self.o.p.shape(), reset_less=True)
        m.d.comb += self.o.p.eq(beat)

        pipeline = Handshakes(m, self.i, self.o, 4)

        # Stage 1: unpack elements and scales, multiply block scale by row scale.
        unpacked = [self._element(m, lane) for lane in range(self.lanes)]
        multiplied = [self._scale(m, slot) for slot in range(self.slots)]
        with pipeline.stage(0):
            m.d.sync += [
                last[0].eq(self.i.p.last),
                reserved[0].eq(Cat(bad for _, bad in [*unpacked, *multiplied]).any()),
                *(elements[lane].eq(element) for lane, (element, _) in enumerate(unpacked)),
                *(scales[slot].eq(scale) for slot, (scale, _) in enumerate(multiplied)),
            ]

        # Stage 2: multiply significands, add exponents.
        with pipeline.stage(1):
            m.d.sync += [last[1].eq(last[0]), reserved[1].eq(reserved[0])]
            for lane, element in enumerate(elements):
                scale = scales[lane * self.slots // self.lanes]
                m.d.sync += [
                    products[lane].sign.eq(element.sign ^ scale.sign),
                    products[lane].product.eq(element.significand * scale.significand),
                    products[lane].exponent.eq(element.exponent + scale.exponent),
                ]

        # Stage 3: normalize.
        with pipeline.stage(2):
            m.d.sync += [last[2].eq(last[1]), reserved[2].eq(reserved[1])]
            for lane, product in enumerate(products):
                m.d.sync += normalized[lane].eq(self._normalize(m, lane, product))

        # Stage 4: round, pack.
        packed = [self._pack(m, lane, product) for lane, product in enumerate(normalized)]
        with pipeline.stage(3):
            m.d.sync += [
                beat.reserved.eq(reserved[2]),
                beat.overflow.eq(Cat(overflow for _, overflow, _ in packed).any()),
                beat.underflow.eq(Cat(underflow for _, _, underflow in packed).any()),
                beat.last.eq(last[2]),
                *(beat.values[lane].eq(value) for lane, (value, _, _) in enumerate(packed)),
            ]
        return m

    def _element(self, m: Module, lane: int) -> tuple[Value, Value]:
        """Parts of the code of one lane as ``_element_layout``, and reserved flag."""
        modes, beat = self.modes, self.i.p
        mode = beat.mode if modes.mode_bits else Const(0)
        code = Value.cast(beat.codes[lane])
        factors = [code_factor(code, modes.decoded(fmt)) for fmt in modes.formats]
        result = Signal(self._element_layout, name=f"element_{lane}")
        m.d.comb += [
            result.sign.eq(by_mode(mode, [factor.sign for factor in factors])),
            result.significand.eq(by_mode(mode, [factor.significand for factor in factors])),
            result.exponent.eq(by_mode(mode, [factor.exponent for factor in factors])),
        ]
        return result, by_mode(mode, [factor.reserved for factor in factors])

    def _scale(self, m: Module, slot: int) -> tuple[Value, Value]:
        """Product of block scale and row scale as ``_scale_layout``, and reserved flag."""
        modes, beat = self.modes, self.i.p
        mode = beat.mode if modes.mode_bits else Const(0)
        factors = []
        for fmt in modes.formats:
            factor = code_factor(beat.scales[slot], fmt.word.scale)
            if fmt.row_scale:
                factor = factor.times(code_factor(beat.row_scales[slot].as_value(), BF16))
            factors.append(factor)
        # From the product's last place to the biased exponent of its top bit.
        last_place = BIAS + modes.product_bits - 1
        elements = [code_factor(Const(0), modes.decoded(fmt)) for fmt in modes.formats]
        constants = [
            Const(
                last_place + factor.offset + element.offset,
                EXPONENT,
            )
            for element, factor in zip(elements, factors, strict=True)
        ]
        result = Signal(self._scale_layout, name=f"scale_{slot}")
        m.d.comb += [
            result.sign.eq(by_mode(mode, [factor.sign for factor in factors])),
            result.significand.eq(by_mode(mode, [factor.significand for factor in factors])),
            result.exponent.eq(
                by_mode(mode, [factor.exponent for factor in factors])
                + by_mode(mode, constants)
                + beat.layer_exponent
            ),
        ]
        return result, by_mode(mode, [factor.reserved for factor in factors])

    def _normalize(self, m: Module, lane: int, product: Value) -> Value:
        """The product of one lane with its top bit set, unless it is 0, and its exponent."""
        # The count from the product itself, so that the exponent need not wait for the shift.
        _, zeros = leading_zeros(product.product)
        result = Signal(self._product_layout, name=f"result_{lane}")
        m.d.comb += [
            result.sign.eq(product.sign),
            result.product.eq(product.product << zeros),
            result.exponent.eq(product.exponent - zeros),
        ]
        return result

    def _pack(self, m: Module, lane: int, normalized: Value) -> tuple[Value, Value, Value]:
        """Value of one lane as ``float_layout``, overflow and underflow flags."""
        mantissa_bits = self.float_layout["mantissa"].width
        fraction_bits = self.modes.product_bits - 1
        value = Signal(self.float_layout, name=f"value_{lane}")
        magnitude = Signal(mantissa_bits + 8, name=f"magnitude_{lane}")
        overflow, underflow = Signal(name=f"overflow_{lane}"), Signal(name=f"underflow_{lane}")
        fraction, exponent = normalized.product[:fraction_bits], normalized.exponent
        nonzero = normalized.product[-1]
        up: Value = Const(0, 1)
        # Whether rounding up gives the next power of two; so the flags need not wait for the sum.
        carry: Value = Const(0, 1)
        if fraction_bits <= mantissa_bits:
            kept = Cat(Const(0, mantissa_bits - fraction_bits), fraction)
        else:
            dropped = fraction_bits - mantissa_bits
            kept, up = nearest_even(fraction, dropped)
            carry = fraction[dropped - 1] & kept.all()
        into_infinity = carry & (exponent == TOP_EXPONENT - 1)
        into_range = carry & (exponent == 0)
        m.d.comb += [
            # Out of the mantissa the carry goes on into the exponent.
            magnitude.eq(Cat(kept, exponent[:8]) + up),
            overflow.eq(nonzero & ((exponent >= TOP_EXPONENT) | into_infinity)),
            underflow.eq(nonzero & (exponent < 1) & ~into_range),
        ]
        with m.If(nonzero & ~underflow):
            m.d.comb += [
                value.sign.eq(normalized.sign),
                value.exponent.eq(Mux(overflow, TOP_EXPONENT, magnitude[mantissa_bits:])),
                value.mantissa.eq(Mux(overflow, 0, magnitude[:mantissa_bits])),
            ]
        return value, overflow, underflow
