"""Which bins of :mod:`tb.coverage` the traffic of a tile hits."""

from collections.abc import Mapping

from amaranth.lib import data

from golden.formats import FloatFormat, HifFormat, NumberFormat
from rtl.units import SOP_TILE
from tb.coverage import Counts
from tb.coverage_classes import element_class, float_class, result_class
from tb.unit_coverage import UnitCoverage

__all__ = ["TileCoverage"]


class TileCoverage(UnitCoverage):
    """Of :class:`rtl.sop_tile.SopTile`; a tensor of the common bins is a tile."""

    FLAGS = ("reserved", "overflow")

    def __init__(
        self, counts: Counts, size: int, layouts: Mapping[str, data.StructLayout],
        elements: Mapping[str, NumberFormat], scales: Mapping[str, FloatFormat],
    ) -> None:  # fmt: skip
        self.size, self.elements, self.scales = size, elements, scales
        self._layouts = layouts
        super().__init__(
            counts, SOP_TILE.name, layouts["i"]["last"].offset, layouts["o"]["last"].offset
        )

    def forget(self) -> None:
        """Nothing is under way."""
        super().forget()
        self._places = {"i": 0, "i_activation": 0}
        self._offered = False

    def on_clock(self, stream: str, valid: bool, ready: bool) -> None:
        """Also which of the two inputs waits for the other."""
        super().on_clock(stream, valid, ready)
        if stream == "i_activation":
            self._offered = valid
        elif stream == "i" and valid != self._offered:
            self.hit("input that waits", "weights" if valid else "activations")

    def on_transfer(self, stream: str, word: int) -> None:
        """Also classes of elements, and of scales where they count."""
        if stream in self._places:
            place, size = self._places[stream], self.size
            self._places[stream] = (place + 1) % size
            self._count_codes(stream, word, scales=not place)
            if stream == "i" and place != size - 1:  # where `last` means nothing
                word &= ~(1 << self._layouts["i"]["last"].offset)
        super().on_transfer(stream, word)

    def _count_codes(self, stream: str, word: int, *, scales: bool) -> None:
        element = self.elements[stream]
        for code in self._items(stream, "codes", word):
            group, bin_name = element_class(code, element)
            if not isinstance(element, HifFormat):  # whose group is the format
                group, _, bin_name = bin_name.partition(" ")
            self.hit(group, bin_name)
        if scales:
            fmt = self.scales[stream]
            for code in self._items(stream, "scales", word):
                group = "signed scale" if fmt.signed else "unsigned scale"
                self.hit(group, float_class(code, fmt))

    def _items(self, stream: str, field: str, word: int) -> list[int]:
        part = self._layouts[stream][field]
        width = part.width // part.shape.length
        items = word >> part.offset
        return [items >> place * width & (1 << width) - 1 for place in range(part.shape.length)]

    def on_last(self, beats: int) -> None:
        """Blocks of a tile."""
        self.hit("blocks of a tile", "one" if beats == self.size else "several")

    def on_output(self, word: int) -> None:
        """Classes of values, and flags."""
        for bits in self._items("o", "values", word):
            self.hit("output", result_class(bits, 23))
        flags = [name for name in self.FLAGS if word >> self._layouts["o"][name].offset & 1]
        for flag in flags or ["none"]:
            self.hit("flags of a beat", flag)
