"""The figures of a report, drawn by Matplotlib: bits against errors, codebooks, the plan."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.patches import PathPatch
from matplotlib.path import Path as MplPath
from numpy.typing import NDArray

from sop.files.stored_plan import StoredPlan
from sop.report.figure_parts import WIDTH, log_axis, short, styled
from sop.report.hull import HullStep, hull_walk
from sop.report.layers import (
    HISTOGRAM_BINS,
    HISTOGRAM_LIMIT,
    CodebookFacts,
    LayerFacts,
)
from sop.report.svg import PALETTE, Drawing
from sop.shared.shares import percent

__all__ = ["Point", "codebook_drawing", "pareto_drawing", "plan_drawing"]


# ----------------------------------------------------------------------------------------- Pareto


class Point(NamedTuple):
    """A model in the figure of bits against errors; None for what is not known."""

    name: str
    bits_per_weight: float | None
    gap_ppm: float | None
    kl: float | None
    kl_standard_error: float | None
    is_checkpoint: bool


class _Mark(NamedTuple):
    point: Point
    bits: float
    value: float
    error: float
    tip: str


def _gap_marks(points: Iterable[Point]) -> list[_Mark]:
    marks = []
    for p in points:
        bits = p.bits_per_weight
        if p.gap_ppm and bits is not None:
            tip = f"{p.name}: {bits:.4g} bits per weight, ACos gap {p.gap_ppm:.5g} ppm"
            marks.append(_Mark(p, bits, p.gap_ppm, 0.0, tip))
    return marks


def _kl_marks(points: Iterable[Point]) -> list[_Mark]:
    marks = []
    for p in points:
        bits = p.bits_per_weight
        if p.kl is not None and bits is not None:
            error = p.kl_standard_error or 0.0
            spread = f" ± {error:.2g} (standard error)" if error else ""
            tip = f"{p.name}: {bits:.4g} bits per weight, KL {p.kl:.4g}{spread} nats"
            marks.append(_Mark(p, bits, p.kl, error, tip))
    return marks


@styled
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
    drawing = Drawing.blank(WIDTH if len(panels) > 1 else 0.65 * WIDTH, 4.0)
    for position, (marks, label) in enumerate(panels, 1):
        axes = drawing.figure.add_subplot(1, len(panels), position)
        _draw_panel(drawing, axes, marks)
        axes.set_xlabel("bits per weight")
        axes.set_ylabel(label)
        if all(mark.value > 0 for mark in marks):
            log_axis(axes, [mark.value for mark in marks])
    return drawing


def _draw_panel(drawing: Drawing, axes: Axes, marks: Sequence[_Mark]) -> None:
    front = _front(marks)
    if len(front) > 1:
        axes.plot(
            [mark.bits for mark in front],
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
        x = [mark.bits for mark in chosen]
        y = [mark.value for mark in chosen]
        errors = [mark.error for mark in chosen]
        if any(errors):
            axes.errorbar(x, y, yerr=errors, fmt="none", ecolor=colour, capsize=3, linewidth=1)
        dots = axes.scatter(x, y, s=42, marker=marker, color=colour, label=label, zorder=3)
        drawing.label(dots, [mark.tip for mark in chosen])
        for mark in chosen[:12]:
            axes.annotate(
                short(mark.point.name), (mark.bits, mark.value),
                xytext=(6, 5), textcoords="offset points", fontsize=7,
            )  # fmt: skip
    axes.margins(x=0.18, y=0.12)
    axes.legend(loc="upper right")


def _front(marks: Sequence[_Mark]) -> list[_Mark]:
    """Marks that no other one beats in both bits and error, by ascending bits."""
    front: list[_Mark] = []
    for mark in sorted(marks, key=lambda mark: (mark.bits, mark.value)):
        if not front or mark.value < front[-1].value:
            front.append(mark)
    return front


# --------------------------------------------------------------------------------------- codebooks


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


@styled
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
    drawing = Drawing.blank(WIDTH, (1.75 if detailed else 1.2) * rows + 0.3, layout=None)
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
    axes.set_title(short(layer.name), fontsize=8 if detailed else 7, pad=3)
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


@styled
def plan_drawing(plan: StoredPlan) -> Drawing:
    """Draw the walk along the hulls: bits per weight against the mean gap after each step."""
    drawing = Drawing.blank(WIDTH, 4.0)
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
        log_axis(axes, gaps)
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
