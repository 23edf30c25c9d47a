"""Which bins of :mod:`tb.coverage` the traffic of an epilogue hits."""

import itertools
from typing import TYPE_CHECKING

import numpy as np

from golden.activations import decode_activations
from golden.formats import BF16
from rtl.units import TILE_EPILOGUE
from sim.tile_codes import fields_of, is_legal
from tb.coverage import Counts
from tb.coverage_classes import float_class, result_class, sum_classes
from tb.unit_coverage import UnitCoverage

if TYPE_CHECKING:
    from tb.tile_epilogue_model import EpilogueModel, Words

__all__ = ["EpilogueCoverage"]

ZERO, INFINITY = 1 << 31, 0x7F800000


def _bits(value: np.float32) -> int:
    return int(np.float32(value).view(np.uint32))


class EpilogueCoverage(UnitCoverage):
    """Of :class:`rtl.tile_epilogue.TileEpilogue`; a tensor of the common bins is a tile.

    Follows every output through its steps, in NumPy's float32.
    """

    FLAGS = ("reserved", "overflow", "misplaced")

    def __init__(self, counts: Counts, bench: "EpilogueModel") -> None:
        self.bench = bench
        super().__init__(
            counts, TILE_EPILOGUE.name, bench.layouts["i"]["last"].offset,
            bench.layouts["o"]["last"].offset,
        )  # fmt: skip

    def forget(self) -> None:
        """Nothing is under way."""
        super().forget()
        self._seen: Words = {name: [] for name in self.bench.inputs}

    def on_transfer(self, stream: str, word: int) -> None:
        """Also whole tiles."""
        super().on_transfer(stream, word)
        if stream != "o":
            self._seen[stream].append(word)
            tile = self.bench.take_tile(self._seen)
            if tile is not None:
                self._count_tile(tile)

    def phases(self) -> list[str]:
        """Also whether activations of a tile are kept, or some of them."""
        return ["activations kept"] * bool(self._seen["i_activation"])

    def _count_tile(self, tile: "Words") -> None:
        bench = self.bench
        added, flags = bench.added(tile)
        for name, flag in flags.items():
            if flag:
                self.hit("correction", name)
        columns = len(bench.columns_of(tile["i_column"], len(tile["i_activation"]))[0])
        sizes = {0: "none", 1: "one", bench.config.slots: "as many as slots"}
        self.hit("columns of a tile", sizes.get(columns, "several"))
        self.hit("corrections of a tile", sizes[len(added)] if len(added) < 2 else "several")
        for (before, *_), (after, *_) in itertools.pairwise(added):
            kind = "the same" if before == after else "another"
            self.hit("rows of corrections that follow each other", kind)
        values = bench.sums_of(tile["i"]).copy()
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            self._count_row_scales(bench.row_scales(tile), values)
            activations = decode_activations(bench.quantized(tile["i_activation"]))
            for row, column, value in added:
                factor = np.array(value << 16, np.uint32).view(np.float32)[()]
                products = (activations[:, column] * factor).astype(np.float32)
                for token, product in enumerate(products):
                    values[token, row] = self._count_sum(values[token, row], product)

    def _count_row_scales(
        self, scales: list[int], values: "np.ndarray[tuple[int, int], np.dtype[np.float32]]"
    ) -> None:
        """Classes of row scales and of what they give; multiplies the sums."""
        for row, scale in enumerate(scales):
            self.hit("row scale", float_class(scale, BF16).replace("- reserved", "+ reserved"))
            if not is_legal(BF16, scale):
                continue
            factor = np.array(scale << 16, np.uint32).view(np.float32)[()]
            finite = np.isfinite(values[:, row])
            values[finite, row] *= factor
            values[~finite, row] = np.copysign(np.float32(np.inf), values[~finite, row]) * (
                np.copysign(np.float32(1), factor)
            )
            for value in values[:, row]:
                self.hit("sum times row scale", result_class(_bits(value), 23))

    def _count_sum(self, before: np.float32, product: np.float32) -> np.float32:
        """Classes of a product and of its addition; gives the sum."""
        first, second = _bits(before), _bits(product)
        self.hit("product", result_class(second, 23))
        if first & INFINITY == INFINITY:
            self.hit("correction", "of an infinity")
            return before
        if second & INFINITY == INFINITY:
            return product
        if first == second == ZERO:
            self.hit("correction", "of -0 and -0")
        for kind in sum_classes(first, second):
            self.hit("correction", kind)
        return np.float32(before + product)

    def on_output(self, word: int) -> None:
        """Classes of values, and flags."""
        layout, output = self.bench.layouts["o"], self.bench.config.output
        for bits in fields_of(layout, word, "values"):
            self.hit(f"{output} value", result_class(bits, 23 if output == "float32" else 7))
        flags = [name for name in self.FLAGS if word >> layout[name].offset & 1]
        for flag in flags or ["none"]:
            self.hit("flags of a beat", flag)
