"""The next two corrections of a tensor, and where they lie relative to the current beat."""

from amaranth.hdl import Module, Mux, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from rtl.layouts import correction_layout

__all__ = ["CorrectionWindow"]


class CorrectionWindow(wiring.Component):
    """A queue of two corrections in front of the merger: the first one, and the one behind it.

    For each it says whether its position is in the current beat. Comparing 32-bit positions and
    acting on the result do not fit in one clock. So every entry is compared when it comes in, and
    again when the merger goes on to the next beat; the results wait in registers.

    Parameters
    ----------
    lanes : int

    Members
    -------
    i : In(stream.Signature(correction_layout))
        Entries (corrections) in the order of the stream.
    entry : Out(correction_layout)
        The first entry of the queue.
    valid : Out(1)
        The queue has a first entry.
    low : Out(1)
        Its position is too low: not above that of the entry used before it, or before the beat.
    later : Out(1)
        Its position is in a later beat.
    lane : Out(unsigned)
        Its lane, if it is in this beat.
    following_valid : Out(1)
        The queue has a second entry.
    following_later : Out(1)
        The second entry is in a later beat; has no meaning if it belongs to the next tensor.
    take : In(1)
        Remove the first entry.
    used : In(1)
        With ``take``: it was added, so the next one must have a higher position. Otherwise it was
        dropped.
    changes : In(1)
        The current beat ends in this clock.
    begins : In(1)
        With ``changes``: the next beat is the first of a tensor.
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
