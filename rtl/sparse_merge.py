"""Sparse corrections added to the decoded stream: exact float32 additions, in order."""

from functools import reduce
from operator import or_

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from rtl.correction_window import CorrectionWindow
from rtl.layouts import BFLOAT16, FLOAT32, correction_layout, float_beat_layout, merged_beat_layout
from rtl.modes import MAX_LANES
from rtl.parts.float_adder import LATENCY as ADDER_LATENCY
from rtl.parts.float_adder import add_floats
from rtl.parts.pipeline import delayed
from rtl.parts.rounding import nearest_even

__all__ = ["SparseMerge"]

# Between a step of the input and the beat that leaves: fetching the operands, and the addition.
_STAGES = 1 + ADDER_LATENCY


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
        issued, valid, entry_value = self._issue(m, advance)
        dense = Signal(FLOAT32, reset_less=True)
        correction = Signal(BFLOAT16, reset_less=True)
        widened = Signal(FLOAT32)
        m.d.comb += widened.eq(Cat(Const(0, 16), correction))
        with m.If(advance):
            m.d.sync += [dense.eq(self._dense(issued)), correction.eq(entry_value)]
        total, overflow = add_floats(m, dense, widened, advance)

        steps = delayed(m, issued, _STAGES, advance=advance, name="step")
        before, issued = steps[-2:]
        valid = delayed(m, valid, _STAGES, advance=advance, name="valid", reset=True)[-1]
        chosen = Signal(self.lanes, reset_less=True)  # lane of the final step, one-hot
        with m.If(advance):
            m.d.sync += [
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
                kept, up = nearest_even(bits, 16)
                m.d.comb += rounded.eq(kept + up)
                overflows.append(rounded[7:15].all())
                m.d.sync += beat.values[lane].eq(rounded)
            m.d.sync += [
                beat[flag].eq(merged[flag])
                for flag in ("reserved", "underflow", "misplaced", "last")
            ]
            m.d.sync += beat.overflow.eq(merged.overflow | Cat(overflows).any())

    def _issue(self, m: Module, advance: Value) -> tuple[Value, Value, Value]:
        """The next step of the pipeline, whether there is one, and what it adds."""
        beat = self.i.p
        m.submodules.entries = entries = CorrectionWindow(lanes=self.lanes)
        connect(m, flipped(self.i_entry), entries.i)
        entry = entries.entry
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
        return issued, valid, entry.value
