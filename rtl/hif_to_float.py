"""HIF codes and their scales to IEEE float32 or bfloat16."""

from amaranth.hdl import Cat, Module, Mux, Signal, Value, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.formats import HifFormat, Specials
from golden.notation import ScaleWord
from rtl.layouts import BFLOAT16, FLOAT32, float_beat_layout, hif_beat_layout
from rtl.lut_decoder import check_lanes

__all__ = ["HifToFloat"]

FLOAT_BIAS = 127  # of float32 and bfloat16 alike
FLOAT_TOP_EXPONENT = 255  # infinities


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
    """Multiply HIF codes by their block's scale and ``2**layer_exponent``; give floating point.

    Latency 2 cycles (multiply, normalize), throughput 1 beat per cycle; a stalled output stalls the
    input. With float32 the result is exact and bit-equal to :func:`golden.tensor.decode`; with
    bfloat16 it is that value rounded to nearest, ties to even
    (:func:`golden.convert.round_bfloat16`). A zero is +0.

    Flags, each the OR over the lanes of the beat: ``reserved``, a HIF shift or a scale exponent
    that has no meaning (the shift is taken as the largest one); ``overflow``, the result is an
    infinity; ``underflow``, a result below the normal range became +0. None of them can occur with
    a tensor that the golden model accepts.

    Parameters
    ----------
    lanes : int
        Values per beat, a multiple of ``block_size``, at most 512.
    block_size : int
        Values per scale: 8, 16, 32 or 64.
    hif : HifFormat
        Format of the input codes.
    word : ScaleWord
        Scale word; only its scale is used.
    float_layout : data.StructLayout
        ``FLOAT32`` or ``BFLOAT16`` of :mod:`rtl.layouts`.

    Members
    -------
    i : In(stream.Signature(hif_beat_layout))
        HIF codes, scale codes and layer exponent.
    o : Out(stream.Signature(float_beat_layout))
        Floating-point values and flags.
    """

    def __init__(
        self,
        *,
        lanes: int,
        block_size: int,
        hif: HifFormat,
        word: ScaleWord,
        float_layout: data.StructLayout = FLOAT32,
    ):
        check_lanes(lanes, block_size)
        if float_layout not in (FLOAT32, BFLOAT16):
            raise ValueError(f"float_layout must be FLOAT32 or BFLOAT16, not {float_layout!r}")
        self.lanes = lanes
        self.block_size = block_size
        self.hif = hif
        self.word = word
        self.float_layout = float_layout
        beat = hif_beat_layout(lanes=lanes, block_size=block_size, hif=hif, word=word)
        out = float_beat_layout(lanes=lanes, float_layout=float_layout)
        super().__init__({"i": In(stream.Signature(beat)), "o": Out(stream.Signature(out))})

        scale = word.scale
        # |significand| of HIF reaches 2**(bits - 1), so it needs all its bits; times the scale's
        # mantissa with hidden bit. At most 6 + 8 = 14 bits, so float32's 24 hold it exactly.
        self._product_width = hif.significand_bits + scale.mantissa_bits + 1
        # Biased exponent of the product's top bit: scale exponent field (at most 255), HIF shift
        # (at most 4), layer exponent (-128..127) and a constant of small size: 11 bits signed.
        self._exponent_shape = signed(11)
        self._lane_layout = data.StructLayout(
            {"sign": 1, "product": self._product_width, "exponent": self._exponent_shape}
        )

    def elaborate(self, platform):
        m = Module()
        # Payload registers need no reset: nothing reads them while `valid` is low.
        product = Signal(data.ArrayLayout(self._lane_layout, self.lanes), reset_less=True)
        product_reserved = Signal(reset_less=True)
        product_last = Signal(reset_less=True)
        product_valid = Signal()
        beat = Signal(self.o.p.shape(), reset_less=True)
        m.d.comb += self.o.p.eq(beat)

        pack_ready = Signal()
        m.d.comb += [
            pack_ready.eq(~self.o.valid | self.o.ready),
            self.i.ready.eq(~product_valid | pack_ready),
        ]

        # Stage 1: multiply significands, add exponents.
        with m.If(pack_ready):
            m.d.sync += product_valid.eq(0)
        scales = [self._unpack_scale(m, block) for block in range(self.lanes // self.block_size)]
        lanes = [
            self._multiply(m, lane, *scales[lane // self.block_size][:3])
            for lane in range(self.lanes)
        ]
        with m.If(self.i.valid & self.i.ready):
            reserved = [*(lane[1] for lane in lanes), *(scale[3] for scale in scales)]
            m.d.sync += [
                product_valid.eq(1),
                product_reserved.eq(Cat(*reserved).any()),
                product_last.eq(self.i.p.last),
            ]
            for lane, (result, _) in enumerate(lanes):
                m.d.sync += product[lane].eq(result)

        # Stage 2: normalize, round, pack.
        with m.If(self.o.ready):
            m.d.sync += self.o.valid.eq(0)
        packed = [self._pack(m, lane, product[lane]) for lane in range(self.lanes)]
        with m.If(product_valid & pack_ready):
            m.d.sync += [
                self.o.valid.eq(1),
                beat.reserved.eq(product_reserved),
                beat.overflow.eq(Cat(*(overflow for _, overflow, _ in packed)).any()),
                beat.underflow.eq(Cat(*(underflow for _, _, underflow in packed)).any()),
                beat.last.eq(product_last),
            ]
            for lane, (value, _, _) in enumerate(packed):
                m.d.sync += beat.values[lane].eq(value)
        return m

    def _unpack_scale(self, m: Module, block: int) -> tuple[Value, Value, Value, Value]:
        """Sign, significand, biased exponent of the product's top bit, and reserved flag."""
        fmt, scale = self.word.scale, self.i.p.scales[block]
        normal = scale.exponent.any()
        mantissa = [scale.mantissa] if fmt.mantissa_bits else []
        significand = Signal(fmt.mantissa_bits + 1, name=f"scale_significand_{block}")
        exponent = Signal(self._exponent_shape, name=f"scale_exponent_{block}")
        # Subnormals share the exponent of the lowest normal binade: field 0 counts as 1.
        field = Cat(scale.exponent[0] | ~normal, scale.exponent[1:])
        last_place = self._product_width - 1  # from the product's last bit up to its top bit
        constant = FLOAT_BIAS + last_place - fmt.bias - fmt.mantissa_bits
        m.d.comb += [
            significand.eq(Cat(*mantissa, normal)),
            exponent.eq(field + self.i.p.layer_exponent + constant),
        ]
        sign = scale.sign if fmt.signed else 0
        has_reserved = fmt.specials is Specials.TOP_EXPONENT
        return sign, significand, exponent, scale.exponent.all() if has_reserved else 0

    def _multiply(
        self, m: Module, lane: int, sign: Value, significand: Value, exponent: Value
    ) -> tuple[Value, Value]:
        """Product of one lane as ``_lane_layout``, and its reserved flag."""
        code = self.i.p.codes[lane]
        hif_significand = code.significand.as_signed()
        magnitude = Signal(self.hif.significand_bits, name=f"magnitude_{lane}")
        result = Signal(self._lane_layout, name=f"result_{lane}")
        shift, reserved = code.shift, 0
        if self.hif.shifts < 1 << len(code.shift):
            reserved = code.shift >= self.hif.shifts
            shift = Mux(reserved, self.hif.shifts - 1, code.shift)
        negative = hif_significand < 0
        m.d.comb += [
            magnitude.eq(Mux(negative, -hif_significand, hif_significand)),
            result.sign.eq(negative ^ sign),
            result.product.eq(magnitude * significand),
            result.exponent.eq(exponent + shift),
        ]
        return result, reserved

    def _pack(self, m: Module, lane: int, product: Value) -> tuple[Value, Value, Value]:
        """Value of one lane as ``float_layout``, overflow and underflow flags."""
        mantissa_bits = self.float_layout["mantissa"].width
        normalized, shift = _normalize(m, product.product, f"normalized_{lane}")
        fraction_bits = self._product_width - 1
        value = Signal(self.float_layout, name=f"value_{lane}")
        # One bit more than the mantissa, for the carry of rounding.
        mantissa = Signal(mantissa_bits + 1, name=f"mantissa_{lane}")
        exponent = Signal(self._exponent_shape, name=f"exponent_{lane}")
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
