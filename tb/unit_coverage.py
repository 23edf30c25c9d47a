"""Which bins of :mod:`tb.coverage` a transfer, a clock or a reset hits, unit by unit.

No simulator here: benches call the methods with what their monitors saw on the pins.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from golden.formats import BF16, FloatFormat, HifFormat, NumberFormat
from golden.notation import QuantFormat
from golden.promotion import is_promoted
from rtl.layouts import (
    correction_layout,
    float_beat_layout,
    hif_beat_layout,
    index_beat_layout,
    lut_write_layout,
    merged_beat_layout,
)
from rtl.modes import Modes
from rtl.units import FLOAT_LAYOUTS, FLOAT_TO_HIF, HIF_TO_FLOAT, LUT_DECODER, SPARSE_MERGE
from tb.coverage import Counts
from tb.coverage_classes import (
    element_class,
    float_class,
    result_class,
    rounding_classes,
    sum_classes,
)

__all__ = [
    "ConverterCoverage",
    "FloatCoverage",
    "LutCoverage",
    "MergeCoverage",
    "UnitCoverage",
]


@dataclass
class _Tensor:
    """A tensor under way: whether its source paused, output stalls when it began."""

    paused: bool
    stalls_before: int


class UnitCoverage:
    """Stalls, lengths and resets; units add what is theirs.

    Parameters
    ----------
    counts : Counts
    unit : str
        Prefix of its groups.
    last_in, last_out : int
        Bit of ``last`` in the payloads of ``i`` and ``o``.
    """

    def __init__(self, counts: Counts, unit: str, last_in: int, last_out: int) -> None:
        self.counts, self.unit = counts, unit
        self._last_in, self._last_out = last_in, last_out
        self.edge = 0
        self.forget()

    def hit(self, group: str, name: str, times: int = 1) -> None:
        """Count one of the unit's bins."""
        self.counts.hit(f"{self.unit}: {group}", name, times)

    def forget(self) -> None:
        """Nothing is under way."""
        self._beats = 0
        self._stalls = 0
        self._tensor = _Tensor(False, 0)
        self._under_way: deque[_Tensor] = deque()

    def on_clock(self, stream: str, valid: bool, ready: bool) -> None:
        """A clock edge as a monitor saw it; of ``o`` last."""
        if stream == "i":
            if self._beats and not valid:
                self._tensor.paused = True
        elif stream == "o":
            self._stalls += valid and not ready
            self.edge += 1

    def on_transfer(self, stream: str, word: int) -> None:
        """A word that moved."""
        if stream == "i":
            if not self._beats:
                self._tensor = _Tensor(False, self._stalls)
            self._beats += 1
            self.on_beat(word)
            if word >> self._last_in & 1:
                self.hit("beats of a tensor", "one" if self._beats == 1 else "several")
                self.on_last(self._beats)
                self._under_way.append(self._tensor)
                self._beats = 0
        elif stream == "o":
            self.on_output(word)
            if word >> self._last_out & 1:
                tensor = self._under_way.popleft()
                out = self._stalls > tensor.stalls_before
                seen = {(0, 0): "none", (1, 0): "in", (0, 1): "out", (1, 1): "both"}
                self.hit("stalls of a tensor", seen[tensor.paused, out])
        else:
            self.on_side(word)

    def on_reset(self, output_stalled: bool) -> None:
        """A reset; ``output_stalled`` is what the pins showed at its first edge."""
        phases = self.phases()
        if output_stalled:
            phases.append("output stalled")
        if self._beats:
            phases.append("mid-tensor")
        if self._under_way:
            phases.append("draining")
        for phase in phases or ["idle"] * bool(self.edge):  # not the one after power-up
            self.hit("reset", phase)
        self.forget()

    def phases(self) -> list[str]:
        """What else a reset would hit now."""
        return []

    def on_beat(self, word: int) -> None:
        """A beat that went in."""

    def on_last(self, beats: int) -> None:
        """The last of ``beats`` beats went in."""

    def on_side(self, word: int) -> None:
        """A word of the other input."""

    def on_output(self, word: int) -> None:
        """A beat that came out."""


def _items(word: int, offset: int, width: int, count: int) -> list[int]:
    mask = (1 << width) - 1
    return [word >> offset + position * width & mask for position in range(count)]


class LutCoverage(UnitCoverage):
    """Of :class:`rtl.lut_decoder.LutDecoder`."""

    def __init__(self, counts: Counts, modes: Modes, lanes: int) -> None:
        self.modes, self.lanes, self.slots = modes, lanes, modes.slots(lanes)
        self.layout = index_beat_layout(lanes=lanes, modes=modes)
        self.side = lut_write_layout(modes=modes)
        out = hif_beat_layout(lanes=lanes, modes=modes)
        super().__init__(counts, LUT_DECODER.name, self.layout["last"].offset, out["last"].offset)

    def forget(self) -> None:
        """Nothing is under way."""
        super().forget()
        self._writes = 0
        self._loaded: deque[tuple[int, int, int]] = deque()  # mode, writes, edge of the last write
        self._current: tuple[int, int, int] | None = None
        self._last_beat = -1  # edge of the tensor's before
        self._kind = ""
        self._waited = False

    @staticmethod
    def kind(fmt: QuantFormat) -> str:
        """What tells formats apart in the lookup."""
        if fmt.codebooks:
            return f"{fmt.index_bits}-bit LUT"
        return "E2M3" if is_promoted(fmt) else "other atom"

    def on_clock(self, stream: str, valid: bool, ready: bool) -> None:
        """Also whether a tensor waits for its LUTs."""
        if stream == "i" and valid and not ready and not self._beats and self._last_beat >= 0:
            self._waited |= not self._loaded
        super().on_clock(stream, valid, ready)

    def on_side(self, word: int) -> None:
        """One LUT write."""
        self._writes += 1
        if word >> self.side["last"].offset & 1:
            bits = self.modes.mode_bits
            mode = _items(word, self.side["mode"].offset, bits, 1)[0] if bits else 0
            self._loaded.append((mode, self._writes, self.edge))
            self._writes = 0

    def on_beat(self, word: int) -> None:
        """Entries that are read."""
        if self._beats == 1:
            self._current = self._loaded.popleft()
            self._judge_timing(self._current[2])
        assert self._current is not None
        fmt = self.modes.formats[self._current[0]]
        if not fmt.codebooks:
            return
        words = _items(word, self.layout["scale_words"].offset, self.modes.word_bits, self.slots)
        metabits = [bool(fmt.word.metabit(value)) for value in words]
        if len(fmt.codebooks) == 2:
            both = "mixed" if len(set(metabits)) == 2 else f"all {int(metabits[0])}"
            self.hit("metabits of a beat", both)
        indices = _items(word, 0, self.modes.element_bits, self.lanes)
        group = f"entries of {fmt.index_bits}-bit LUTs"
        for lane, index in enumerate(indices):
            lut = "Lb" if metabits[lane * self.slots // self.lanes] else "La"
            self.hit(group, f"{lut} {index}")

    def _judge_timing(self, written: int) -> None:
        if self._last_beat >= 0:
            lead = self._last_beat - written  # the bank is complete one clock after its last write
            timing = ("early" if lead > 1 else "just in time" if lead == 1
                      else "one clock late" if lead == 0 else "late")  # fmt: skip
            self.hit("LUTs of the next tensor", timing)
            if self._waited:
                self.hit("LUTs of the next tensor", "late, input waits")
        self._waited = False

    def on_last(self, beats: int) -> None:
        """Length against the LUT load, and the change of format."""
        assert self._current is not None
        mode, writes, _ = self._current
        length = "fewer" if beats < writes else "more" if beats > writes else "as many"
        self.hit("beats against LUT writes", length)
        kind = self.kind(self.modes.formats[mode])
        if self._kind:
            self.hit("format, then next format", f"{self._kind} > {kind}")
        self._kind, self._last_beat = kind, self.edge

    def phases(self) -> list[str]:
        """Also what the shadow bank is doing."""
        waiting = len(self._loaded) - (not self._beats)  # the first one is in use already
        return ["LUT load under way"] * bool(self._writes) + ["LUTs waiting"] * (waiting > 0)


class FloatCoverage(UnitCoverage):
    """Of :class:`rtl.hif_to_float.HifToFloat`."""

    FLAGS = ("reserved", "overflow", "underflow")

    def __init__(self, counts: Counts, modes: Modes, lanes: int, output: str) -> None:
        self.modes, self.lanes, self.output = modes, lanes, output
        self.slots = modes.slots(lanes)
        self.layout = hif_beat_layout(lanes=lanes, modes=modes)
        self.out = float_beat_layout(lanes=lanes, float_layout=FLOAT_LAYOUTS[output])
        super().__init__(counts, HIF_TO_FLOAT.name, self.layout["last"].offset,
                         self.out["last"].offset)  # fmt: skip
        self._elements = [
            [
                element_class(code, modes.decoded(fmt))
                for code in range(1 << modes.decoded(fmt).width)
            ]
            for fmt in modes.formats
        ]
        self._scales = [
            [float_class(code, fmt.word.scale) for code in range(1 << fmt.word.scale.width)]
            for fmt in modes.formats
        ]
        self._element_bits = self.layout["codes"].width // lanes

    def forget(self) -> None:
        """Nothing is under way."""
        super().forget()
        self._before: NumberFormat | None = None

    def on_beat(self, word: int) -> None:
        """Classes of all factors."""
        layout, mode = self.layout, 0
        if self.modes.mode_bits:
            mode = _items(word, layout["mode"].offset, self.modes.mode_bits, 1)[0]
        fmt = self.modes.formats[mode]
        element = self.modes.decoded(fmt)
        for code in _items(word, 0, self._element_bits, self.lanes):
            self.hit(*self._elements[mode][code & (1 << element.width) - 1])
        group = "signed scale" if fmt.word.scale.signed else "unsigned scale"
        scales = _items(word, layout["scales"].offset, self.modes.scale_bits, self.slots)
        for code in scales:
            self.hit(group, self._scales[mode][fmt.word.scale_code(code)])
        if fmt.row_scale:
            for code in _items(word, layout["row_scales"].offset, 16, self.slots):
                self.hit("row scale", float_class(code, BF16))
        width = layout["layer_exponent"].width
        (exponent,) = _items(word, layout["layer_exponent"].offset, width, 1)
        exponent -= exponent >> width - 1 << width
        ends = {-1 << width - 1: "lowest", (1 << width - 1) - 1: "highest"}
        sign = "negative" if exponent < 0 else "positive" if exponent else "zero"
        self.hit("layer exponent", ends.get(exponent, sign))
        if self._before is not None:
            self.hit("format, then next format", self._change(self._before, element))
        self._before = element

    @staticmethod
    def _change(before: NumberFormat, after: NumberFormat) -> str:
        kinds = ["HIF" if isinstance(fmt, HifFormat) else "atom" for fmt in (before, after)]
        if kinds == ["atom", "atom"]:
            return "atom > the same" if before == after else "atom > another atom"
        return " > ".join(kinds)

    def on_output(self, word: int) -> None:
        """Classes of values, and flags."""
        count_results(self, word, self.lanes, self.output)
        flags = [name for name in self.FLAGS if word >> self.out[name].offset & 1]
        for flag in flags or ["none"]:
            self.hit("flags of a beat", flag)
        if len(flags) > 1:
            self.hit("flags of a beat", "several at once")


def count_results(coverage: UnitCoverage, word: int, lanes: int, output: str) -> None:
    """Classes of all values of a beat."""
    width = FLOAT_LAYOUTS[output].size
    for bits in _items(word, 0, width, lanes):
        coverage.hit(f"{output} value", result_class(bits, width - 9))


class MergeCoverage(UnitCoverage):
    """Of :class:`rtl.sparse_merge.SparseMerge`."""

    FLAGS = ("reserved", "overflow", "misplaced")

    def __init__(self, counts: Counts, lanes: int, output: str) -> None:
        self.lanes, self.output = lanes, output
        layout = float_beat_layout(lanes=lanes, float_layout=FLOAT_LAYOUTS["float32"])
        self.entry = correction_layout()
        self.out = merged_beat_layout(lanes=lanes, float_layout=FLOAT_LAYOUTS[output])
        super().__init__(counts, SPARSE_MERGE.name, layout["last"].offset, self.out["last"].offset)

    def forget(self) -> None:
        """Nothing is under way."""
        super().forget()
        self._entries: deque[tuple[int, int, bool, bool]] = deque()  # position, value, empty, last
        self._lowest = 0
        self._of_tensor = 0
        self._exhausted = False

    def on_side(self, word: int) -> None:
        """One entry."""
        entry, position = self.entry, word & 0xFFFFFFFF
        value = word >> entry["value"].offset & 0xFFFF
        empty, last = (bool(word >> entry[name].offset & 1) for name in ("empty", "last"))
        self._entries.append((position, value, empty, last))

    def on_beat(self, word: int) -> None:
        """Entries that belong to the beat: all of them were taken before it."""
        first = (self._beats - 1) * self.lanes
        added = 0
        last_beat = word >> self._last_in & 1
        while self._entries and not self._exhausted:
            position, value, empty, last = self._entries[0]
            if not empty and not last_beat and position >= first + self.lanes:
                break
            self._entries.popleft()
            self._exhausted = last
            if empty:
                continue
            if not max(first, self._lowest) <= position < first + self.lanes:
                self.hit("correction", "misplaced")
                continue
            if BF16.has_top_exponent(value):
                self.hit("correction", "reserved")
                continue
            lane = position - first
            added += 1
            self._lowest = position + 1
            place = "first" if not lane else "last" if lane == self.lanes - 1 else "inner"
            self.hit("lane of a correction", place)
            for kind in sum_classes(word >> 32 * lane & 0xFFFFFFFF, value << 16):
                self.hit("correction", kind)
        self._of_tensor += added
        names = {0: "0", 1: "1", 2: "2", self.lanes: "every lane"}
        self.hit("corrections of a beat", names.get(added, "several"))

    def on_last(self, beats: int) -> None:
        """Corrections of the tensor."""
        kind = ("none", "one")[self._of_tensor] if self._of_tensor < 2 else "several"
        self.hit("corrections of a tensor", kind)
        self._of_tensor = self._lowest = 0
        self._exhausted = False

    def phases(self) -> list[str]:
        """Also whether an entry was taken whose beat was not."""
        return ["correction pending"] * any(not empty for _, _, empty, _ in self._entries)

    def on_output(self, word: int) -> None:
        """Classes of values, and flags."""
        count_results(self, word, self.lanes, self.output)
        flags = [name for name in self.FLAGS if word >> self.out[name].offset & 1]
        for flag in flags or ["none"]:
            self.hit("flags of a beat", flag)


class ConverterCoverage(UnitCoverage):
    """Of :class:`rtl.float_to_hif.FloatToHif`.

    Parameters
    ----------
    counts : Counts
    source, hif : FloatFormat, HifFormat
    lanes, shift : int
    reference : sequence of int
        For every source code the HIF code with the flags inexact, saturated and nan above it.
    layout_in, layout_out : data.StructLayout
        Payloads.
    """

    def __init__(
        self, counts: Counts, source: FloatFormat, hif: HifFormat, lanes: int, shift: int,
        reference: Sequence[int], layout_in: Any, layout_out: Any,
    ) -> None:  # fmt: skip
        self.source, self.hif, self.lanes, self.layout = source, hif, lanes, layout_out
        super().__init__(counts, FLOAT_TO_HIF.name, layout_in["last"].offset,
                         layout_out["last"].offset)  # fmt: skip
        self._rounding = rounding_classes(source, hif, shift, reference)

    def _source_class(self, code: int) -> str:
        name = float_class(code, self.source)
        if not name.endswith("reserved"):
            return name
        return "NaN" if code & (1 << self.source.mantissa_bits) - 1 else "infinity"

    def on_beat(self, word: int) -> None:
        """Classes of source codes, and how they are rounded."""
        for code in _items(word, 0, self.source.width, self.lanes):
            self.hit(f"code of {self.source.name}", self._source_class(code))
            if self._rounding[code]:
                self.hit("rounding", self._rounding[code])

    def on_output(self, word: int) -> None:
        """Classes of HIF codes, and flags."""
        for code in _items(word, 0, self.hif.width, self.lanes):
            self.hit(*element_class(code, self.hif))
        inexact, saturated, nan = (
            word >> self.layout[name].offset & 1 for name in ("inexact", "saturated", "nan")
        )
        parts = ["saturated"] if saturated else ["inexact"] if inexact else []
        self.hit("flags of a beat", " and ".join(parts + ["nan"] * nan) or "none")
