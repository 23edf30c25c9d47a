"""Small floats and bfloat16 to HIF codes."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from golden.float_input import checked_shift
from golden.formats import FloatFormat, HifFormat, Specials
from rtl.layouts import format_layout
from rtl.modes import MAX_LANES
from rtl.parts import float_fields
from rtl.parts.pipeline import Handshakes
from rtl.parts.rounding import increment

__all__ = ["FloatToHif", "converted_beat_layout", "source_beat_layout"]


def source_beat_layout(*, lanes: int, source: FloatFormat) -> data.StructLayout:
    """A beat of codes of a float format. ``last`` marks the final beat of a tensor."""
    return data.StructLayout(
        {"codes": data.ArrayLayout(format_layout(source), lanes), "last": 1},
    )


def converted_beat_layout(*, lanes: int, hif: HifFormat) -> data.StructLayout:
    """A beat of HIF codes with flags that are set if any lane raised them."""
    return data.StructLayout(
        {
            "codes": data.ArrayLayout(format_layout(hif), lanes),
            "inexact": 1,
            "saturated": 1,
            "nan": 1,
            "last": 1,
        }
    )


class FloatToHif(wiring.Component):
    """Round floats times ``2**shift`` to canonical HIF codes.

    Latency 4 cycles (unpack, align, round, encode), throughput 1 beat per cycle; a stalled output
    stalls the input. Nearest value, ties to the even significand of the canonical code, saturating
    at both ends: bit-equal to :func:`golden.float_input.float_to_hif` for every code.

    Flags, each the OR over the lanes of the beat: ``inexact``, a value is not equal to its code;
    ``saturated``, a value, rounded as if there were more shifts, is beyond an end (infinities are);
    ``nan``, a NaN became code 0.

    Parameters
    ----------
    lanes : int
        Values per beat, 1 to 512.
    source : FloatFormat
        One of :data:`golden.float_input.SOURCES`.
    hif : HifFormat
        Format of the codes.
    shift : int or None
        In :func:`golden.float_input.shift_range`; None takes
        :func:`golden.float_input.default_shift`. The attribute is the one that was taken.

    Members
    -------
    i : In(stream.Signature(source_beat_layout))
        Codes of ``source``, bit patterns for bfloat16.
    o : Out(stream.Signature(converted_beat_layout))
        HIF codes and flags.
    """

    def __init__(
        self, *, lanes: int, source: FloatFormat, hif: HifFormat, shift: int | None = None
    ) -> None:
        if not 1 <= lanes <= MAX_LANES:
            raise ValueError(f"lanes must be 1 to {MAX_LANES}, not {lanes!r}")
        self.lanes = lanes
        self.source = source
        self.hif = hif
        self.shift = checked_shift(source, hif, shift)
        super().__init__(
            {
                "i": In(stream.Signature(source_beat_layout(lanes=lanes, source=source))),
                "o": Out(stream.Signature(converted_beat_layout(lanes=lanes, hif=hif))),
            }
        )
        # A magnitude below full scale is a significand of `kept_bits` bits times a power of two;
        # full scale itself, the lowest value, is one binade higher.
        self._kept_bits = hif.significand_bits - 1
        self._top = self._kept_bits - 1 + hif.shifts  # binade of full scale
        # The significand enters with its top bit in the binade `_entry` and moves down by what its
        # exponent lacks. Exponent field 1 has to fit, because of the subnormals.
        lowest = source.min_exponent + self.shift + source.mantissa_bits
        self._entry = max(self._top, lowest)
        self._farthest = self._entry - lowest
        # From `_entry` down to a half; what moves further is less than a half.
        self._width = self._entry + 2
        self._unpacked_layout = data.StructLayout(
            {
                "sign": 1,
                "significand": source.mantissa_bits + 1,
                "steps": min(self._farthest, self._width).bit_length(),
                "beyond": 1,  # infinite, or above `_entry`
                "nan": 1,
            }
        )
        self._aligned_layout = data.StructLayout(
            {
                "sign": 1,
                # Magnitude in halves, up to the binade of full scale; whether less than a half
                # remains.
                "halves": self._top + 2,
                "rest": 1,
                "beyond": 1,  # twice full scale or more
                "nan": 1,
            }
        )
        self._rounded_layout = data.StructLayout(
            {
                "sign": 1,
                "magnitude": self._kept_bits + 1,  # of the significand; with the carry of rounding
                "shift": hif.shifts.bit_length(),  # one more than the format has
                "inexact": 1,  # of rounding; what saturates is inexact too
                "beyond": 1,
                "nan": 1,
            }
        )

    def elaborate(self, platform):
        m = Module()
        # Payload registers need no reset: nothing reads them while `valid` is low.
        unpacked = Signal(data.ArrayLayout(self._unpacked_layout, self.lanes), reset_less=True)
        aligned = Signal(data.ArrayLayout(self._aligned_layout, self.lanes), reset_less=True)
        rounded = Signal(data.ArrayLayout(self._rounded_layout, self.lanes), reset_less=True)
        last = [Signal(name=f"last_{stage}", reset_less=True) for stage in range(3)]
        beat = Signal(self.o.p.shape(), reset_less=True)
        m.d.comb += self.o.p.eq(beat)

        pipeline = Handshakes(m, self.i, self.o, 4)

        with pipeline.stage(0):
            m.d.sync += last[0].eq(self.i.p.last)
            for lane, code in enumerate(self.i.p.codes):
                m.d.sync += unpacked[lane].eq(self._unpack(m, lane, code))

        with pipeline.stage(1):
            m.d.sync += last[1].eq(last[0])
            for lane, value in enumerate(unpacked):
                m.d.sync += aligned[lane].eq(self._align(m, lane, value))

        with pipeline.stage(2):
            m.d.sync += last[2].eq(last[1])
            for lane, value in enumerate(aligned):
                m.d.sync += rounded[lane].eq(self._round(m, lane, value))

        encoded = [self._encode(m, lane, value) for lane, value in enumerate(rounded)]
        saturated = Cat(flag for _, flag in encoded).any()
        with pipeline.stage(3):
            m.d.sync += [
                beat.inexact.eq(Cat(value.inexact for value in rounded).any() | saturated),
                beat.saturated.eq(saturated),
                beat.nan.eq(Cat(value.nan for value in rounded).any()),
                beat.last.eq(last[2]),
                *(beat.codes[lane].eq(code) for lane, (code, _) in enumerate(encoded)),
            ]
        return m

    def _specials(self, code: Value) -> tuple[Value, Value]:
        """Whether a code is a NaN, and whether it is an infinity."""
        top = code.exponent.all()
        if self.source.specials is Specials.NAN_ALL_ONES:
            return top & code.mantissa.all(), Const(0)
        if self.source.specials is Specials.TOP_EXPONENT:
            return top & code.mantissa.any(), top & ~code.mantissa.any()
        return Const(0), Const(0)

    def _unpack(self, m: Module, lane: int, code: Value) -> Value:
        """Significand of one lane and how far it moves down, as ``_unpacked_layout``."""
        source, farthest, width = self.source, self._farthest, self._width
        nan, infinite = self._specials(code)
        nearest = farthest + 2 - (1 << source.exponent_bits)
        distance = Signal(range(min(nearest, 0), farthest + 1), name=f"distance_{lane}")
        steps: Value = distance
        if farthest > width:
            steps = Mux(distance > width, width, steps)
        beyond: Value = infinite
        if nearest < 0:
            beyond |= (distance < 0) & ~nan

        result = Signal(self._unpacked_layout, name=f"unpacked_{lane}")
        m.d.comb += [
            distance.eq(farthest + 1 - float_fields.place(code.exponent)),
            result.sign.eq(code.sign),
            result.significand.eq(
                Mux(nan, 0, float_fields.significand(code.mantissa, code.exponent))
            ),
            result.steps.eq(steps),
            result.beyond.eq(beyond),
            result.nan.eq(nan),
        ]
        return result

    def _align(self, m: Module, lane: int, value: Value) -> Value:
        """Magnitude of one lane in fixed point, as ``_aligned_layout``."""
        significand, width = value.significand, self._width
        # Below a half room for all that moves out of there.
        wide = Signal(width + len(significand), name=f"wide_{lane}")
        rest, halves = wide[: len(significand)], wide[len(significand) :]
        result = Signal(self._aligned_layout, name=f"aligned_{lane}")
        m.d.comb += [
            wide.eq(Cat(Const(0, width), significand) >> value.steps),
            result.sign.eq(value.sign),
            result.halves.eq(halves[: self._top + 2]),
            result.rest.eq(rest.any()),
            result.beyond.eq(value.beyond | halves[self._top + 2 :].any()),
            result.nan.eq(value.nan),
        ]
        return result

    def _round(self, m: Module, lane: int, value: Value) -> Value:
        """Significand and shift of one lane, as ``_rounded_layout``."""
        bits = self._kept_bits
        kept, half, rest, shift = value.halves[1 : 1 + bits], value.halves[0], value.rest, Const(0)
        # Of the shifts that leave the top bit of the significand set, the highest.
        for step in range(1, self.hif.shifts + 1):
            chosen = value.halves[step + bits]
            kept = Mux(chosen, value.halves[step + 1 : step + 1 + bits], kept)
            half = Mux(chosen, value.halves[step], half)
            rest = Mux(chosen, value.halves[:step].any() | value.rest, rest)
            shift = Mux(chosen, step, shift)
        up = increment(kept, half, rest)
        result = Signal(self._rounded_layout, name=f"rounded_{lane}")
        m.d.comb += [
            result.sign.eq(value.sign),
            result.magnitude.eq(kept + up),
            result.shift.eq(shift),
            result.inexact.eq(half | rest),
            result.beyond.eq(value.beyond),
            result.nan.eq(value.nan),
        ]
        return result

    def _encode(self, m: Module, lane: int, value: Value) -> tuple[Value, Value]:
        """Canonical code of one lane and its saturated flag."""
        bits, shifts = self._kept_bits, self.hif.shifts
        magnitude = value.magnitude
        # One power of two has two codes: above zero it is half of the significands' range with the
        # higher shift (the whole range, a carry, is no significand), below zero the whole range
        # with the lower one.
        carry = magnitude[bits]
        half_range = magnitude[bits - 1] & ~magnitude[: bits - 1].any()
        lower = half_range & value.shift.any()
        positive = Cat(magnitude[: bits - 1], magnitude[bits - 1] | carry, Const(0, 1))
        negative = Mux(lower, 1 << bits, -magnitude)[: bits + 1]
        end = Cat((~value.sign).replicate(bits), value.sign)
        shift = Signal(range(shifts + 2), name=f"shift_{lane}")
        saturated = Signal(name=f"saturated_{lane}")
        code = Signal(format_layout(self.hif), name=f"code_{lane}")
        m.d.comb += [
            shift.eq(Mux(value.sign, value.shift - lower, value.shift + carry)),
            saturated.eq(value.beyond | (shift >= shifts)),
            code.shift.eq(Mux(saturated, shifts - 1, shift)),
            code.significand.eq(Mux(saturated, end, Mux(value.sign, negative, positive))),
        ]
        return code, saturated
