"""Sparse corrections added to the decoded stream: exact float32 additions, in order."""

from functools import reduce
from operator import or_

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from rtl.layouts import BFLOAT16, FLOAT32, correction_layout, float_beat_layout, merged_beat_layout
from rtl.modes import MAX_LANES

__all__ = ["SparseMerge"]

TOP_EXPONENT = 255
SIGNIFICAND = 24  # of float32, hidden bit included
EXTRA = 3  # guard, round and sticky bit: enough for correct rounding of a sum
WIDTH = SIGNIFICAND + EXTRA

_STAGES = 6  # between a step of the input and the beat that leaves

# Operands by magnitude. `exponent` is the field of the larger one, at least 1: field 0 has the
# exponent of field 1. `distance` is how far the smaller one has to move down.
_ORDERED = data.StructLayout(
    {
        "sign": 1, "exponent": 8, "infinite": 1, "subtract": 1,
        "large": SIGNIFICAND, "small": SIGNIFICAND, "distance": 8,
    }
)  # fmt: skip
_ALIGNED = data.StructLayout(
    {
        "sign": 1, "exponent": 8, "infinite": 1, "subtract": 1,
        "large": SIGNIFICAND, "small": WIDTH,
    }
)  # fmt: skip
# The sum has room for a carry. The highest bit of `probe` ends up on top: the sum's own, or that
# of as many places as the exponent can go down.
_SUM = data.StructLayout(
    {"sign": 1, "exponent": 8, "infinite": 1, "sum": WIDTH + 1, "probe": WIDTH + 1}
)
# `value` starts with the hidden bit, which only a subnormal number lacks.
_NORMALIZED = data.StructLayout(
    {"sign": 1, "exponent": 8, "infinite": 1, "value": WIDTH + 1, "shift": 5}
)


def _order(m: Module, dense: Value, correction: Value) -> Value:
    """Step 1 of an addition of two float32, of which ``dense`` may be infinite: ``_ORDERED``.

    The steps together are IEEE 754-2019, 5.4.1, round to nearest even. An infinity stays.
    """

    def exponent(value: Value) -> Value:
        return Cat(value.exponent[0] | ~value.exponent.any(), value.exponent[1:])

    def significand(value: Value) -> Value:
        return Cat(value.mantissa, value.exponent.any())

    swap = Signal()
    m.d.comb += swap.eq(correction.as_value()[:31] > dense.as_value()[:31])
    ahead, behind = Signal(8), Signal(8)
    m.d.comb += [
        ahead.eq(exponent(dense) - exponent(correction)),
        behind.eq(exponent(correction) - exponent(dense)),
    ]
    result = Signal(_ORDERED)
    m.d.comb += [
        result.sign.eq(Mux(swap, correction.sign, dense.sign)),
        result.exponent.eq(Mux(swap, exponent(correction), exponent(dense))),
        result.infinite.eq(dense.exponent.all()),
        result.subtract.eq(dense.sign ^ correction.sign),
        result.large.eq(Mux(swap, significand(correction), significand(dense))),
        result.small.eq(Mux(swap, significand(dense), significand(correction))),
        result.distance.eq(Mux(swap, behind, ahead)),
    ]
    return result


def _align(m: Module, ordered: Value) -> Value:
    """Step 2: move the smaller significand down; what falls out is collected in its last bit."""
    value: Value = Cat(Const(0, EXTRA), ordered.small)
    sticky: Value = Const(0, 1)
    for bit in reversed(range(5)):
        step = 1 << bit
        moved = Signal(WIDTH, name=f"moved_{step}")
        lost = Signal(name=f"lost_{step}")
        m.d.comb += [
            moved.eq(Mux(ordered.distance[bit], value >> step, value)),
            lost.eq(sticky | (ordered.distance[bit] & value[:step].any())),
        ]
        value, sticky = moved, lost
    # 32 or more: so little changes no sum, whichever way it is rounded.
    far = ordered.distance[5:].any()
    result = Signal(_ALIGNED)
    m.d.comb += [
        *(
            result[name].eq(ordered[name])
            for name in ("sign", "exponent", "infinite", "subtract", "large")
        ),
        result.small.eq(Mux(far, 0, Cat(value[0] | sticky, value[1:]))),
    ]
    return result


def _add(m: Module, aligned: Value) -> Value:
    """Step 3: the sum of the significands."""
    large = Cat(Const(0, EXTRA), aligned.large)
    result = Signal(_SUM)
    # An exponent field of 1 allows one place, from the carry to the hidden bit.
    marker = Cat(aligned.exponent == WIDTH - bit for bit in range(WIDTH))
    m.d.comb += [
        *(result[name].eq(aligned[name]) for name in ("sign", "exponent", "infinite")),
        result.sum.eq(Mux(aligned.subtract, large - aligned.small, large + aligned.small)),
        result.probe.eq(result.sum | marker),
    ]
    return result


def _leading_zeros(m: Module, bits: Value) -> list[Value]:
    """Binary digits of the number of zeros above the highest bit set, from the highest digit on.

    Halves are counted at the same time. ``bits`` is a power of two long; of 0 all digits are 1.
    """
    half = len(bits) // 2
    if not half:
        return []
    empty = Signal()
    m.d.comb += empty.eq(~bits[half:].any())
    digits: list[Value] = [empty]
    below, above = (_leading_zeros(m, part) for part in (bits[:half], bits[half:]))
    for low, high in zip(below, above, strict=True):
        digit = Signal()
        m.d.comb += digit.eq(Mux(empty, low, high))
        digits.append(digit)
    return digits


def _normalize(m: Module, total: Value) -> Value:
    """Step 4: move the sum up until its top bit is set or the exponent can go no lower."""
    digits = _leading_zeros(m, Cat(Const(0, 32 - len(total.probe)), total.probe))
    value = total.sum
    for number, digit in enumerate(digits):
        step = 16 >> number
        shifted = Signal(WIDTH + 1, name=f"shifted_{step}")
        m.d.comb += shifted.eq(Mux(digit, value << step, value))
        value = shifted
    result = Signal(_NORMALIZED)
    m.d.comb += [
        *(result[name].eq(total[name]) for name in ("sign", "exponent", "infinite")),
        result.value.eq(value),
        result.shift.eq(Cat(reversed(digits))),
    ]
    return result


def _round(m: Module, normalized: Value) -> tuple[Value, Value]:
    """Step 5: round and pack; gives a ``FLOAT32`` and the overflow flag."""
    value = normalized.value
    low = EXTRA + 1  # bits below the last place
    rounded = Signal(SIGNIFICAND + 1)
    up = value[low - 1] & (value[: low - 1].any() | value[low])
    m.d.comb += rounded.eq(value[low:] + up)
    # Both outcomes are worked out beside the addition, whose carry then chooses.
    fields, too_large = [], []
    for carry in range(2):
        exponent = Signal(9, name=f"exponent_{carry}")
        # The carry is one place above the hidden bit.
        m.d.comb += exponent.eq(normalized.exponent + (1 + carry) - normalized.shift)
        fields.append(exponent[:8])
        too_large.append(value[-1] & (exponent >= TOP_EXPONENT))
    carry = rounded[SIGNIFICAND]
    overflow = Signal()
    result = Signal(FLOAT32)
    m.d.comb += [
        overflow.eq(Mux(carry, too_large[1], too_large[0]) | normalized.infinite),
        # A sum of zero is +0.
        result.sign.eq(normalized.sign & value.any()),
        result.exponent.eq(Mux(carry, fields[1], fields[0])),
        result.mantissa.eq(Mux(overflow, 0, rounded[: SIGNIFICAND - 1])),
    ]
    with m.If(~value[-1]):
        # Rounding a subnormal up to the smallest normal sets the hidden bit, and so the exponent.
        m.d.comb += result.exponent.eq(rounded[SIGNIFICAND - 1])
    with m.If(overflow):
        m.d.comb += result.exponent.eq(TOP_EXPONENT)
    return result, overflow


class _Entries(wiring.Component):
    """The entry to use and the one after it, and how they lie to the beat.

    That is worked out when an entry comes and when the beat changes, and kept in registers: a
    comparison of positions and the decision what to do with an entry are too long for one clock.

    Parameters
    ----------
    lanes : int

    Members
    -------
    i : In(stream.Signature(correction_layout))
        Entries.
    entry : Out(correction_layout)
        The one to use, if ``valid``.
    low, later : Out(1)
        Its position is below what it may be at the lowest; is after the beat.
    lane : Out(unsigned)
        Its lane in the beat.
    following_valid, following_later : Out(1)
        There is one after it; which is after the beat, if it is of the same tensor.
    take : In(1)
        It is used or dropped.
    used : In(1)
        It is used: the next one must be higher.
    changes : In(1)
        The beat is over.
    begins : In(1)
        And the next one is the first of a tensor.
    """

    def __init__(self, *, lanes: int) -> None:
        self.lanes = lanes
        layout = correction_layout()
        super().__init__(
            {
                "i": In(stream.Signature(layout)),
                "entry": Out(layout),
                "valid": Out(1),
                "low": Out(1),
                "later": Out(1),
                "lane": Out((lanes - 1).bit_length()),
                "following_valid": Out(1),
                "following_later": Out(1),
                "take": In(1),
                "used": In(1),
                "changes": In(1),
                "begins": In(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        lanes, coming = self.lanes, self.i.p
        entry = Signal(coming.shape(), reset_less=True)
        following = Signal(coming.shape(), reset_less=True)
        entry_valid = Signal()
        following_valid = Signal()
        low, later = Signal(reset_less=True), Signal(reset_less=True)
        following_later = Signal(reset_less=True)
        following_after = Signal(reset_less=True)  # after the next beat too
        # The positions right after the beat, and after each of the two that come then.
        ends = [Signal(33, init=beats * lanes, name=f"end_{beats}") for beats in range(1, 4)]
        lowest = Signal(33)
        m.d.comb += [
            self.entry.eq(entry),
            self.valid.eq(entry_valid),
            self.low.eq(low),
            self.later.eq(later),
            self.lane.eq(self._lane(entry.position, ends[0])),
            self.following_valid.eq(following_valid),
            self.following_later.eq(following_later),
        ]

        with m.If(self.take & self.used):
            m.d.sync += lowest.eq(entry.position + 1)
        with m.If(self.changes):
            m.d.sync += lowest.eq(ends[0])
            following_ends = [*ends[1:], ends[2] + lanes]
            m.d.sync += [end.eq(value) for end, value in zip(ends, following_ends, strict=True)]
        with m.If(self.begins):
            m.d.sync += [lowest.eq(0), *(end.eq(end.init) for end in ends)]

        def after(beats: int, position: Value, same: Value, changed: Value) -> Value:
            """Whether a position is after so many beats, counted from the beat of the next clock.

            ``same``, ``changed``: the answer if that is the same beat, if it is the one after it.
            """
            return Mux(self.begins, position >= beats * lanes, Mux(self.changes, changed, same))

        moves = Signal()  # the entry that follows becomes the one to use
        m.d.comb += [
            moves.eq(~entry_valid | self.take),
            self.i.ready.eq(~following_valid | moves),
        ]
        position = following.position
        with m.If(moves):
            descends = Mux(self.used, position <= entry.position, position < lowest)
            # A beat changes before an entry that is after it, or of another tensor.
            m.d.sync += [
                entry_valid.eq(following_valid),
                entry.eq(following),
                later.eq(after(1, position, following_later, following_after)),
                low.eq(~self.changes & descends),
            ]
        with m.Elif(self.changes):
            m.d.sync += [
                later.eq(after(1, entry.position, later, entry.position >= ends[1])),
                low.eq(0),
            ]
        with m.If(self.i.ready):
            is_after = [coming.position >= end for end in ends]
            m.d.sync += [
                following_valid.eq(self.i.valid),
                following.eq(coming),
                following_later.eq(after(1, coming.position, is_after[0], is_after[1])),
                following_after.eq(after(2, coming.position, is_after[1], is_after[2])),
            ]
        with m.Elif(self.changes):
            m.d.sync += [
                following_later.eq(after(1, position, following_later, following_after)),
                following_after.eq(after(2, position, following_after, position >= ends[2])),
            ]
        return m

    def _lane(self, position: Value, end: Value) -> Value:
        """Lane of a position inside the beat that ends before ``end``."""
        width = len(self.lane)
        if self.lanes == 1 << width:  # beats start at multiples of the lanes
            return position[:width]
        return position[:width] - end[:width] + self.lanes


class SparseMerge(wiring.Component):
    """Add the corrections of a tensor to its decoded beats.

    Every sum is one IEEE 754 float32 addition, rounded to nearest, ties to even, subnormals kept,
    a sum of zero is +0: bit-equal to :meth:`golden.corrections.Corrections.add_to`. With bfloat16
    the sum is then rounded to nearest even.

    Throughput: a beat takes one cycle, or as many as it has corrections if they are more. Latency
    7 cycles, with bfloat16 8, for a beat with at most one correction. To know that a beat is
    complete the unit looks at the entry after its last correction, so a beat waits until that one
    has been taken from ``i_entry``. Each tensor's entries end with one that has ``last``; a tensor
    without any has one that is ``empty``. A stalled output stalls both inputs.

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
                "lane": (lanes - 1).bit_length(),
            }
        )

    def elaborate(self, platform):
        m = Module()
        merged = Signal(self._beat_layout, reset_less=True)
        complete = Signal()  # `merged` is a beat that can leave
        advance = Signal()
        self._leave(m, merged, complete, advance)

        # Each stage holds a step and how far its addition is; all of them move when the output
        # does.
        issued, valid = self._issue(m, advance)
        dense = Signal(FLOAT32, reset_less=True)
        correction = Signal(BFLOAT16, reset_less=True)
        widened = Signal(FLOAT32)
        m.d.comb += widened.eq(Cat(Const(0, 16), correction))
        with m.If(advance):
            m.d.sync += [dense.eq(self._dense(issued)), correction.eq(self._entry.value)]
        partial = _order(m, dense, widened)
        for number, step in enumerate((_align, _add, _normalize)):
            held = Signal(partial.shape(), name=f"partial_{number}", reset_less=True)
            with m.If(advance):
                m.d.sync += held.eq(partial)
            partial = step(m, held)
        normalized = Signal(partial.shape(), reset_less=True)
        rounded, too_large = _round(m, normalized)
        total, overflow = Signal(FLOAT32, reset_less=True), Signal(reset_less=True)

        for number in range(_STAGES):
            step = Signal(self._step_layout, name=f"step_{number}", reset_less=True)
            step_valid = Signal(name=f"valid_{number}")
            with m.If(advance):
                m.d.sync += [step.eq(issued), step_valid.eq(valid)]
            before, issued, valid = issued, step, step_valid
        chosen = Signal(self.lanes, reset_less=True)  # lane of the final step, one-hot
        with m.If(advance):
            m.d.sync += [
                normalized.eq(partial),
                total.eq(rounded),
                overflow.eq(too_large),
                chosen.eq(Cat(before.lane == lane for lane in range(self.lanes))),
                complete.eq(valid & issued.ends),
            ]
            with m.If(valid):
                with m.If(issued.starts):
                    m.d.sync += merged.eq(issued.beat)
                # Flags may come with any step of a beat.
                with m.Else():
                    m.d.sync += [
                        merged[flag].eq(merged[flag] | issued.beat[flag])
                        for flag in ("reserved", "misplaced")
                    ]
                with m.If(issued.add):
                    for lane in range(self.lanes):
                        with m.If(chosen[lane]):
                            m.d.sync += merged.values[lane].eq(total)
                    with m.If(overflow):
                        m.d.sync += merged.overflow.eq(1)
        return m

    def _dense(self, issued: Value) -> Value:
        """The value that the correction of a step is added to."""
        picked = (
            Mux(issued.lane == lane, value.as_value(), 0)
            for lane, value in enumerate(self.i.p.values)
        )
        return reduce(or_, picked)

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
        beat = self.i.p
        m.submodules.entries = entries = _Entries(lanes=self.lanes)
        connect(m, flipped(self.i_entry), entries.i)
        entry = self._entry = entries.entry
        started = Signal()  # a step of this beat was issued
        exhausted = Signal()  # the tensor has no more entries
        misplaced, reserved = Signal(), Signal()

        issued = Signal(self._step_layout, name="issued")
        valid = Signal(name="issue")
        take_entry = Signal()
        drop = Signal()
        wrong = Signal()
        infinite = entry.value.exponent.all()
        m.d.comb += [
            wrong.eq(entries.low | entries.later),
            issued.beat.values.eq(beat.values),
            *(
                issued.beat[flag].eq(beat[flag])
                for flag in ("reserved", "overflow", "underflow", "last")
            ),
            issued.starts.eq(~started),
            issued.lane.eq(entries.lane),
        ]
        with m.If(self.i.valid):
            with m.If(exhausted):
                m.d.comb += [valid.eq(1), issued.ends.eq(1)]
            with m.Elif(entries.valid & entry.empty):
                m.d.comb += [valid.eq(1), issued.ends.eq(1), take_entry.eq(1)]
            with m.Elif(entries.valid & ~beat.last & entries.later):
                m.d.comb += [valid.eq(1), issued.ends.eq(1)]
            with m.Elif(entries.valid & (wrong | infinite)):
                m.d.comb += [drop.eq(1), take_entry.eq(1)]
            with m.Elif(entries.valid & (entry.last | entries.following_valid)):
                m.d.comb += [
                    valid.eq(1),
                    issued.add.eq(1),
                    issued.ends.eq(entry.last | (~beat.last & entries.following_later)),
                    take_entry.eq(1),
                ]
        m.d.comb += [
            issued.beat.misplaced.eq(misplaced),
            issued.beat.reserved.eq(beat.reserved | reserved),
            self.i.ready.eq(advance & valid & issued.ends),
            entries.take.eq(advance & take_entry),
            entries.used.eq(issued.add),
            entries.changes.eq(self.i.ready),
            entries.begins.eq(self.i.ready & beat.last),
        ]
        with m.If(advance & drop):
            m.d.sync += [misplaced.eq(misplaced | wrong), reserved.eq(reserved | ~wrong)]
        with m.If(advance & valid):
            m.d.sync += [started.eq(~issued.ends), misplaced.eq(0), reserved.eq(0)]
        with m.If(advance & take_entry & (entry.last | entry.empty)):
            m.d.sync += exhausted.eq(1)
        with m.If(advance & issued.ends & beat.last):
            m.d.sync += exhausted.eq(0)
        return issued, valid
