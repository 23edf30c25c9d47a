"""What comes out of :class:`rtl.tile_epilogue.TileEpilogue`, as golden has it.

No simulator here: benches call the methods with what their monitors saw on the pins.
"""

from dataclasses import dataclass, replace

import numpy as np
from amaranth.lib import data
from numpy.typing import NDArray

from golden.activations import QuantizedActivations
from golden.corrections import Corrections, column_dtype
from golden.formats import BF16
from golden.kernel import finish
from golden.notation import QuantFormat
from golden.quantize import resolve_luts
from golden.tensor import QuantizedTensor
from rtl.layouts import (
    column_layout,
    epilogue_activations_layout,
    epilogue_outputs_layout,
    tile_correction_layout,
    tile_outputs_layout,
    tile_row_scales_layout,
)
from rtl.tile_banks import EpilogueShape
from rtl.units import FLOAT_LAYOUTS
from sim.tile_codes import fields_of, is_legal, packed, signed
from sim.tile_config import EpilogueConfig

__all__ = ["EpilogueModel", "Words"]

Words = dict[str, list[int]]
"""Payloads of every stream for one tile."""


@dataclass(frozen=True)
class Entry:
    """One correction as the hardware sees it."""

    row: int
    slot: int
    value: int
    empty: bool
    last: bool


class EpilogueModel:
    """The reference, :func:`golden.kernel.finish`, and before it which corrections are added.

    Parameters
    ----------
    config : EpilogueConfig

    Attributes
    ----------
    layouts : dict of str to data.StructLayout
        Payload of every stream; ``o`` is the last.
    inputs : tuple of str
        All but ``o``.
    """

    def __init__(self, config: EpilogueConfig) -> None:
        self.config = config
        (self.weights,) = config.formats
        self.activations = config.activation_format
        self.size = self.weights.block_size
        self.shape = EpilogueShape(config.rows, config.columns, self.size)
        self.layouts: dict[str, data.StructLayout] = {
            "i": tile_outputs_layout(units=self.shape.units),
            "i_row_scale": tile_row_scales_layout(rows=config.rows),
            "i_activation": epilogue_activations_layout(
                columns=config.columns,
                element=self.activations.element,
                scale=self.activations.scale,
            ),
            "i_column": column_layout(),
            "i_correction": tile_correction_layout(rows=config.rows, slots=config.slots),
            "o": epilogue_outputs_layout(
                units=self.shape.units, float_layout=FLOAT_LAYOUTS[config.output]
            ),
        }
        if not self.weights.row_scale:
            del self.layouts["i_row_scale"]
        self.inputs = tuple(name for name in self.layouts if name != "o")

    def field(self, name: str, word: int, field: str) -> int:
        """A field of a payload, unsigned."""
        part = self.layouts[name][field]
        return word >> part.offset & (1 << part.width) - 1

    def entry(self, word: int) -> Entry:
        """A payload of ``i_correction``."""
        row, slot, value = (
            self.field("i_correction", word, name) for name in ("row", "slot", "value")
        )
        empty, last = (bool(self.field("i_correction", word, name)) for name in ("empty", "last"))
        return Entry(row, slot, value, empty, last)

    def take_tile(self, seen: Words) -> Words | None:
        """The words of the first tile, if all are there; those of later ones stay."""
        tile = {name: self._first_tile(name, words) for name, words in seen.items()}
        if not all(tile.values()):
            return None
        for name, words in tile.items():
            del seen[name][: len(words)]
        return tile

    def _first_tile(self, name: str, words: list[int]) -> list[int]:
        if name in ("i", "i_row_scale"):
            count = self.shape.used if name == "i" else 1
            return words[:count] if len(words) >= count else []
        for number, word in enumerate(words):
            if self.field(name, word, "last"):
                return words[: number + 1]
        return []

    def columns_of(self, words: list[int], channels: int) -> tuple[list[int], bool]:
        """Channels that are kept, in the order of their slots, and whether others are dropped."""
        kept: list[int] = []
        wrong, place = False, 0
        for word in words:
            column = self.field("i_column", word, "column")
            if self.field("i_column", word, "empty"):
                continue
            # What is not there when its turn comes holds up all that follow.
            if not place <= column < channels:
                return kept, True
            place = column + 1
            if len(kept) < self.config.slots:
                kept.append(column)
            else:
                wrong = True
        return kept, wrong

    def quantized(self, words: list[int]) -> QuantizedActivations:
        """Activations of a tile."""
        tokens, channels = self.config.columns, len(words)
        layout = self.layouts["i_activation"]
        codes = np.array([fields_of(layout, word, "codes") for word in words], np.uint8)
        scales = [fields_of(layout, word, "scales") for word in words[:: self.size]]
        exponents = None
        if self.activations.has_token_exponents:
            first = fields_of(layout, words[0], "token_exponents")
            exponents = np.array([signed(code, 8) for code in first], np.int16)
        return QuantizedActivations(
            replace(self.activations, block_size=self.size), (tokens, channels),
            codes.T.reshape(tokens, -1, self.size).copy(),
            np.array(scales, np.uint16).T.copy(), exponents,
        )  # fmt: skip

    def sums_of(self, words: list[int]) -> NDArray[np.float32]:
        """Sums of a tile, shape (tokens, rows)."""
        sums = np.zeros((self.config.columns, self.config.rows), np.uint32)
        for step, word in enumerate(words):
            for unit, value in enumerate(fields_of(self.layouts["i"], word, "values")):
                place = self.shape.place(unit, step)
                if place is not None:
                    sums[place[1], place[0]] = value
        return sums.view(np.float32)

    def tensor(self, channels: int, row_scales: list[int]) -> QuantizedTensor:
        """Weights of which only shape and row scales count."""
        fmt: QuantFormat = self.weights
        blocks = channels // self.size
        finite = [scale if is_legal(BF16, scale) else 0 for scale in row_scales]
        return QuantizedTensor(
            fmt, (self.config.rows, channels),
            np.zeros((self.config.rows, blocks, self.size), np.uint8),
            np.zeros((self.config.rows, blocks), np.uint16), resolve_luts(fmt), 0,
            np.array(finite, np.uint16) if fmt.row_scale else None,
        )  # fmt: skip

    def added(self, tile: Words) -> tuple[list[tuple[int, int, int]], dict[str, bool]]:
        """Row, column and value of the corrections that are added, and flags of dropped ones."""
        columns, wrong = self.columns_of(tile["i_column"], len(tile["i_activation"]))
        flags = {"misplaced": wrong, "reserved": False}
        added = []
        for entry in map(self.entry, tile["i_correction"]):
            if entry.empty:
                continue
            if entry.row >= self.config.rows or entry.slot >= len(columns):
                flags["misplaced"] = True
            elif not is_legal(BF16, entry.value):
                flags["reserved"] = True
            else:
                added.append((entry.row, columns[entry.slot], entry.value))
        return added, flags

    def row_scales(self, tile: Words) -> list[int]:
        """Row scales of a tile, if there are any."""
        if not self.weights.row_scale:
            return []
        return fields_of(self.layouts["i_row_scale"], tile["i_row_scale"][0], "scales")

    def outputs(self, tile: Words) -> list[int]:
        """Payloads that come out for a tile, as golden computes them."""
        activations = self.quantized(tile["i_activation"])
        added, flags = self.added(tile)
        row_scales = self.row_scales(tile)
        flags["reserved"] |= any(
            self.field("i", word, "reserved") for word in tile["i"]
        ) or not all(is_legal(BF16, scale) for scale in row_scales)
        shape = self.config.rows, activations.shape[1]
        by_row = sorted(added, key=lambda item: item[0])  # stable: in the order of their coming
        counts = np.bincount([row for row, _, _ in added], minlength=shape[0])
        corrections = Corrections(
            shape, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            np.array([column for _, column, _ in by_row], column_dtype(shape[1])),
            np.array([value for _, _, value in by_row], np.uint16),
        )  # fmt: skip
        result = finish(
            self.sums_of(tile["i"]), self.tensor(shape[1], row_scales), activations,
            corrections if added else None, output=self.config.output,
        )  # fmt: skip
        words = []
        for step in range(self.shape.used):
            places = [self.shape.place(unit, step) for unit in range(self.shape.units)]
            words.append(
                packed(
                    self.layouts["o"],
                    values=[int(result.bits[to[1], to[0]]) if to else 0 for to in places],
                    overflow=int(any(result.overflow[to[1], to[0]] for to in places if to)),
                    last=int(step == self.shape.used - 1),
                    **{name: int(flag) for name, flag in flags.items()},
                )
            )
        return words
