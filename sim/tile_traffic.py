"""Tiles of :class:`rtl.sop_tile.SopTile`: beats at random, and what golden makes of them."""

import random
from typing import Any

import numpy as np
from amaranth.lib import data

from golden.activations import QuantizedActivations
from golden.kernel import matmul
from golden.tensor import QuantizedTensor
from rtl.layouts import tile_activations_layout, tile_outputs_layout, tile_weights_layout
from rtl.sop_tile import TileShape
from rtl.tile_units import tile_parameters
from sim.tile_codes import (
    element_code,
    fields_of,
    is_legal,
    packed,
    scale_code,
    signed,
    substitute,
)
from sim.tile_config import TileConfig

__all__ = ["Tile", "TileTraffic"]

Tile = dict[str, list[int]]
"""Payloads of both streams."""


class TileTraffic:
    """Beats of tiles, and the outputs that golden computes from them.

    Parameters
    ----------
    config : TileConfig
    """

    def __init__(self, config: TileConfig) -> None:
        self.config = config
        self.rng = random.Random(config.seed)
        self.weights, self.activations = config.weight_format, config.activation_format
        unit = tile_parameters(self.weights, self.activations)
        self.size = unit["block_size"]
        self.shape = TileShape(config.rows, config.columns, self.size)
        self.elements = {"i": unit["weight"], "i_activation": unit["activation"]}
        self.scales = {"i": unit["weight_scale"], "i_activation": unit["activation_scale"]}
        self.vectors = {"i": config.rows, "i_activation": config.columns}
        self.layouts: dict[str, data.StructLayout] = {
            "i": tile_weights_layout(
                rows=config.rows, element=unit["weight"], scale=unit["weight_scale"]
            ),
            "i_activation": tile_activations_layout(
                columns=config.columns, element=unit["activation"], scale=unit["activation_scale"]
            ),
            "o": tile_outputs_layout(units=self.shape.units),
        }

    def _codes(self, name: str, words: list[int], field: str) -> np.ndarray[Any, Any]:
        """Codes of a field, shape (beats, vectors)."""
        return np.array([fields_of(self.layouts[name], word, field) for word in words])

    def outputs(self, weights: list[int], activations: list[int]) -> list[int]:
        """Payloads that the beats of a tile give, as golden computes them."""
        layout = self.layouts["i"]
        parts: dict[str, list[np.ndarray[Any, Any]]] = {}
        reserved = False
        for name, words in (("i", weights), ("i_activation", activations)):
            parts[name] = []
            for field, fmt, used in (
                ("codes", self.elements[name], words),
                ("scales", self.scales[name], words[:: self.size]),
            ):
                codes = self._codes(name, used, field)
                reserved |= not all(is_legal(fmt, code) for code in set(codes.ravel().tolist()))
                legal = np.vectorize(lambda code, fmt=fmt: substitute(fmt, code))(codes)
                blocks = (self.vectors[name], -1, self.size) if field == "codes" else (-1,)
                parts[name].append(legal.T.reshape(*blocks) if field == "codes" else legal.T)
        columns = len(weights)
        offset, width = layout["layer_exponent"].offset, layout["layer_exponent"].width
        exponents = None
        if self.activations.has_token_exponents:
            codes = self._codes("i_activation", activations[:1], "token_exponents")[0]
            exponents = np.array([signed(int(code), 8) for code in codes], np.int16)
        result = matmul(
            QuantizedTensor(
                self.weights, (self.config.rows, columns), parts["i"][0].astype(np.uint8),
                parts["i"][1].astype(np.uint16), (),
                signed(weights[0] >> offset & (1 << width) - 1, width),
            ),
            QuantizedActivations(
                self.activations, (self.config.columns, columns),
                parts["i_activation"][0].astype(np.uint8),
                parts["i_activation"][1].astype(np.uint16), exponents,
            ),
        )  # fmt: skip
        words = []
        for step in range(self.shape.used):
            places = [self.shape.place(unit, step) for unit in range(self.shape.units)]
            word = packed(
                self.layouts["o"],
                values=[int(result.bits[place[1], place[0]]) if place else 0 for place in places],
                reserved=int(reserved),
                overflow=int(any(result.overflow[place[1], place[0]] for place in places if place)),
                last=int(step == self.shape.used - 1),
            )
            words.append(word)
        return words

    # --- traffic ----------------------------------------------------------------------------------

    def code(self, name: str, kind: int) -> int:
        """A legal code of an element."""
        return element_code(self.rng, self.elements[name], kind)

    def scale_code(self, name: str, kind: int) -> int:
        """A legal scale code."""
        return scale_code(self.rng, self.scales[name], kind)

    def random_tile(self, blocks: int, *, layer_exponent: int | None = None) -> Tile:
        """A tile with elements and scales of one kind for each block."""
        rng = self.rng
        exponent = (
            rng.choice((0, 0, rng.randint(-128, 127))) if layer_exponent is None else layer_exponent
        )
        tokens = [rng.choice((0, rng.randint(-20, 20))) for _ in range(self.config.columns)]
        beats: Tile = {"i": [], "i_activation": []}
        for _ in range(blocks):
            # Often both sides are extreme: the largest sums there are.
            kinds = {name: (rng.choice((0, 1, 2, 3, 3, 3)), rng.randrange(4)) for name in beats}
            for place in range(self.size):
                for name, (element, scale) in kinds.items():
                    # After the first beat of a block scales and exponents are not looked at,
                    # reserved ones included.
                    count, width = self.vectors[name], self.scales[name].width
                    fields: dict[str, Any] = {
                        "codes": [self.code(name, element) for _ in range(count)],
                        "scales": [
                            rng.getrandbits(width) if place else self.scale_code(name, scale)
                            for _ in range(count)
                        ],
                    }
                    if name == "i":
                        fields["layer_exponent"] = exponent if not place else rng.randint(-128, 127)
                    elif self.activations.has_token_exponents:
                        fields["token_exponents"] = tokens if not place else [0] * count
                    beats[name].append(packed(self.layouts[name], **fields))
        # Elsewhere than at the end of a block `last` is not looked at.
        last = self.layouts["i"]["last"].offset
        for number in range(len(beats["i"])):
            if number % self.size != self.size - 1:
                beats["i"][number] |= rng.getrandbits(1) << last
        beats["i"][-1] |= 1 << last
        return beats

    def legal(self, tile: Tile) -> Tile:
        """A tile of which any bits are made into one that golden takes."""
        result: Tile = {}
        for name, words in tile.items():
            layout = self.layouts[name]
            result[name] = []
            for number, word in enumerate(words):
                fields: dict[str, Any] = {
                    "codes": [substitute(self.elements[name], code)
                              for code in fields_of(layout, word, "codes")],
                    "scales": [substitute(self.scales[name], code)
                               for code in fields_of(layout, word, "scales")],
                }  # fmt: skip
                if name == "i":
                    # Of one tile; within the range of a tensor.
                    fields["layer_exponent"] = signed(words[0] & 0xFF, 8)
                    fields["last"] = int(number == len(words) - 1)
                elif self.activations.has_token_exponents:
                    first = fields_of(layout, words[0], "token_exponents")
                    fields["token_exponents"] = first
                result[name].append(packed(layout, **fields))
        return result
