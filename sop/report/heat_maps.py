"""Figures of all layers by decoder block and tensor type: their formats and their gaps."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import ListedColormap, LogNorm, to_rgb
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sop.report.figure_parts import WIDTH, plain_number, short, styled
from sop.report.layers import LayerFacts
from sop.report.svg import FIXED_BLACK, FIXED_WHITE, PALETTE, Drawing

__all__ = ["FormatKey", "format_keys", "formats_drawing", "gap_drawing", "grid_of_layers"]

_MAX_CELLS = 4000  # of a heat map

# Okabe and Ito, without black and the two that text cannot be read on, then lighter ones.
_FILLS = (
    "#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#0072b2", "#d55e00", "#a6cee3",
    "#fdbf6f", "#b2df8a", "#cab2d6", "#bcbd22",
)  # fmt: skip
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Cell(NamedTuple):
    """A layer and its place: column is the position of the block, row that of the tensor type."""

    column: int
    row: int
    layer: LayerFacts


@dataclass(frozen=True)
class Grid:
    """Layers by block and tensor type.

    Attributes
    ----------
    blocks : tuple of str
        Labels of the columns.
    types : tuple of str
        Labels of the rows.
    cells : tuple of Cell
    """

    blocks: tuple[str, ...]
    types: tuple[str, ...]
    cells: tuple[Cell, ...]


def _place(name: str) -> tuple[str, str]:
    """(Block, tensor type) of a tensor name; tensors outside blocks have the block "-"."""
    match = re.search(r"(?:^|\.)(blk|layers?|h|blocks)\.(\d{1,9})\.", name)
    if match is None:
        return "-", name.removesuffix(".weight")
    rest = f"{name[: match.start()]}.{name[match.end() :]}".strip(".")
    return match[2], re.sub(r"^model\.", "", rest).removesuffix(".weight")


def grid_of_layers(layers: Sequence[LayerFacts]) -> Grid | None:
    """Arrange layers; None if there are too many for a figure."""
    places = [_place(layer.name) for layer in layers]
    blocks = sorted({block for block, _ in places}, key=lambda b: (b == "-", len(b), b))
    types = list(dict.fromkeys(kind for _, kind in places))
    if len(blocks) * len(types) > _MAX_CELLS:
        return None
    cells = [
        Cell(blocks.index(block), types.index(kind), layer)
        for (block, kind), layer in zip(places, layers, strict=True)
    ]
    return Grid(tuple(blocks), tuple(types), tuple(cells))


def _heat_map(grid: Grid, extra_height: float) -> tuple[Drawing, Axes, float]:
    """Empty heat map, its axes, and the size of a cell in inches."""
    columns, rows = len(grid.blocks), len(grid.types)
    cell = min(0.3, max(0.05, (WIDTH - 2.6) / columns))
    height = max(1.6, 0.3 * rows + 0.8) + extra_height
    drawing = Drawing.blank(max(4.5, 2.6 + cell * columns), height)
    axes = drawing.figure.add_subplot()
    axes.grid(False)
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    step = -(-columns // 40)
    axes.set_xticks([i + 0.5 for i in range(0, columns, step)], grid.blocks[::step], fontsize=7)
    axes.set_yticks([i + 0.5 for i in range(rows)], [short(t) for t in grid.types], fontsize=8)
    axes.set_xlabel("decoder block")
    return drawing, axes, cell


def _cells(axes: Axes, cells: Sequence[Cell], colours: Sequence[Any]) -> PolyCollection:
    squares = [
        [(c.column, c.row), (c.column + 1, c.row), (c.column + 1, c.row + 1), (c.column, c.row + 1)]
        for c in cells
    ]
    collection = PolyCollection(
        squares, facecolors=colours, edgecolors=PALETTE["paper"], linewidths=1.0
    )
    axes.add_collection(collection, autolim=False)
    return collection


def _readable(fill: Any) -> str:
    """Black or white, whichever has more contrast (luminance of WCAG 2, rounded)."""
    red, green, blue = (part**2.2 for part in to_rgb(fill))
    return FIXED_BLACK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else FIXED_WHITE


class FormatKey(NamedTuple):
    """A format of the checkpoint and how the heat map shows it."""

    letter: str
    fill: str
    name: str
    layers: int


def format_keys(layers: Sequence[LayerFacts]) -> list[FormatKey]:
    """Letter and colour of each format, by ascending mean bits per weight."""
    members: dict[str, list[LayerFacts]] = {}
    for layer in layers:
        members.setdefault(layer.format, []).append(layer)

    def density(name: str) -> tuple[float, str]:
        found = members[name]
        return sum(m.bits for m in found) / sum(m.params for m in found), name

    names = sorted(members, key=density)
    return [
        FormatKey(
            _LETTERS[i] if i < len(_LETTERS) else str(i),
            _FILLS[i % len(_FILLS)],
            name,
            len(members[name]),
        )
        for i, name in enumerate(names)
    ]


@styled
def formats_drawing(grid: Grid, keys: Sequence[FormatKey]) -> Drawing:
    """Draw the format of every layer as colour and letter."""
    legend_rows = -(-len(keys) // 3)
    drawing, axes, cell = _heat_map(grid, 0.22 * legend_rows)
    by_name = {key.name: key for key in keys}
    found = [by_name[c.layer.format] for c in grid.cells]
    squares = _cells(axes, grid.cells, [key.fill for key in found])
    tips = []
    for c in grid.cells:
        sparse = f", {c.layer.corrections:,} corrections" if c.layer.corrections else ""
        bits = f"{c.layer.bits_per_weight:.4g} bits per weight"
        tips.append(f"{c.layer.name}: {c.layer.format}, {bits}{sparse}")
    drawing.label(squares, tips)
    if cell >= 0.1:
        for c, key in zip(grid.cells, found, strict=True):
            axes.text(
                c.column + 0.5, c.row + 0.5, key.letter, ha="center", va="center",
                fontsize=min(8.0, 60 * cell), color=_readable(key.fill),
            )  # fmt: skip
    handles = [Patch(facecolor=key.fill, label=f"{key.letter}  {short(key.name)}") for key in keys]
    drawing.figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(keys)))
    return drawing


@styled
def gap_drawing(grid: Grid) -> Drawing | None:
    """Draw the ACos gap of every layer on a logarithmic colour scale; None if none has one."""
    cells, gaps = [], []
    for cell in grid.cells:
        if cell.layer.error is not None:
            cells.append(cell)
            gaps.append(cell.layer.error.gap_ppm)
    positive = [gap for gap in gaps if gap > 0]
    if not positive:
        return None
    drawing, axes, size = _heat_map(grid, 0.6)
    colours = ListedColormap(matplotlib.colormaps["cividis"](np.linspace(0, 1, 32)))
    low, high = min(positive), max(positive)
    if low == high:
        low, high = low / 2, high * 2
    norm = LogNorm(low, high, clip=True)
    fills = [colours(norm(max(gap, low))) for gap in gaps]
    squares = _cells(axes, cells, fills)
    tips = []
    for cell, gap in zip(cells, gaps, strict=True):
        tips.append(f"{cell.layer.name}: ACos gap {gap:.5g} ppm ({cell.layer.format})")
    drawing.label(squares, tips)
    if size >= 0.22:
        for cell, gap, fill in zip(cells, gaps, fills, strict=True):
            axes.text(
                cell.column + 0.5, cell.row + 0.5, _three_digits(gap), ha="center", va="center",
                fontsize=4.6, color=_readable(fill),
            )  # fmt: skip
    mappable = matplotlib.cm.ScalarMappable(norm, colours)
    bar = drawing.figure.colorbar(
        mappable, ax=axes, location="bottom", shrink=0.6, aspect=40,
        format=FuncFormatter(plain_number),
    )  # fmt: skip
    bar.ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    bar.ax.xaxis.set_minor_formatter(NullFormatter())
    bar.set_label("ACos gap (ppm)")
    return drawing


def _three_digits(gap: float) -> str:
    return f"{gap / 1000:.2g}k" if gap >= 1000 else f"{gap:.3g}"
