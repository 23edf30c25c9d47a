"""The figures of a report, drawn by Matplotlib."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.colors import ListedColormap, LogNorm, to_rgb
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path as MplPath
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from sop.report.inputs import HullStep, StoredPlan, hull_walk
from sop.report.layers import (
    HISTOGRAM_BINS,
    HISTOGRAM_LIMIT,
    CodebookFacts,
    LayerFacts,
)
from sop.report.svg import FIXED_BLACK, FIXED_WHITE, PALETTE, Drawing, page_style, printable
from sop.shared.shares import percent

__all__ = [
    "FormatKey",
    "Point",
    "codebook_drawing",
    "format_keys",
    "formats_drawing",
    "gap_drawing",
    "grid_of_layers",
    "pareto_drawing",
    "plan_drawing",
]

_WIDTH = 9.6  # inches
_MAX_LABEL = 34
_MAX_CELLS = 4000  # of a heat map

# Okabe and Ito, without black and the two that text cannot be read on, then lighter ones.
_FILLS = (
    "#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#0072b2", "#d55e00", "#a6cee3",
    "#fdbf6f", "#b2df8a", "#cab2d6", "#bcbd22",
)  # fmt: skip
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _styled(draw: Any) -> Any:
    """Draw under the page's settings."""

    @wraps(draw)
    def styled(*args: Any, **kwargs: Any) -> Any:
        with page_style():
            return draw(*args, **kwargs)

    return styled


def _short(text: str) -> str:
    """Return the text for a figure: ASCII, because fonts differ, and not too long."""
    text = printable(text).encode("ascii", "backslashreplace").decode("ascii")
    half = (_MAX_LABEL - 3) // 2
    return text if len(text) <= _MAX_LABEL else f"{text[:half]}...{text[-half:]}"


def _plain(value: float, _: int = 0) -> str:
    return f"{value:g}"


# ----------------------------------------------------------------------------------------- Pareto


class Point(NamedTuple):
    """A model in the figure of bits against errors; None for what is not known."""

    name: str
    bits_per_weight: float
    gap_ppm: float | None
    kl: float | None
    kl_standard_error: float | None
    is_checkpoint: bool


class _Mark(NamedTuple):
    point: Point
    value: float
    error: float
    tip: str


def _gap_marks(points: Iterable[Point]) -> list[_Mark]:
    return [
        _Mark(p, p.gap_ppm, 0.0, f"{p.name}: {p.bits_per_weight:.4g} bits per weight, "
              f"ACos gap {p.gap_ppm:.5g} ppm")
        for p in points
        if p.gap_ppm
    ]  # fmt: skip


def _kl_marks(points: Iterable[Point]) -> list[_Mark]:
    marks = []
    for p in points:
        if p.kl is not None:
            error = p.kl_standard_error or 0.0
            spread = f" ± {error:.2g} (standard error)" if error else ""
            tip = f"{p.name}: {p.bits_per_weight:.4g} bits per weight, KL {p.kl:.4g}{spread} nats"
            marks.append(_Mark(p, p.kl, error, tip))
    return marks


@_styled
def pareto_drawing(points: Sequence[Point]) -> Drawing | None:
    """Draw bits per weight against ACos gap and, where known, against KL; None if there is nothing.

    Gaps of exactly zero have no place on a logarithmic axis and are left out.
    """
    panels = [
        (marks, label)
        for marks, label in (
            (_gap_marks(points), "ACos gap (ppm)"),
            (_kl_marks(points), "KL divergence (nats per token)"),
        )
        if marks
    ]
    if not panels:
        return None
    drawing = Drawing.blank(_WIDTH if len(panels) > 1 else 0.65 * _WIDTH, 4.0)
    for position, (marks, label) in enumerate(panels, 1):
        axes = drawing.figure.add_subplot(1, len(panels), position)
        _draw_panel(drawing, axes, marks)
        axes.set_xlabel("bits per weight")
        axes.set_ylabel(label)
        if all(mark.value > 0 for mark in marks):
            _log_axis(axes, [mark.value for mark in marks])
    return drawing


def _draw_panel(drawing: Drawing, axes: Axes, marks: Sequence[_Mark]) -> None:
    front = _front(marks)
    if len(front) > 1:
        axes.plot(
            [mark.point.bits_per_weight for mark in front],
            [mark.value for mark in front],
            color=PALETTE["muted"], linewidth=0.8, linestyle="--", label="Pareto front",
        )  # fmt: skip
    for own, marker, colour, label in (
        (True, "o", PALETTE["first"], "checkpoints"),
        (False, "D", PALETTE["second"], "baselines"),
    ):
        chosen = [mark for mark in marks if mark.point.is_checkpoint == own]
        if not chosen:
            continue
        x = [mark.point.bits_per_weight for mark in chosen]
        y = [mark.value for mark in chosen]
        errors = [mark.error for mark in chosen]
        if any(errors):
            axes.errorbar(x, y, yerr=errors, fmt="none", ecolor=colour, capsize=3, linewidth=1)
        dots = axes.scatter(x, y, s=42, marker=marker, color=colour, label=label, zorder=3)
        drawing.label(dots, [mark.tip for mark in chosen])
        for mark in chosen[:12]:
            axes.annotate(
                _short(mark.point.name), (mark.point.bits_per_weight, mark.value),
                xytext=(6, 5), textcoords="offset points", fontsize=7,
            )  # fmt: skip
    axes.margins(x=0.18, y=0.12)
    axes.legend(loc="upper right")


def _front(marks: Sequence[_Mark]) -> list[_Mark]:
    """Marks that no other one beats in both bits and error, by ascending bits."""
    front: list[_Mark] = []
    for mark in sorted(marks, key=lambda mark: (mark.point.bits_per_weight, mark.value)):
        if not front or mark.value < front[-1].value:
            front.append(mark)
    return front


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if max(values) < 30 * min(values):  # too few powers of ten for labels
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))


# ---------------------------------------------------------------------------------------- heat map


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
    cell = min(0.3, max(0.05, (_WIDTH - 2.6) / columns))
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
    axes.set_yticks([i + 0.5 for i in range(rows)], [_short(t) for t in grid.types], fontsize=8)
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


@_styled
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
    handles = [Patch(facecolor=key.fill, label=f"{key.letter}  {_short(key.name)}") for key in keys]
    drawing.figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(keys)))
    return drawing


@_styled
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
        mappable, ax=axes, location="bottom", shrink=0.6, aspect=40, format=FuncFormatter(_plain)
    )
    bar.ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    bar.ax.xaxis.set_minor_formatter(NullFormatter())
    bar.set_label("ACos gap (ppm)")
    return drawing


def _three_digits(gap: float) -> str:
    return f"{gap / 1000:.2g}k" if gap >= 1000 else f"{gap:.3g}"


# --------------------------------------------------------------------------------------- codebooks


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


@_styled
def codebook_drawing(layers: Sequence[LayerFacts], *, detailed: bool) -> Drawing:
    """Draw the LUTs of layers against what is stored through them, one small plot each.

    The first LUT is drawn upwards, the second one downwards. Levels are in units of the full scale;
    each histogram fills its half.

    Parameters
    ----------
    layers : sequence of LayerFacts
        With codebooks.
    detailed : bool
        Every level can be pointed at; otherwise a LUT as a whole, which takes a tenth of the bytes.
    """
    columns = 3 if detailed else 4
    rows = -(-len(layers) // columns)
    drawing = Drawing.blank(_WIDTH, (1.75 if detailed else 1.2) * rows + 0.3, layout=None)
    margin = 0.25 / ((1.75 if detailed else 1.2) * rows + 0.3)
    drawing.figure.subplots_adjust(
        left=0.01, right=0.99, bottom=margin * 1.2, top=1 - margin, hspace=0.5, wspace=0.06
    )
    for position, layer in enumerate(layers, 1):
        axes = drawing.figure.add_subplot(rows, columns, position)
        _draw_codebooks(drawing, axes, layer, detailed)
    return drawing


def _draw_codebooks(drawing: Drawing, axes: Axes, layer: LayerFacts, detailed: bool) -> None:
    pair = len(layer.codebooks) > 1
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_yticks([])
    axes.set_xlim(-HISTOGRAM_LIMIT, HISTOGRAM_LIMIT)
    axes.set_ylim(-1.05 if pair else 0.0, 1.05)
    axes.set_xticks([-1, 0, 1], ["-1", "0", "1"] if detailed else ["", "", ""], fontsize=7)
    axes.tick_params(length=2)
    axes.axhline(0, color=PALETTE["muted"], linewidth=0.6)
    axes.set_title(_short(layer.name), fontsize=8 if detailed else 7, pad=3)
    whole = sum(int(book.uses.sum()) for book in layer.codebooks)
    for position, (book, sign, colour) in enumerate(
        zip(layer.codebooks, (1, -1), (PALETTE["first"], PALETTE["second"]), strict=False)
    ):
        name = f"{layer.name}, LUT {position}"
        share = f"{percent(_share(int(book.uses.sum()), whole), 1)} % of the weights"
        _draw_histogram(axes, book, sign, colour)
        levels = book.levels / book.full_scale
        _draw_levels(axes, levels, sign, colour, 0.9 if detailed else 0.6)
        if detailed:
            edges = [-HISTOGRAM_LIMIT, *((a + b) / 2 for a, b in pairwise(levels)), HISTOGRAM_LIMIT]
            tips = [
                f"{name}, index {i}: level {level:.4f} (value {value}), "
                f"{percent(_share(uses, book.uses.sum()))} % of the weights of this LUT"
                for i, (level, value, uses) in enumerate(
                    zip(levels, book.levels, book.uses, strict=True)
                )
            ]
        else:
            edges = [-HISTOGRAM_LIMIT, HISTOGRAM_LIMIT]
            tips = [f"{name}: {share}, {layer.format}"]
        areas = [[(a, 0), (b, 0), (b, sign), (a, sign)] for a, b in pairwise(edges)]
        # Transparent: Matplotlib 3.10 would not draw polygons without any colour.
        targets = PolyCollection(areas, facecolors=[(0, 0, 0, 0)], edgecolors="none", zorder=4)
        axes.add_collection(targets, autolim=False)
        drawing.label(targets, tips)


def _draw_levels(
    axes: Axes, levels: NDArray[np.float64], sign: int, colour: str, width: float
) -> None:
    vertices = [(level, end) for level in levels for end in (0, sign)]
    codes = [MplPath.MOVETO, MplPath.LINETO] * len(levels)
    # One path for all lines, for the sake of the page's size.
    axes.add_patch(PathPatch(MplPath(vertices, codes), edgecolor=colour, linewidth=width))


def _draw_histogram(axes: Axes, book: CodebookFacts, sign: int, colour: str) -> None:
    """Fill a histogram of scaled weights, or a bar per entry where weights are not known."""
    if book.histogram is None:
        heights = book.uses / max(1, book.uses.max())
        widths = 0.7 * float(np.diff(book.levels).min()) / book.full_scale
        middles = book.levels / book.full_scale
        areas = [
            [(m - widths / 2, 0), (m + widths / 2, 0), (m + widths / 2, h), (m - widths / 2, h)]
            for m, h in zip(middles, sign * heights, strict=True)
        ]
        axes.add_collection(
            PolyCollection(areas, facecolors=colour, edgecolors="none", alpha=0.5), autolim=False
        )
        return
    heights = sign * book.histogram / max(1, book.histogram.max())
    edges = np.linspace(-HISTOGRAM_LIMIT, HISTOGRAM_LIMIT, HISTOGRAM_BINS + 1)
    axes.stairs(heights, edges, fill=True, color=colour, alpha=0.3, linewidth=0)


# -------------------------------------------------------------------------------------------- plan


@_styled
def plan_drawing(plan: StoredPlan) -> Drawing:
    """Draw the walk along the hulls: bits per weight against the mean gap after each step."""
    drawing = Drawing.blank(_WIDTH, 4.0)
    axes = drawing.figure.add_subplot()
    start_bits, start_gap, steps = hull_walk(plan)
    bits = [b / plan.params for b in (start_bits, *(step.bits for step in steps))]
    gaps = [start_gap, *(step.mean_gap_ppm for step in steps)]
    axes.plot(bits, gaps, color=PALETTE["grid"], linewidth=1.0, zorder=1)
    for taken, colour, label in (
        (True, PALETTE["first"], "bought"),
        (False, PALETTE["muted"], "not bought"),
    ):
        chosen = [step for step in steps if step.taken == taken]
        if chosen:
            dots = _dots(axes, plan, chosen, colour, label)
            drawing.label(dots, [_step_tip(plan, step) for step in chosen])
    budget = plan.budget_bits / plan.params
    axes.axvline(budget, color=PALETTE["second"], linewidth=1.0, linestyle="--", label="budget")
    # The optimum may leave the walk: it fills the budget where the next step does not fit.
    mark = axes.scatter(
        [plan.bits / plan.params], [plan.mean_gap_ppm], s=70, marker="*", zorder=4,
        color=PALETTE["second"], label="chosen plan",
    )  # fmt: skip
    tip = f"chosen plan: {plan.bits / plan.params:.5g} bits per weight, {plan.mean_gap_ppm:.5g} ppm"
    drawing.label(mark, [f"{tip}; budget {budget:.5g} bits per weight"])
    axes.set_xlabel("stored bits per weight")
    axes.set_ylabel("mean ACos gap (ppm)")
    if min(gaps) > 0 and plan.mean_gap_ppm > 0:
        _log_axis(axes, gaps)
    axes.legend(loc="upper right")
    return drawing


def _dots(
    axes: Axes, plan: StoredPlan, steps: Sequence[HullStep], colour: str, label: str
) -> PathCollection:
    x = [step.bits / plan.params for step in steps]
    return axes.scatter(
        x, [step.mean_gap_ppm for step in steps], s=14, color=colour, label=label, zorder=2
    )


def _step_tip(plan: StoredPlan, step: HullStep) -> str:
    more = step.after.bits - step.before.bits
    return (
        f"{step.layer}: {step.before.name} to {step.after.name}, {more:,} bits more, "
        f"its gap {step.before.gap_ppm:.5g} to {step.after.gap_ppm:.5g} ppm; all layers "
        f"{step.bits / plan.params:.5g} bits per weight, {step.mean_gap_ppm:.5g} ppm"
    )
