"""Sparse corrections added to the decoded stream: exact float32 additions, in order."""

from functools import reduce
from operator import or_

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from rtl.layouts import BFLOAT16, FLOAT32, correction_layout, float_beat_layout, merged_beat_layout
from rtl.modes import MAX_LANES

__all__ = ["SparseMerge"]

TOP_EXPONENT = 255
LANE_BITS = (MAX_LANES - 1).bit_length()
SIGNIFICAND = 24  # of float32, hidden bit included
EXTRA = 3  # guard, round and sticky bit: enough for correct rounding of a sum

# The larger operand with room for a carry, the sum of significands, in units of the extra bits.
_SUM = data.StructLayout({"sign": 1, "exponent": 8, "sum": SIGNIFICAND + EXTRA + 1, "infinite": 1})


def _significand(value: Value) -> Value:
    """Significand of a float32 with the extra bits; subnormals have no hidden bit."""
    return Cat(Const(0, EXTRA), value.mantissa, value.exponent.any())


def add(m: Module, dense: Value, correction: Value) -> Value:
    """First half of an addition of two float32: align and add; gives ``_SUM``.

    IEEE 754-2019, 5.4.1, round to nearest even, with :func:`finish`. An infinite ``dense`` stays.
    """
    swap = Signal()
    large, small = Signal(FLOAT32), Signal(FLOAT32)
    m.d.comb += [
        swap.eq(correction.as_value()[:31] > dense.as_value()[:31]),
        large.eq(Mux(swap, correction, dense)),
        small.eq(Mux(swap, dense, correction)),
    ]
    # Exponent field 0 has the exponent of field 1.
    exponent = Signal(8)
    distance = Signal(8)
    m.d.comb += [
        exponent.eq(Cat(large.exponent[0] | ~large.exponent.any(), large.exponent[1:])),
        distance.eq(exponent - Cat(small.exponent[0] | ~small.exponent.any(), small.exponent[1:])),
    ]
    width = SIGNIFICAND + EXTRA
    # Whatever is shifted out is collected in the last bit. Beyond the width all of it is.
    wide = Signal(2 * width)
    aligned = Signal(width)
    shift = Mux(distance > width, width, distance[: width.bit_length()])
    m.d.comb += [
        wide.eq(Cat(Const(0, width), _significand(small)) >> shift),
        aligned.eq(Cat(wide[width] | wide[:width].any(), wide[width + 1 :])),
    ]
    result = Signal(_SUM)
    subtract = large.sign ^ small.sign
    total = Mux(subtract, _significand(large) - aligned, _significand(large) + aligned)
    m.d.comb += [
        result.sign.eq(large.sign),
        result.exponent.eq(exponent),
        result.sum.eq(total),
        result.infinite.eq(large.exponent == TOP_EXPONENT),
    ]
    return result


def finish(m: Module, partial: Value) -> tuple[Value, Value]:
    """Second half: normalize, round, pack; gives a ``FLOAT32`` and the overflow flag."""
    width = SIGNIFICAND + EXTRA
    carry = partial.sum[width]
    # Left shift until the top bit is set, but not below the exponent of subnormals.
    value: Value = Signal(width)
    m.d.comb += value.eq(
        Mux(carry, Cat(partial.sum[0] | partial.sum[1], partial.sum[2:]), partial.sum[:width])
    )
    left = partial.exponent - 1  # how far the exponent can go down
    exponent = Signal(9)
    moved = Const(0, 5)
    for bit in reversed(range((width - 1).bit_length())):
        step = 1 << bit
        possible = Signal(name=f"shift_{step}")
        shifted = Signal(width, name=f"shifted_{step}")
        m.d.comb += [
            possible.eq(~value[width - step :].any() & (moved + step <= left) & ~carry),
            shifted.eq(Mux(possible, value << step, value)),
        ]
        value, moved = shifted, moved | Mux(possible, step, 0)[:5]
    normal = value[-1]
    rounded = Signal(SIGNIFICAND + 1)
    up = value[2] & (value[1] | value[0] | value[3])
    m.d.comb += [
        rounded.eq(value[EXTRA:] + up),
        # Rounding a subnormal up to the smallest normal sets the hidden bit, and so the exponent.
        exponent.eq(
            Mux(
                normal,
                partial.exponent + carry - moved + rounded[SIGNIFICAND],
                rounded[SIGNIFICAND - 1],
            )
        ),
    ]
    overflow = exponent >= TOP_EXPONENT
    result = Signal(FLOAT32)
    m.d.comb += [
        result.sign.eq(partial.sign & partial.sum.any()),
        result.exponent.eq(Mux(overflow | partial.infinite, TOP_EXPONENT, exponent[:8])),
        result.mantissa.eq(Mux(overflow | partial.infinite, 0, rounded[: SIGNIFICAND - 1])),
    ]
    return result, overflow | partial.infinite


class SparseMerge(wiring.Component):
    """Add the corrections of a tensor to its decoded beats.

    Every sum is one IEEE 754 float32 addition, rounded to nearest, ties to even, subnormals kept,
    a sum of zero is +0: bit-equal to :meth:`golden.corrections.Corrections.add_to`. With bfloat16
    the sum is then rounded to nearest even.

    Throughput: a beat takes one cycle, or as many as it has corrections if they are more. Latency
    3 cycles, with bfloat16 4, for a beat with at most one correction. To know that a beat is
    complete the unit looks at the entry after its last correction, so a beat waits until that one
    is on ``i_entry``. Each tensor's entries end with one that has ``last``; a tensor without any
    has one that is ``empty``. A stalled output stalls both inputs.

    An entry that does not ascend, or lies beyond the tensor's last beat, is dropped and raises
    ``misplaced`` with the next beat that leaves; one whose value is no finite bfloat16 is dropped
    and raises ``reserved``. ``overflow``: a sum is an infinity. Other flags are those of the input.
    None of them can occur with corrections that the golden model accepts.

    Parameters
    ----------
    lanes : int
        Values per beat, 1 to 512.
    float_layout : data.StructLayout
        ``FLOAT32`` or ``BFLOAT16`` of :mod:`rtl.layouts`: what comes out.

    Members
    -------
    i : In(stream.Signature(float_beat_layout))
        Decoded values, float32.
    i_entry : In(stream.Signature(correction_layout))
        Corrections in the order of their positions in the stream.
    o : Out(stream.Signature(merged_beat_layout))
        Corrected values and flags.
    """

    def __init__(self, *, lanes: int, float_layout: data.StructLayout = FLOAT32) -> None:
        if not 1 <= lanes <= MAX_LANES:
            raise ValueError(f"lanes must be 1 to {MAX_LANES}, not {lanes!r}")
        if float_layout not in (FLOAT32, BFLOAT16):
            raise ValueError(f"float_layout must be FLOAT32 or BFLOAT16, not {float_layout!r}")
        self.lanes = lanes
        self.float_layout = float_layout
        self._beat_layout = merged_beat_layout(lanes=lanes, float_layout=FLOAT32)
        out = merged_beat_layout(lanes=lanes, float_layout=float_layout)
        super().__init__(
            {
                "i": In(stream.Signature(float_beat_layout(lanes=lanes, float_layout=FLOAT32))),
                "i_entry": In(stream.Signature(correction_layout())),
                "o": Out(stream.Signature(out)),
            }
        )
        # One step of the pipeline: at most one addition to the beat that its first step carries.
        self._step_layout = data.StructLayout(
            {
                "beat": self._beat_layout,
                "starts": 1,
                "ends": 1,
                "add": 1,
                "lane": lanes,  # one-hot
            }
        )

    def elaborate(self, platform):
        m = Module()
        merged = Signal(self._beat_layout, reset_less=True)
        complete = Signal()  # `merged` is a beat that can leave
        advance = Signal()
        self._leave(m, merged, complete, advance)

        # Each stage holds a step; all of them move when the output does.
        issued, valid = self._issue(m, advance)
        steps = [Signal(self._step_layout, name=f"step_{n}", reset_less=True) for n in range(2)]
        valids = [Signal(name=f"valid_{n}") for n in range(2)]
        dense = Signal(FLOAT32, reset_less=True)
        correction = Signal(BFLOAT16, reset_less=True)
        partial = Signal(_SUM, reset_less=True)
        widened = Signal(FLOAT32)
        m.d.comb += widened.eq(Cat(Const(0, 16), correction))
        partial_now = add(m, dense, widened)
        total, overflow = finish(m, partial)
        with m.If(advance):
            m.d.sync += [
                valids[0].eq(valid),
                steps[0].eq(issued),
                dense.eq(
                    reduce(
                        or_,
                        (
                            Mux(issued.lane[lane], value.as_value(), 0)
                            for lane, value in enumerate(self.i.p.values)
                        ),
                    )
                ),
                correction.eq(self._entry.value),
                valids[1].eq(valids[0]),
                steps[1].eq(steps[0]),
                partial.eq(partial_now),
                complete.eq(valids[1] & steps[1].ends),
            ]
            with m.If(valids[1]):
                with m.If(steps[1].starts):
                    m.d.sync += merged.eq(steps[1].beat)
                # Flags may come with any step of a beat.
                with m.Else():
                    m.d.sync += [
                        merged[flag].eq(merged[flag] | steps[1].beat[flag])
                        for flag in ("reserved", "misplaced")
                    ]
                with m.If(steps[1].add):
                    for lane in range(self.lanes):
                        with m.If(steps[1].lane[lane]):
                            m.d.sync += merged.values[lane].eq(total)
                    with m.If(overflow):
                        m.d.sync += merged.overflow.eq(1)
        return m

    def _leave(self, m: Module, merged: Value, complete: Value, advance: Value) -> None:
        """The way out: as it is, or rounded to bfloat16 in one more stage."""
        if self.float_layout == FLOAT32:
            m.d.comb += [
                self.o.p.eq(merged),
                self.o.valid.eq(complete),
                advance.eq(~complete | self.o.ready),
            ]
            return
        beat = Signal(self.o.p.shape(), reset_less=True)
        free = ~self.o.valid | self.o.ready
        m.d.comb += [self.o.p.eq(beat), advance.eq(~complete | free)]
        with m.If(free):
            m.d.sync += self.o.valid.eq(complete)
            overflows = []
            for lane, value in enumerate(merged.values):
                bits = value.as_value()
                rounded = Signal(16, name=f"rounded_{lane}")
                m.d.comb += rounded.eq(bits[16:] + (bits[15] & (bits[16] | bits[:15].any())))
                overflows.append(rounded[7:15].all())
                m.d.sync += beat.values[lane].eq(rounded)
            m.d.sync += [
                beat[flag].eq(merged[flag])
                for flag in ("reserved", "underflow", "misplaced", "last")
            ]
            m.d.sync += beat.overflow.eq(merged.overflow | Cat(overflows).any())

    def _issue(self, m: Module, advance: Value) -> tuple[Value, Value]:
        """The next step of the pipeline and whether there is one."""
        beat, following = self.i.p, self.i_entry.p
        entry = self._entry = Signal(following.shape(), name="entry", reset_less=True)
        entry_valid = Signal()  # `entry` is the next one to use; `i_entry` shows the one after it
        first_position = Signal(33)  # of the beat
        lowest = Signal(33)  # position that the next entry may have at the lowest
        started = Signal()  # a step of this beat was issued
        exhausted = Signal()  # the tensor has no more entries
        misplaced, reserved = Signal(), Signal()

        past_beat = Signal(33)
        m.d.comb += past_beat.eq(first_position + self.lanes)

        def belongs_later(candidate: Value) -> Value:
            return ~beat.last & (candidate.position >= past_beat)

        issued = Signal(self._step_layout, name="issued")
        valid = Signal(name="issue")
        take_entry = Signal()
        drop = Signal()
        wrong = Signal()
        infinite = entry.value.exponent.all()
        m.d.comb += [
            wrong.eq(
                (entry.position < first_position)
                | (entry.position < lowest)
                | (entry.position >= past_beat)
            ),
            issued.beat.values.eq(beat.values),
            *(
                issued.beat[flag].eq(beat[flag])
                for flag in ("reserved", "overflow", "underflow", "last")
            ),
            issued.starts.eq(~started),
            *(
                issued.lane[lane].eq((entry.position - first_position)[:LANE_BITS] == lane)
                for lane in range(self.lanes)
            ),
        ]
        with m.If(self.i.valid):
            with m.If(exhausted):
                m.d.comb += [valid.eq(1), issued.ends.eq(1)]
            with m.Elif(entry_valid & entry.empty):
                m.d.comb += [valid.eq(1), issued.ends.eq(1), take_entry.eq(1)]
            with m.Elif(entry_valid & belongs_later(entry)):
                m.d.comb += [valid.eq(1), issued.ends.eq(1)]
            with m.Elif(entry_valid & (wrong | infinite)):
                m.d.comb += [drop.eq(1), take_entry.eq(1)]
            with m.Elif(entry_valid & (entry.last | self.i_entry.valid)):
                m.d.comb += [
                    valid.eq(1),
                    issued.add.eq(1),
                    issued.ends.eq(entry.last | belongs_later(following)),
                    take_entry.eq(1),
                ]
        m.d.comb += [
            issued.beat.misplaced.eq(misplaced),
            issued.beat.reserved.eq(beat.reserved | reserved),
            self.i.ready.eq(advance & valid & issued.ends),
            self.i_entry.ready.eq(~entry_valid | (take_entry & advance)),
        ]
        with m.If(self.i_entry.ready):
            m.d.sync += [entry_valid.eq(self.i_entry.valid), entry.eq(following)]
        with m.If(advance & drop):
            m.d.sync += [misplaced.eq(misplaced | wrong), reserved.eq(reserved | ~wrong)]
        with m.If(advance & valid):
            m.d.sync += [started.eq(~issued.ends), misplaced.eq(0), reserved.eq(0)]
            with m.If(issued.add):
                m.d.sync += lowest.eq(entry.position + 1)
            with m.If(issued.ends):
                m.d.sync += first_position.eq(Mux(beat.last, 0, past_beat))
                with m.If(beat.last):
                    m.d.sync += lowest.eq(0)
        with m.If(advance & take_entry & (entry.last | entry.empty)):
            m.d.sync += exhausted.eq(1)
        with m.If(advance & issued.ends & beat.last):
            m.d.sync += exhausted.eq(0)
        return issued, valid
