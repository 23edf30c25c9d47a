"""Decoded codes and their scales to IEEE float32 or bfloat16."""

from dataclasses import dataclass

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.formats import BF16, FloatFormat, HifFormat, IntFormat, NumberFormat, Specials
from golden.notation import QuantFormat
from rtl.layouts import BFLOAT16, FLOAT32, float_beat_layout, hif_beat_layout
from rtl.modes import Modes, by_mode, check_lanes

__all__ = ["HifToFloat"]

FLOAT_BIAS = 127  # of float32 and bfloat16 alike
FLOAT_TOP_EXPONENT = 255  # infinities

# Biased exponent of a product's top bit. Fields of block scale and row scale reach 255 each, an
# element's shift 31, the layer exponent 127; biases bring the sum down to -540..520.
EXPONENT = signed(11)


@dataclass(frozen=True)
class _Factor:
    """One factor of the product: ``(-1)**sign * significand * 2**exponent``, and its reserved flag.

    ``exponent`` is not negative; what it lacks is the constant ``offset``.
    """

    sign: Value
    significand: Value
    exponent: Value
    reserved: Value
    offset: int

    def times(self, other: "_Factor") -> "_Factor":
        """Product of two factors."""
        return _Factor(
            self.sign ^ other.sign,
            self.significand * other.significand,
            self.exponent + other.exponent,
            self.reserved | other.reserved,
            self.offset + other.offset,
        )


def _float_factor(code: Value, fmt: FloatFormat) -> _Factor:
    mantissa = code[: fmt.mantissa_bits]
    field = code[fmt.mantissa_bits : fmt.mantissa_bits + fmt.exponent_bits]
    normal = field.any()
    reserved: Value = Const(0, 1)
    if fmt.specials is Specials.TOP_EXPONENT:
        reserved = field.all()
    elif fmt.specials is Specials.NAN_ALL_ONES:
        reserved = field.all() & mantissa.all()
    # Subnormals share the exponent of the lowest normal binade: field 0 counts as 1.
    exponent = Cat(field[0] | ~normal, field[1:])
    sign = code[-1] if fmt.signed else Const(0, 1)
    return _Factor(sign, Cat(mantissa, normal), exponent, reserved, fmt.min_exponent - 1)


def _hif_factor(code: Value, fmt: HifFormat) -> _Factor:
    significand = code[: fmt.significand_bits].as_signed()
    negative = significand < 0
    shift, reserved = code[fmt.significand_bits :], Const(0, 1)
    if fmt.shifts < 1 << len(shift):
        reserved = shift >= fmt.shifts
        shift = Mux(reserved, fmt.shifts - 1, shift)
    # The magnitude of the lowest significand, 2**(bits - 1), fits that many bits unsigned.
    magnitude = Mux(negative, -significand, significand)[: fmt.significand_bits]
    return _Factor(negative, magnitude, shift, reserved, 0)


def _integer_factor(code: Value, fmt: IntFormat) -> _Factor:
    negative = code[-1]
    magnitude = Mux(negative, -code.as_signed(), code)[: fmt.bits - 1]
    return _Factor(negative, magnitude, Const(0, 1), negative & ~code[:-1].any(), 0)


def _factor(code: Value, fmt: NumberFormat) -> _Factor:
    """Parts of a code; what lies above the format's width is ignored."""
    code = Cat(code, Const(0, fmt.width))[: fmt.width]
    if isinstance(fmt, HifFormat):
        return _hif_factor(code, fmt)
    if isinstance(fmt, IntFormat):
        return _integer_factor(code, fmt)
    assert isinstance(fmt, FloatFormat)
    return _float_factor(code, fmt)


def _normalize(m: Module, value: Value, name: str) -> tuple[Value, Value]:
    """Shift ``value`` left until its top bit is set: (shifted value, shift count).

    Binary: each stage tests whether the upper half of what may still be empty is empty. A value of
    0 gives a shifted value of 0.
    """
    width = len(value)
    counts = []
    for bit in reversed(range((width - 1).bit_length())):
        step = 1 << bit
        shifted = Signal(width, name=f"{name}_{step}")
        empty = ~value[width - step :].any()
        m.d.comb += shifted.eq(Mux(empty, value << step, value))
        counts.append(empty)
        value = shifted
    return value, Cat(*reversed(counts))


class HifToFloat(wiring.Component):
    """Multiply decoded codes by their scales and ``2**layer_exponent``; give floating point.

    Latency 3 cycles (scales, multiply, normalize), throughput 1 beat per cycle; a stalled output
    stalls the input. With float32 the result is exact and bit-equal to
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
        self._scale_layout = data.StructLayout(
            {"sign": 1, "significand": modes.scale_significand_bits, "exponent": EXPONENT}
        )
        self._product_layout = data.StructLayout(
            {"sign": 1, "product": modes.product_bits, "exponent": EXPONENT}
        )

    def elaborate(self, platform):
        m = Module()
        # Payload registers need no reset: nothing reads them while `valid` is low.
        codes = Signal(self.i.p.codes.shape(), reset_less=True)
        mode = Signal(self.modes.mode_bits, reset_less=True)
        scales = Signal(data.ArrayLayout(self._scale_layout, self.slots), reset_less=True)
        products = Signal(data.ArrayLayout(self._product_layout, self.lanes), reset_less=True)
        reserved = [Signal(name=f"reserved_{stage}", reset_less=True) for stage in range(2)]
        last = [Signal(name=f"last_{stage}", reset_less=True) for stage in range(2)]
        valid = [Signal(name=f"valid_{stage}") for stage in range(2)]
        beat = Signal(self.o.p.shape(), reset_less=True)
        m.d.comb += self.o.p.eq(beat)

        ready = [Signal(name=f"ready_{stage}") for stage in range(2)]
        m.d.comb += [
            ready[1].eq(~self.o.valid | self.o.ready),
            ready[0].eq(~valid[1] | ready[1]),
            self.i.ready.eq(~valid[0] | ready[0]),
        ]

        # Stage 1: unpack scales, multiply block scale by row scale.
        unpacked = [self._scale(m, slot) for slot in range(self.slots)]
        with m.If(ready[0]):
            m.d.sync += valid[0].eq(0)
        with m.If(self.i.valid & self.i.ready):
            m.d.sync += [
                valid[0].eq(1),
                codes.eq(self.i.p.codes),
                last[0].eq(self.i.p.last),
                reserved[0].eq(Cat(bad for _, bad in unpacked).any()),
                *(scales[slot].eq(scale) for slot, (scale, _) in enumerate(unpacked)),
            ]
            if self.modes.mode_bits:
                m.d.sync += mode.eq(self.i.p.mode)

        # Stage 2: multiply significands, add exponents.
        multiplied = [
            self._multiply(m, lane, codes[lane], scales[lane * self.slots // self.lanes], mode)
            for lane in range(self.lanes)
        ]
        with m.If(ready[1]):
            m.d.sync += valid[1].eq(0)
        with m.If(valid[0] & ready[0]):
            m.d.sync += [
                valid[1].eq(1),
                last[1].eq(last[0]),
                reserved[1].eq(reserved[0] | Cat(bad for _, bad in multiplied).any()),
                *(products[lane].eq(result) for lane, (result, _) in enumerate(multiplied)),
            ]

        # Stage 3: normalize, round, pack.
        packed = [self._pack(m, lane, products[lane]) for lane in range(self.lanes)]
        with m.If(self.o.ready):
            m.d.sync += self.o.valid.eq(0)
        with m.If(valid[1] & ready[1]):
            m.d.sync += [
                self.o.valid.eq(1),
                beat.reserved.eq(reserved[1]),
                beat.overflow.eq(Cat(overflow for _, overflow, _ in packed).any()),
                beat.underflow.eq(Cat(underflow for _, _, underflow in packed).any()),
                beat.last.eq(last[1]),
                *(beat.values[lane].eq(value) for lane, (value, _, _) in enumerate(packed)),
            ]
        return m

    def _scale(self, m: Module, slot: int) -> tuple[Value, Value]:
        """Product of block scale and row scale as ``_scale_layout``, and reserved flag."""
        modes, beat = self.modes, self.i.p
        mode = beat.mode if modes.mode_bits else Const(0)
        factors = []
        for fmt in modes.formats:
            factor = _factor(beat.scales[slot], fmt.word.scale)
            if fmt.row_scale:
                factor = factor.times(_factor(beat.row_scales[slot].as_value(), BF16))
            factors.append(factor)
        # From the product's last place to the biased exponent of its top bit.
        last_place = FLOAT_BIAS + modes.product_bits - 1
        constants = [
            Const(last_place + factor.offset + self._element(Const(0), fmt).offset, EXPONENT)
            for fmt, factor in zip(modes.formats, factors, strict=True)
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

    def _element(self, code: Value, fmt: QuantFormat) -> _Factor:
        return _factor(code, self.modes.decoded(fmt))

    def _multiply(
        self, m: Module, lane: int, code: Value, scale: Value, mode: Value
    ) -> tuple[Value, Value]:
        """Product of one lane as ``_product_layout``, and its reserved flag."""
        modes = self.modes
        factors = [self._element(Value.cast(code), fmt) for fmt in modes.formats]
        magnitude = Signal(modes.element_significand_bits, name=f"magnitude_{lane}")
        result = Signal(self._product_layout, name=f"result_{lane}")
        m.d.comb += [
            magnitude.eq(by_mode(mode, [factor.significand for factor in factors])),
            result.sign.eq(by_mode(mode, [factor.sign for factor in factors]) ^ scale.sign),
            result.product.eq(magnitude * scale.significand),
            result.exponent.eq(
                by_mode(mode, [factor.exponent for factor in factors]) + scale.exponent
            ),
        ]
        return result, by_mode(mode, [factor.reserved for factor in factors])

    def _pack(self, m: Module, lane: int, product: Value) -> tuple[Value, Value, Value]:
        """Value of one lane as ``float_layout``, overflow and underflow flags."""
        mantissa_bits = self.float_layout["mantissa"].width
        normalized, shift = _normalize(m, product.product, f"normalized_{lane}")
        fraction_bits = self.modes.product_bits - 1
        value = Signal(self.float_layout, name=f"value_{lane}")
        # One bit more than the mantissa, for the carry of rounding.
        mantissa = Signal(mantissa_bits + 1, name=f"mantissa_{lane}")
        exponent = Signal(EXPONENT, name=f"exponent_{lane}")
        overflow, underflow = Signal(name=f"overflow_{lane}"), Signal(name=f"underflow_{lane}")
        fraction = normalized[:fraction_bits]
        if fraction_bits <= mantissa_bits:
            m.d.comb += mantissa.eq(fraction << (mantissa_bits - fraction_bits))
        else:
            dropped = fraction_bits - mantissa_bits
            kept = fraction[dropped:]
            half, rest = fraction[dropped - 1], fraction[: dropped - 1].any()
            # Ties to even: up if above half, or at half with an odd last place.
            m.d.comb += mantissa.eq(kept + (half & (rest | kept[0])))
        nonzero = normalized[-1]
        m.d.comb += [
            # The top bit of the mantissa is the carry of rounding up to the next power of two.
            exponent.eq(product.exponent - shift + mantissa[-1]),
            overflow.eq(nonzero & (exponent >= FLOAT_TOP_EXPONENT)),
            underflow.eq(nonzero & (exponent < 1)),
        ]
        with m.If(nonzero & ~underflow):
            m.d.comb += [
                value.sign.eq(product.sign),
                value.exponent.eq(Mux(overflow, FLOAT_TOP_EXPONENT, exponent[:8])),
                value.mantissa.eq(Mux(overflow, 0, mantissa[:mantissa_bits])),
            ]
        return value, overflow, underflow
