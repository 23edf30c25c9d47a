"""Random tiles for :class:`rtl.tile_epilogue.TileEpilogue`."""

import random
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from golden.activations import decode_activations
from sim.tile_codes import element_code, fields_of, is_legal, packed, scale_code, substitute
from sim.tile_config import EpilogueConfig
from tb.tile_epilogue_model import EpilogueModel, Words

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["EpilogueTraffic"]

INFINITY = 0x7F800000


class EpilogueTraffic(EpilogueModel):
    """Tiles of every kind, and any bits made into such.

    Attributes
    ----------
    rng : random.Random
    """

    def __init__(self, config: EpilogueConfig) -> None:
        self.rng = random.Random(config.seed)
        super().__init__(config)

    def random_activations(self, blocks: int) -> list[int]:
        """Activations of a tile, codes and scales of one kind for each block."""
        rng, fmt, tokens = self.rng, self.activations, self.config.columns
        exponents = [rng.choice((0, rng.randint(-128, 127))) for _ in range(tokens)]
        words = []
        for block in range(blocks):
            element, scale = rng.choice((2, 3, 3)), rng.randrange(4)
            for place in range(self.size):
                fields: dict[str, Any] = {
                    "codes": [element_code(rng, fmt.element, element) for _ in range(tokens)],
                    "scales": [
                        # After the first beat of a block they do not count.
                        rng.getrandbits(fmt.scale.width)
                        if place
                        else scale_code(rng, fmt.scale, scale)
                        for _ in range(tokens)
                    ],
                    "last": int(block == blocks - 1 and place == self.size - 1),
                }
                if fmt.has_token_exponents:
                    fields["token_exponents"] = [0] * tokens if place else exponents
                words.append(packed(self.layouts["i_activation"], **fields))
        return words

    def random_float(self, bits: int, near: int = 127) -> int:
        """A finite float of so many bits: any, near one in size, subnormal, zero, or large."""
        rng, low = self.rng, bits - 9
        sign, mantissa = rng.getrandbits(1) << bits - 1, rng.getrandbits(low)
        exponent = rng.choice(
            (rng.randrange(255), near + rng.randint(-12, 12), near + rng.randint(-2, 2),
             0, 1, 253, 254)
        )  # fmt: skip
        mantissa = rng.choice((mantissa, mantissa, mantissa, 0, (1 << low) - 1))
        return sign | min(max(exponent, 0), 254) << low | mantissa

    def random_corrections(self, columns: list[int]) -> list[list[int]]:
        """Row, slot and value of corrections; of a row with ascending slots."""
        rng, rows = self.rng, self.config.rows
        density = rng.choice((0.05, 0.3, 0.9))
        chosen = [
            [slot for slot in range(len(columns)) if rng.random() < density] for _ in range(rows)
        ]
        entries = []
        if rng.getrandbits(1):  # rows take turns, as in the order of a tile
            order = [row for step in range(len(columns)) for row in range(rows)
                     if step < len(chosen[row])]  # fmt: skip
        else:
            order = [row for row in range(rows) for _ in chosen[row]]
            if rng.getrandbits(1):
                rng.shuffle(order)
        for row in order:
            entries.append([row, chosen[row].pop(0), self.random_float(16)])
        return entries

    def random_tile(self, blocks: int) -> Words:
        """A tile with sums that its corrections often cancel."""
        rng, channels = self.rng, blocks * self.size
        activations = self.random_activations(blocks)
        count = rng.choice((0, 1, rng.randint(0, min(self.config.slots, channels))))
        columns = sorted(rng.sample(range(channels), count))
        entries = self.random_corrections(columns)
        values = decode_activations(self.quantized(activations))
        sums = np.zeros((self.config.columns, self.config.rows), np.uint32)
        for token, row in np.ndindex(*sums.shape):
            sums[token, row] = self.random_float(32)
            if rng.random() < 0.02:
                sums[token, row] = INFINITY | rng.getrandbits(1) << 31
            mine = [entry for entry in entries if entry[0] == row]
            if mine and rng.random() < 0.4:
                value = np.array([mine[0][2] << 16], np.uint32).view(np.float32)
                with np.errstate(over="ignore", under="ignore"):
                    product = np.float32(value[0] * values[token, columns[mine[0][1]]])
                near = int(product.view(np.uint32)) ^ 1 << 31
                change = rng.choice((0, 0, 1, rng.getrandbits(8)))
                sums[token, row] = near if near & INFINITY == INFINITY else near ^ change
        one = 0x3F80
        kind = rng.randrange(3)
        scales = [one if not kind or (kind == 1 and rng.getrandbits(1)) else self.random_float(16)
                  for _ in range(self.config.rows)]  # fmt: skip
        return self.tile(sums, scales, activations, columns, entries)

    def tile(
        self, sums: NDArray[np.uint32], scales: list[int], activations: list[int],
        columns: list[int], entries: list[list[int]], *, reserved: int = 0,
    ) -> Words:  # fmt: skip
        """Payloads of a tile."""
        beats = []
        for step in range(self.shape.used):
            places = [self.shape.place(unit, step) for unit in range(self.shape.units)]
            values = [int(sums[to[1], to[0]]) if to else 0 for to in places]
            beats.append(
                packed(self.layouts["i"], values=values, reserved=reserved,
                       last=int(step == self.shape.used - 1))
            )  # fmt: skip
        tile = {
            "i": beats,
            "i_activation": activations,
            "i_column": [
                packed(self.layouts["i_column"], column=column) for column in columns
            ] or [self.empty("i_column")],
            "i_correction": [
                packed(self.layouts["i_correction"], row=row, slot=slot, value=value)
                for row, slot, value in entries
            ] or [self.empty("i_correction")],
        }  # fmt: skip
        for name in ("i_column", "i_correction"):
            tile[name][-1] |= 1 << self.layouts[name]["last"].offset
        if self.weights.row_scale:
            tile["i_row_scale"] = [packed(self.layouts["i_row_scale"], scales=scales)]
        return tile

    def empty(self, name: str) -> int:
        """A word that says that there is none; its other fields do not count."""
        layout = self.layouts[name]
        return self.rng.getrandbits(layout["empty"].offset) | packed(layout, empty=1)

    def tensors(self) -> "SearchStrategy[Any]":
        """Tiles as data: bits of sums, row scales, activations and columns, and corrections."""
        from hypothesis import strategies as st

        rows, columns, slots = self.config.rows, self.config.columns, self.config.slots

        def bits(width: int, count: int) -> "SearchStrategy[Any]":
            return st.lists(st.integers(0, (1 << width) - 1), min_size=count, max_size=count)

        def tile(blocks: int) -> "SearchStrategy[Any]":
            channels = blocks * self.size
            entry = st.tuples(
                st.integers(0, rows - 1), st.integers(0, slots - 1), st.integers(0, (1 << 16) - 1)
            )
            return st.fixed_dictionaries(
                {
                    "sums": bits(32, rows * columns),
                    "scales": bits(16, rows),
                    "activations": bits(self.layouts["i_activation"].size, channels),
                    "columns": st.sets(st.integers(0, channels - 1), max_size=slots).map(sorted),
                    "entries": st.lists(entry, max_size=12),
                }
            )

        return st.integers(1, 2).flatmap(tile)

    def legal(self, drawn: dict[str, Any]) -> Words:
        """A tile of which any bits are made into one that golden takes."""

        def finite(bits: int, width: int) -> int:
            top = 255 << width - 9
            return bits & ~(1 << width - 9) if bits & top == top else bits

        fmt, layout = self.activations, self.layouts["i_activation"]
        activations = []
        for number, word in enumerate(drawn["activations"]):
            fields: dict[str, Any] = {
                "codes": [
                    substitute(fmt.element, code) for code in fields_of(layout, word, "codes")
                ],
                "scales": [
                    code if is_legal(fmt.scale, code) else 0
                    for code in fields_of(layout, word, "scales")
                ],
                "last": int(number == len(drawn["activations"]) - 1),
            }
            if fmt.has_token_exponents:
                fields["token_exponents"] = fields_of(
                    layout, drawn["activations"][0], "token_exponents"
                )
            activations.append(packed(layout, **fields))
        columns = drawn["columns"]
        slots: dict[int, set[int]] = {}
        for row, slot, _ in drawn["entries"] if columns else ():
            slots.setdefault(row, set()).add(slot % len(columns))
        waiting = {row: sorted(numbers) for row, numbers in slots.items()}
        entries = [
            [row, waiting[row].pop(0), finite(value, 16)]
            for row, _, value in drawn["entries"]
            if waiting.get(row)
        ]
        sums = np.array([finite(bits, 32) for bits in drawn["sums"]], np.uint32)
        return self.tile(
            sums.reshape(self.config.columns, self.config.rows),
            [finite(bits, 16) for bits in drawn["scales"]], activations, columns, entries,
        )  # fmt: skip
