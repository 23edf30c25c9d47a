"""Vectors of encoding: small weight matrices and the scale words and elements they become.

Only the one-pass scale modes are covered; they fix every bit without a search.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from golden.codebooks import Lut
from golden.convert import RoundingTable, format_table, level_table
from golden.errors import InputError
from golden.notation import QuantFormat
from golden.quantize import quantize
from golden.scaling import ScaleMode
from golden.tensor import QuantizedTensor
from golden.vectors.files import VectorFile, VectorStream, float32_bits, hex_strings, json_text
from golden.vectors.layers import describe_layer, vector_luts
from golden.vectors.near_ties import OTHER_PRODUCTS, OTHER_SUMS, NearTies

__all__ = ["block_file"]

Float64 = NDArray[np.float64]

_MAX_MIDPOINTS = 32  # of a wide atom; a codebook of 16 levels has 15
_SCALE_TIES = 16


def _spread(values: Float64, count: int) -> Float64:
    """Take at most ``count`` of the values, evenly spread, the first and the last among them."""
    count = min(count, len(values))
    return values[np.arange(count) * (len(values) - 1) // max(1, count - 1)]


@dataclass(frozen=True)
class _Matrices:
    """Weight matrices that reach each rule of the quantizer, for one format and scale mode."""

    fmt: QuantFormat
    mode: ScaleMode
    luts: tuple[Lut, ...]

    @cached_property
    def tables(self) -> list[RoundingTable]:
        """Levels of the elements, one table per LUT."""
        if self.fmt.atom is not None:
            return [format_table(self.fmt.atom)]
        return [level_table(lut.values) for lut in self.luts]

    @property
    def size(self) -> int:
        """Weights of a block; those of a row where the block is the whole tensor."""
        return self.fmt.block_size or 16

    def _stream(self, name: str) -> VectorStream:
        return VectorStream(f"blocks/{self.fmt.name}/{self.fmt.hif.name}/{name}")

    def _bell(self, name: str, rows: int, columns: int) -> Float64:
        return self._stream(name).bell(rows * columns).reshape(rows, columns)

    def _end(self, table: RoundingTable) -> float:
        """Extreme of a block for which the wanted scale is 1."""
        return table.large_end if self.mode is ScaleMode.ARGMAX else table.small_end

    def random(self, number: int) -> Float64:
        """Bell-shaped weights, last blocks padded."""
        return self._bell(f"random/{number}", 2, 2 * self.size + 3)

    def one_nonzero(self) -> Float64:
        """Blocks with a single weight, of either sign, between blocks of zeros."""
        weights = np.zeros((2, 2 * self.size + 1))
        weights[0, self.size + 2], weights[1, 3] = 0.37, -0.37
        return weights

    def zeros(self) -> Float64:
        """Zeros of both signs."""
        weights = np.zeros((1, 2 * self.size))
        weights[0, 1::2] = -0.0
        return weights

    def equal_magnitudes(self) -> Float64:
        """Extremes of both signs in one block: the first one counts."""
        words = self._stream("equal_magnitudes").words(4 * self.size)
        return np.where(words & 1, -0.75, 0.75).reshape(2, -1)

    def equal_errors(self) -> Float64:
        """Under scale 1, levels that all LUTs share, so that none has an error: metabit 0."""
        end = self._end(self.tables[0])
        shared = [
            value
            for value in self.tables[0].values.tolist()
            if abs(value) <= abs(end) and all(value in table.values for table in self.tables)
        ]
        row = np.resize(np.array([end, *shared]), 2 * self.size)
        row[0 :: self.size] = end
        return row[None, :]

    def element_ties(self) -> Float64:
        """Under scale 1, midpoints of neighbouring levels and the float32 numbers beside them."""
        rows = []
        for table in self.tables:
            end = self._end(table)
            middles = (table.values[:-1] + table.values[1:]) / 2
            middles = middles[np.abs(middles) < abs(end)]
            exact = _spread(middles, _MAX_MIDPOINTS).astype(np.float32)
            up, down = np.float32(np.inf), np.float32(-np.inf)
            hard = np.stack([exact, np.nextafter(exact, up), np.nextafter(exact, down)], axis=1)
            blocks = -(-hard.size // (self.size - 1))
            inside = np.zeros((blocks, self.size - 1))
            inside.reshape(-1)[: hard.size] = hard.reshape(-1)
            rows.append(np.insert(inside, 0, end, axis=1))
        return np.concatenate(rows)

    def scale_ties(self) -> Float64:
        """Blocks whose wanted scale is a midpoint of two scale codes; layer exponent 0."""
        scale = self.fmt.word.scale
        table = format_table(scale)
        middles = (table.values[:-1] + table.values[1:]) / 2
        if self.mode is ScaleMode.ABSMAX:
            middles = middles[middles > 0]
        # The largest weight that needs no layer exponent; BF16 and UE8M0 never have one.
        largest = min(table.small_end for table in self.tables) * float(scale.max_value)
        largest = min(largest, 2.0**100)
        wanted = middles * self._end(self.tables[0])
        wanted = wanted[(np.abs(wanted) >= 2.0**-100) & (np.abs(wanted) <= largest)]
        extremes = np.append(largest, _spread(wanted, _SCALE_TIES))
        half = np.abs(extremes[:, None]) / 2.0
        inside = self._bell("scale_ties", len(extremes), self.size) * half
        inside[:, 0] = extremes
        return inside

    def small_blocks(self) -> Float64:
        """A usual block, one whose scale would round to 0, and one of float32 subnormals."""
        row = self._bell("small_blocks", 1, 3 * self.size)
        row[:, self.size : 2 * self.size] *= 2.0**-60
        row[:, 2 * self.size :] *= 2.0**-130
        return row

    def decay(self) -> Float64:
        """Rows that run from the top of the scale format down into its subnormals."""
        return self._bell("decay", 8, self.size) * np.ldexp(1.0, -6 * np.arange(8))[:, None]

    def narrow(self) -> Float64:
        """Fewer columns than a block has weights."""
        return self._bell("narrow", 3, 3)

    def only_subnormal(self) -> Float64:
        """Float32 subnormals alone; refused where dense values would be subnormal too."""
        return self._bell("only_subnormal", 1, self.size) * 2.0**-130

    def beyond_largest(self) -> Float64:
        """Right above what the largest scale without layer exponent covers: f is 1."""
        scale = self.fmt.word.scale
        largest = min(table.small_end for table in self.tables) * float(scale.max_value)
        inside = self._bell("beyond_largest", 2, self.size) / 4.0 * largest
        inside[0, 0] = np.nextafter(np.float32(largest), np.float32(np.inf))
        return inside

    def padding_alone(self) -> Iterator[tuple[str, Float64, None]]:
        """Yield a matrix that only its padding makes unfit, and the same one without padding.

        Under the scale 2^-128 the ends of the levels are normal float32 numbers, those around zero
        are not. Nothing where a level is zero, or where there is no such scale.
        """
        scale, size = self.fmt.word.scale, self.size
        exponent = 0 if scale.exponent_bits == 8 else -128 - scale.min_exponent
        small_end = min(table.small_end for table in self.tables)
        usual = small_end * min(float(scale.max_value), 2.0**100) * 2.0**exponent
        weights = np.full((1, 2 * size + 1), self._end(self.tables[0]) * 2.0**-128)
        weights[0, 0] = usual
        weights[0, 1:size] = 0.0
        alone, whole = weights, weights[:, : 2 * size]
        if self.encode(alone, None) is None and self.encode(whole, None) is not None:
            yield "padding_alone", alone, None
            yield "padding_alone_without", whole, None

    def orders(self) -> Iterator[tuple[str, Float64, Float64]]:
        """Yield blocks whose metabit is another one where sums or products take another order."""
        ties = NearTies(self.tables, self.fmt.word.scale, self.mode, self.size)
        seed = f"blocks/{self.fmt.name}/{self.fmt.hif.name}/{self.mode.value}"
        sums = [(add, None) for add in OTHER_SUMS.values()]
        products = [(None, times) for times in OTHER_PRODUCTS.values()]
        weights, norms = ties.blocks(f"{seed}/sum_order", sums)
        yield "sum_order", weights[None, :], norms
        weights, norms = ties.blocks(f"{seed}/product_order", products)
        yield "product_order", weights[None, :], norms

    def encode(self, weights: Float64, norms: Float64 | None) -> QuantizedTensor | None:
        """What the matrix becomes; None if the format cannot hold it."""
        try:
            return quantize(
                weights.astype(np.float32),
                self.fmt,
                mode=self.mode,
                luts=self.luts,
                channel_norms=norms,
            )
        except InputError:
            return None

    def all(self, random_count: int) -> Iterator[tuple[str, Float64, Float64 | None]]:
        """Yield (case name, weights, channel norms)."""
        for number in range(random_count):
            weights = self.random(number)
            yield f"random_{number}", weights, None
            draws = self._stream(f"norms/{number}").words(weights.shape[1])
            yield f"random_norms_{number}", weights, (1 + draws % 16) / 4.0
        for make in (
            self.one_nonzero, self.zeros, self.equal_magnitudes, self.equal_errors,
            self.element_ties, self.scale_ties, self.small_blocks, self.decay, self.narrow,
            self.only_subnormal,
        ):  # fmt: skip
            yield make.__name__, make(), None
        if self.fmt.word.scale.exponent_bits < 8:
            yield "beyond_largest", self.beyond_largest(), None
        yield from self.padding_alone()
        if len(self.luts) == 2:
            yield from self.orders()


def _case(
    matrices: _Matrices, name: str, weights: Float64, norms: Float64 | None
) -> dict[str, Any]:
    case = {
        "name": name,
        "mode": matrices.mode.value,
        "rows": weights.shape[0],
        "columns": weights.shape[1],
        "weights": hex_strings(float32_bits(weights), 32),
        "channel_norms": None if norms is None else hex_strings(norms.view(np.uint64), 64),
    }
    tensor = matrices.encode(weights, norms)
    if tensor is None:
        return case | {"refused": True}
    return case | {
        "refused": False,
        "layer_exponent": tensor.layer_exponent,
        "scale_words": tensor.scale_words.reshape(-1).tolist(),
        "elements": tensor.indices.reshape(-1).tolist(),
    }


def block_file(fmt: QuantFormat, *, random_count: int) -> VectorFile:
    """Encodings of small matrices in every one-pass scale mode that the format has.

    Parameters
    ----------
    fmt : QuantFormat
        Without row scales.
    random_count : int
        Random matrices, each also with channel norms; the directed ones are the same in every set.
    """
    modes = [ScaleMode.ABSMAX, *([ScaleMode.ARGMAX] if fmt.word.scale.signed else [])]
    luts = vector_luts(fmt)
    cases = []
    for mode in modes:
        matrices = _Matrices(fmt, mode, luts)
        for name, weights, norms in matrices.all(random_count):
            cases.append(_case(matrices, name, weights, norms))
    document = {**describe_layer(fmt), "luts": [list(lut.codes) for lut in luts], "cases": cases}
    return VectorFile(json_text(document), len(cases))
