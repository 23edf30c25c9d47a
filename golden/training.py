"""Codebooks trained per layer: DD4 [paper: the name and the Lloyd iterations], DD5 and DD6 (ours).

Training alternates two steps on a sample of the layer's blocks, as Lloyd's algorithm does, and ends
with a descent on the HIF grid:

1. every block takes the LUT and the scale with the least error (:mod:`golden.search`);
2. for those choices each LUT is replaced by the best one there is. Midpoints between HIF values lie
   on half-integers, so the weighted moments of the normalised weights between half-integers tell
   the exact error of any LUT, and a dynamic program over the grid finds the optimum;
3. when that gains nothing more, single entries are moved to the neighbouring grid value as long as
   the error, with all scales and metabits chosen anew, falls. The alternation alone stops early,
   because on a coarse grid no entry moves unless the scales move with it.

Sums are running sums in block order (:func:`numpy.bincount`, :func:`numpy.cumsum`); ties keep what
was there before, or the lower entry. The result depends on nothing but the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from golden.codebooks import Lut
from golden.convert import encode_array, level_table
from golden.engine import inner_loop
from golden.formats import HIF7, HifFormat
from golden.quantize import ScaledLayer
from golden.scaling import BlockEncoding
from golden.search import NormalizedChunk, ScaleSearch

__all__ = [
    "START_LEVELS",
    "Training",
    "TrainingSample",
    "best_start",
    "initial_levels",
    "optimal_levels",
    "start_levels",
    "train_codebooks",
]

Float64 = NDArray[np.float64]
Levels = NDArray[np.int64]

# How much steeper the starting levels get from the middle to the ends.
_CURVATURE = 0.25


START_LEVELS: dict[tuple[str, int, int], dict[str, tuple[tuple[int, ...], ...]]] = {
    ("HIF7", 16, 1): {
        "normal": (
            (
                -120, -96, -80, -64, -48, -36, -22, -9, 3, 16, 30, 44, 56, 72, 88, 120,
            ),
        ),
    },
    ("HIF7", 16, 2): {
        "normal": (
            (
                -128, -104, -88, -72, -52, -36, -24, -11, 1, 13, 26, 40, 56, 72, 88, 112,
            ),
            (
                -120, -96, -72, -56, -44, -32, -20, -8, 3, 14, 24, 36, 48, 64, 80, 120,
            ),
        ),
    },
    ("HIF8T", 16, 2): {
        "normal": (
            (
                -256, -216, -176, -136, -100, -72, -46, -21, 3, 27, 50, 76, 104, 136, 168, 208,
            ),
            (
                -256, -184, -144, -112, -84, -60, -38, -15, 7, 28, 50, 72, 100, 128, 160, 248,
            ),
        ),
    },
    ("HIF8T", 32, 1): {
        "normal": (
            (
                -256, -240, -216, -192, -168, -152, -136, -120, -104, -88, -76, -62, -48, -36,
                -23, -10, 3, 16, 29, 42, 54, 68, 80, 96, 112, 128, 144, 160, 176, 192, 216, 248,
            ),
        ),
    },
    ("HIF8T", 32, 2): {
        "normal": (
            (
                -256, -240, -216, -192, -168, -152, -136, -120, -104, -88, -76, -62, -48, -36,
                -24, -11, 2, 14, 27, 40, 52, 64, 80, 92, 104, 120, 136, 152, 168, 184, 208, 248,
            ),
            (
                -256, -240, -200, -176, -160, -144, -128, -112, -96, -84, -72, -58, -44, -32,
                -19, -7, 5, 18, 30, 42, 54, 68, 80, 96, 116, 136, 152, 168, 184, 200, 216, 248,
            ),
        ),
    },
    ("HIF8T", 64, 1): {
        "normal": (
            (
                -256, -248, -240, -232, -216, -200, -192, -176, -168, -160, -152, -144, -136,
                -128, -120, -112, -104, -100, -92, -84, -76, -68, -62, -56, -50, -44, -38, -31,
                -24, -18, -11, -5, 2, 8, 14, 20, 27, 34, 40, 46, 52, 58, 64, 72, 80, 84, 92,
                100, 108, 116, 124, 136, 144, 152, 160, 168, 176, 184, 192, 208, 216, 232, 240,
                248,
            ),
        ),
    },
    ("HIF8T", 64, 2): {
        "normal": (
            (
                -256, -248, -240, -224, -208, -200, -192, -176, -168, -160, -152, -144, -136,
                -128, -120, -112, -108, -100, -92, -84, -76, -68, -62, -56, -50, -44, -38, -31,
                -25, -19, -12, -6, 1, 7, 14, 20, 27, 34, 40, 46, 52, 58, 64, 72, 80, 84, 92,
                100, 108, 116, 124, 136, 144, 152, 160, 168, 176, 184, 192, 200, 216, 232, 240,
                248,
            ),
            (
                -256, -248, -232, -224, -208, -200, -184, -176, -168, -160, -152, -144, -136,
                -124, -116, -108, -100, -96, -88, -80, -72, -68, -62, -56, -48, -42, -36, -30,
                -23, -16, -10, -3, 4, 10, 16, 22, 29, 36, 42, 50, 56, 62, 68, 76, 84, 88, 96,
                104, 112, 120, 128, 136, 144, 152, 160, 168, 176, 184, 200, 216, 224, 232, 240,
                248,
            ),
        ),
    },
}  # fmt: skip
"""Levels trained on random deviates, by HIF format, entries and number of LUTs, then by family of
deviates; computed by scripts/train_start_levels.py."""


@dataclass(frozen=True)
class Training:
    """How much work training may do.

    Attributes
    ----------
    blocks : int
        Blocks of the sample, evenly spaced over the layer.
    rounds : int
        Most alternations of scales and levels.
    sweeps : int
        Most sweeps of the descent over all entries.
    least_gain : float
        A round or sweep that lowers the error by a smaller share ends its phase.
    partners : int
        How many fixed codebooks get a trained partner of their own, besides the pair that is
        trained together.
    """

    blocks: int = 8192
    rounds: int = 2
    sweeps: int = 2
    least_gain: float = 1e-3
    partners: int = 0


class TrainingSample:
    """Evenly spaced blocks of a layer, prepared for many searches.

    Parameters
    ----------
    layer : ScaledLayer
    count : int
        Blocks to take; all of them if the layer has no more.
    levels : int
        Entries of the LUTs to be trained.
    """

    def __init__(self, layer: ScaledLayer, count: int, levels: int) -> None:
        total = len(layer.blocks)
        members = np.arange(min(count, total), dtype=np.intp) * total // min(count, total)
        # Half the cells of an encoding: every move of the descent makes the tables anew.
        self.cells = 2048 if levels <= 16 else 4096
        self.scale = layer.scale
        step = 2048
        self.chunks: list[NormalizedChunk] = [
            layer.chunk(members[start : start + step], self.cells)
            for start in range(0, len(members), step)
        ]

    def rank(self, levels: Levels) -> BlockEncoding:
        """Scale code and tabulated error of every block of the sample."""
        search = ScaleSearch(level_table(levels), self.scale, self.cells)
        return BlockEncoding.join([search.rank(chunk) for chunk in self.chunks])


@dataclass(frozen=True, eq=False)
class _Moments:
    """Running sums of weight, weight * t and weight * t**2 over half-integer cells of t.

    ``sums[:, i]`` covers all t with ``ceil(2 * t) <= i - limit - 1``.
    """

    sums: Float64
    limit: int

    def cost(self, low: NDArray[np.int64], high: NDArray[np.int64], level: Levels) -> Float64:
        """Weighted squared distance to ``level`` of all t with ``low < 2 * t <= high``."""
        part = self.sums[:, high + self.limit + 1] - self.sums[:, low + self.limit + 1]
        return part[2] - 2.0 * level * part[1] + (level * level) * part[0]


def _moments(
    sample: TrainingSample, codes: NDArray[np.uint16], members: NDArray[np.bool_], full_scale: int
) -> _Moments:
    limit = 2 * full_scale + 2
    sums = np.zeros((3, 2 * limit + 1))
    start = 0
    rounder_values = _scale_values(sample)
    for chunk in sample.chunks:
        stop = start + len(chunk)
        used = members[start:stop] & ~chunk.is_zero
        scales = rounder_values[codes[start:stop][used]] * chunk.multipliers[used]
        weights = None if chunk.weights is None else chunk.weights[:, used]
        sums += cell_sums(chunk.blocks[:, used], scales, weights, limit)
        start = stop
    return _Moments(np.concatenate([np.zeros((3, 1)), np.cumsum(sums, axis=1)], axis=1), limit)


@inner_loop
def cell_sums(blocks: Float64, scales: Float64, weights: Float64 | None, limit: int) -> Float64:
    """Sums of weight, weight * t and weight * t**2 in each half-integer cell of t.

    Parameters
    ----------
    blocks : float64 array, shape (block_size, blocks)
    scales : float64 array, shape (blocks,)
        t is a block's element over its scale; its weight is the squared scale,
    weights : float64 array, shape (block_size, blocks), or None
        times the element's error weight.
    limit : int
        ``ceil(2 * t)`` is clipped to this magnitude.

    Returns
    -------
    sums : float64 array, shape (3, 2 * limit + 1)
        Added in the order of memory.
    """
    quotients = blocks / scales
    cells = np.clip(np.ceil(2.0 * quotients), -limit, limit).astype(np.intp) + limit
    power = np.broadcast_to(scales * scales, quotients.shape)
    if weights is not None:
        power = power * weights
    return np.array(
        [
            np.bincount(cells.ravel(), terms.ravel(), minlength=2 * limit + 1)
            for terms in (power, power * quotients, power * quotients**2)
        ]
    )


def _scale_values(sample: TrainingSample) -> Float64:
    """Value of every scale code."""
    scale = sample.scale
    values = np.zeros(1 << scale.width)
    for value, code in scale.canonical.items():
        values[code] = float(value)
    return values


def optimal_levels(moments: _Moments, grid: Levels, count: int) -> Levels:
    """The ``count`` grid values with the least weighted squared error, by dynamic programming.

    Parameters
    ----------
    moments : _Moments
        Of the normalised weights, cells of half-integers.
    grid : int64 array, shape (values,)
        Ascending integers to choose from.
    count : int
        How many to choose.

    Returns
    -------
    levels : int64 array, shape (count,)
        Ascending. Of equally good predecessors the lower wins.
    """
    low, high = grid[:, None], grid[None, :]
    between = np.full((len(grid), len(grid)), np.inf)
    below, above = np.nonzero(low < high)
    first, second = grid[below], grid[above]
    middle = first + second  # twice the midpoint; a tie goes to the lower level
    between[below, above] = moments.cost(2 * first, middle, first) + moments.cost(
        middle, 2 * second, second
    )
    limit = np.full(len(grid), moments.limit)
    best = moments.cost(-limit - 1, 2 * grid, grid)
    choices = []
    for _ in range(count - 1):
        best, choice = best_predecessors(best, between)
        choices.append(choice)
    position = int((best + moments.cost(2 * grid, limit, grid)).argmin())
    chosen = [position]
    for choice in reversed(choices):
        position = int(choice[position])
        chosen.append(position)
    return grid[chosen[::-1]]


@inner_loop
def best_predecessors(best: Float64, between: Float64) -> tuple[Float64, NDArray[np.intp]]:
    """Least ``best[i] + between[i, j]`` of each j, shape (values,), and the lowest such i."""
    totals = best[:, None] + between
    choice = totals.argmin(axis=0)
    return totals[choice, np.arange(len(best))], choice


def initial_levels(hif: HifFormat, count: int, offset: float) -> Levels:
    """Starting levels: evenly spaced near zero and wider towards the ends, on the HIF grid.

    Parameters
    ----------
    hif : HifFormat
    count : int
        Levels, at most the distinct values of ``hif``.
    offset : float
        Shift of all levels in steps, 0 (a level at zero) to 0.5.
    """
    grid = _grid(hif)
    k = (np.arange(count) - count // 2 + offset) / (count // 2)
    wanted = k * (1.0 + _CURVATURE * k * k) / (1.0 + _CURVATURE) * hif.full_scale
    position = level_table(grid).nearest_index(wanted)
    # Where several fall on one grid value, the next ones up are taken, as far as there are any.
    position = np.maximum.accumulate(position - np.arange(count)) + np.arange(count)
    return grid[np.minimum(position, len(grid) - count + np.arange(count))]


def start_levels(hif: HifFormat, count: int, luts: int) -> list[list[Levels]]:
    """Where the training of one LUT or of a pair may start: :func:`best_start` picks one.

    Levels trained on random deviates where there are any for that format (START_LEVELS), else those
    of HIF7 if this format has them too, else :func:`initial_levels`; those of a pair interleave.
    """
    for coarse in (hif, HIF7):
        # A finer grid with the same number of shifts holds all values of HIF7, doubled.
        families = START_LEVELS.get((coarse.name, count, luts), {}).values()
        ratio = hif.full_scale // coarse.full_scale
        values = {value * ratio for family in families for levels in family for value in levels}
        if values and values <= hif.canonical.keys():
            return [
                [np.array(levels, dtype=np.int64) * ratio for levels in family]
                for family in families
            ]
    return [[initial_levels(hif, count, number / luts) for number in range(luts)]]


def best_start(sample: TrainingSample, starts: Sequence[Sequence[Levels]]) -> Sequence[Levels]:
    """The start with the least tabulated error of the sample, the first among equals."""
    if len(starts) == 1:
        return starts[0]
    return min(starts, key=lambda start: _Trainer(sample, start, (), np.empty(0, np.int64)).total())


def _grid(hif: HifFormat) -> Levels:
    return np.array([int(value) for value in hif.canonical], dtype=np.int64)


def _lut(levels: Levels, hif: HifFormat) -> Lut:
    return Lut(hif, tuple(int(code) for code in encode_array(levels, hif)))


class _Trainer:
    """Levels of one or two LUTs under training, with the error of each block under each."""

    def __init__(
        self,
        sample: TrainingSample,
        levels: Sequence[Levels],
        trained: Sequence[bool],
        grid: Levels,
    ) -> None:
        self.sample = sample
        self.levels = [np.asarray(one) for one in levels]
        self.trained = trained
        self.grid = grid
        self.encodings = [sample.rank(one) for one in self.levels]

    def total(self, replaced: int = -1, errors: Float64 | None = None) -> float:
        """Error of the sample, optionally with other errors under one LUT."""
        parts = [
            errors if number == replaced and errors is not None else encoding.errors
            for number, encoding in enumerate(self.encodings)
        ]
        return float(np.cumsum(np.minimum.reduce(parts))[-1])

    def alternate(self) -> None:
        """Replace every trained LUT by the best for the scales and metabits as they are."""
        second = np.zeros(len(self.encodings[0].errors), dtype=bool)
        if len(self.levels) == 2:
            second = self.encodings[1].errors < self.encodings[0].errors
        for number, trained in enumerate(self.trained):
            members = second == bool(number)
            if trained and members.any():
                codes = self.encodings[number].scale_codes
                full_scale = int(-self.grid[0])
                moments = _moments(self.sample, codes, members, full_scale)
                levels = optimal_levels(moments, self.grid, len(self.levels[number]))
                if levels[0] < 0 < levels[-1]:
                    self.levels[number] = levels
                    self.encodings[number] = self.sample.rank(levels)

    def descend(self) -> None:
        """Move every entry of the trained LUTs along the grid as long as the error falls."""
        total = self.total()
        for number, trained in enumerate(self.trained):
            for entry in range(len(self.levels[number]) if trained else 0):
                for step in (1, -1):
                    while (moved := self._moved(number, entry, step)) is not None:
                        encoding = self.sample.rank(moved)
                        candidate = self.total(number, encoding.errors)
                        if candidate >= total:
                            break
                        total = candidate
                        self.levels[number] = moved
                        self.encodings[number] = encoding

    def _moved(self, number: int, entry: int, step: int) -> Levels | None:
        """Levels with one entry on the next grid value, None if another level is there."""
        levels = self.levels[number].copy()
        position = int(np.searchsorted(self.grid, levels[entry])) + step
        if not 0 <= position < len(self.grid):
            return None
        levels[entry] = self.grid[position]
        if not ((np.diff(levels) > 0).all() and levels[0] < 0 < levels[-1]):
            return None
        return levels

    def state(self) -> tuple[list[Levels], list[BlockEncoding]]:
        """What :meth:`restore` takes back."""
        return list(self.levels), list(self.encodings)

    def restore(self, state: tuple[list[Levels], list[BlockEncoding]]) -> None:
        """Undo everything since :meth:`state`."""
        self.levels, self.encodings = list(state[0]), list(state[1])


def train_codebooks(
    sample: TrainingSample,
    start: Sequence[Levels],
    hif: HifFormat,
    *,
    trained: Sequence[bool] | None = None,
    effort: Training | None = None,
) -> tuple[tuple[Lut, ...], float]:
    """Train one LUT, or one or both of a pair, on a sample of a layer's blocks.

    Parameters
    ----------
    sample : TrainingSample
    start : sequence of int64 arrays, shape (entries,)
        Values from which each LUT starts (:func:`initial_levels`, or a fixed codebook's).
    hif : HifFormat
        Grid of the entries.
    trained : sequence of bool, optional
        Which LUTs are trained; the others stay as given. All if not given.
    effort : Training, optional

    Returns
    -------
    luts : tuple of Lut
    error : float
        Tabulated squared error of the sample with them, never above that of the start.
    """
    effort = effort or Training()
    trainer = _Trainer(sample, start, trained or [True] * len(start), _grid(hif))
    total = trainer.total()
    for steps, step in ((effort.rounds, trainer.alternate), (effort.sweeps, trainer.descend)):
        for _ in range(steps):
            before = trainer.state()
            step()
            now = trainer.total()
            if now > total:
                trainer.restore(before)
                break
            gain, total = total - now, now
            if gain <= effort.least_gain * total:
                break
    return tuple(_lut(levels, hif) for levels in trainer.levels), total
