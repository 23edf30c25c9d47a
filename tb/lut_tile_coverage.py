"""Which bins of :mod:`tb.coverage` the traffic of a tile with LUTs hits."""

from amaranth.lib import data

from rtl.layouts import lut_write_layout
from rtl.modes import Modes
from rtl.units import LUT_TILE
from sim.tile_codes import fields_of
from tb.coverage import Counts
from tb.unit_coverage import UnitCoverage

__all__ = ["LutTileCoverage"]


class LutTileCoverage(UnitCoverage):
    """Of :class:`rtl.lut_tile.LutTile`; a tensor of the common bins is a tile."""

    def __init__(
        self, counts: Counts, modes: Modes, size: int, indices: data.StructLayout,
        outputs: data.StructLayout,
    ) -> None:  # fmt: skip
        self.modes, self.size = modes, size
        self.indices, self.luts = indices, lut_write_layout(modes=modes)
        super().__init__(counts, LUT_TILE.name, indices["last"].offset, outputs["last"].offset)

    def forget(self) -> None:
        """Nothing is under way."""
        super().forget()
        self._place = self._tiles = self._writes = 0
        self._loaded: list[int] = []  # modes of the tensors whose LUTs were loaded

    def on_transfer(self, stream: str, word: int) -> None:
        """``last`` counts at the end of a block only."""
        if stream == "i_activation":
            return
        if stream == "i":
            first = not self._place
            self._place = (self._place + 1) % self.size
            if first:
                self._count_metabits(word)
            if self._place:
                word &= ~(1 << self.indices["last"].offset)
            elif word >> self.indices["last"].offset & 1:
                self._count_tile(word)
        super().on_transfer(stream, word)

    def _count_metabits(self, word: int) -> None:
        fmt = self.modes.formats[self._loaded[0]]
        if len(fmt.codebooks) == 2:
            width = fmt.word.scale.width
            words = fields_of(self.indices, word, "scale_words")
            metabits = {value >> width & 1 for value in words}
            self.hit(
                "metabits of a block", "mixed" if len(metabits) == 2 else f"all {metabits.pop()}"
            )

    def _count_tile(self, word: int) -> None:
        self._tiles += 1
        if word >> self.indices["last_tile"].offset & 1:
            self.hit("tiles of a tensor", "one" if self._tiles == 1 else "several")
            before = self._loaded.pop(0)
            self._tiles = 0
            if self._loaded:
                same = before == self._loaded[0]
                self.hit("format, then next format", "the same" if same else "another")

    def on_side(self, word: int) -> None:
        """One LUT write."""
        self._writes += 1
        if word >> self.luts["last"].offset & 1:
            self._writes, mode = 0, 0
            if self.modes.mode_bits:
                field = self.luts["mode"]
                mode = word >> field.offset & (1 << field.width) - 1
            self._loaded.append(mode)

    def phases(self) -> list[str]:
        """Also how far LUTs are."""
        waiting = len(self._loaded) - bool(self._beats or self._tiles) > 0
        return ["LUT load under way"] * bool(self._writes) + ["LUTs waiting"] * waiting
