"""One storage option per layer under a bit budget: an exact multiple-choice knapsack (MCKP).

Exact arithmetic. The gap of an option, ``(1 - ACos) * 1e6`` in ppm, is rounded once, to a whole
multiple of 1e-6 ppm (half to even); the **cost** of the option is the number of weights of the
layer times that multiple. Costs and bits are Python integers, so the optimum is that of an integer
problem, the same on every machine. Minimal cost is maximal parameter-weighted total ACos.

Method (Sinha and Zoltners 1979; Pisinger 1995). The linear relaxation takes steps along the lower
convex hulls of the layers, steepest first, until one no longer fits; the slope of that one is the
**multiplier**, the price of a bit. Each option has an *excess*: cost plus price times bits, above
the best option of its layer at this price. For a choice of cost C that leaves u bits unused,

    C = relaxed bound + sum of excesses + price * u,

so a choice within ``limit`` of the bound has only options with an excess of at most ``limit``,
which leaves one option in most layers. The dynamic program goes through the others in layer order
and keeps every (bits, cost) that no other state dominates and that can end within the limit.
From a small fraction of what that last step would have saved, the limit is doubled until the
program ends with a state: nothing within the limit was lost, so that state is the optimum.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from golden.errors import InputError

__all__ = [
    "COST_UNITS_PER_PPM",
    "Layer",
    "LayerChoice",
    "Option",
    "OptionRow",
    "Plan",
    "solve_mckp",
]

COST_UNITS_PER_PPM = 10**6
"""Cost of one weight in a layer whose gap is 1 ppm."""

_MAX_GAP_PPM = 2_000_000  # ACos = -1

# Significant bits of the integer price in the search. Any price gives a valid bound; with this many
# the bound is within 1e-9 of the best one.
_PRICE_BITS = 30

# The first limit as a divisor of the saving of the step that did not fit. The optimum is seldom
# nearer to the bound, and a search with a small limit costs next to nothing.
_FIRST_LIMIT_DIVISOR = 1024


# ------------------------------------------------------------------------------- input and result


@dataclass(frozen=True)
class Option:
    """One way to store a layer.

    Attributes
    ----------
    name : str
        Unique within its layer.
    bits : int
        All that is stored: indices, scales, LUTs, corrections. Not negative.
    gap_ppm : float
        ``(1 - ACos) * 1e6`` (:func:`golden.metrics.cosine_gap_ppm`), 0 to 2e6.
    """

    name: str
    bits: int
    gap_ppm: float


@dataclass(frozen=True)
class Layer:
    """A layer and the options for storing it.

    Attributes
    ----------
    name : str
        Unique within the problem.
    params : int
        Number of weights, at least 1.
    options : tuple of Option
        At least one, in the order of preference among equals.
    """

    name: str
    params: int
    options: tuple[Option, ...]


@dataclass(frozen=True)
class OptionRow:
    """What the optimizer knows of an option.

    Attributes
    ----------
    option : Option
    cost : int
        Weights times gap, in units of 1e-6 ppm.
    dominated : bool
        Another option of the layer has no more bits and no more cost, one of them less, or stands
        earlier with both equal. Such an option is never chosen.
    on_hull : bool
        A vertex of the lower convex hull of (bits, cost): best at some price of a bit.
    """

    option: Option
    cost: int
    dominated: bool
    on_hull: bool


@dataclass(frozen=True)
class LayerChoice:
    """The option chosen for a layer.

    Attributes
    ----------
    layer : Layer
    index : int
        Position of the chosen option.
    rows : tuple of OptionRow
        One per option, in the order of the layer.
    """

    layer: Layer
    index: int
    rows: tuple[OptionRow, ...]

    @property
    def option(self) -> Option:
        """The chosen option."""
        return self.layer.options[self.index]

    @property
    def cost(self) -> int:
        """Cost of the chosen option, in weights times 1e-6 ppm."""
        return self.rows[self.index].cost


@dataclass(frozen=True)
class Plan:
    """The optimum, and a bound that proves how near any other choice can come.

    Attributes
    ----------
    choices : tuple of LayerChoice
        In the order of the layers.
    budget_bits : int
    bits : int
        Stored bits of all layers, at most ``budget_bits``.
    cost : int
        Sum of the costs, in weights times 1e-6 ppm.
    bound : int
        No choice within the budget costs less: the linear relaxation, rounded up to an integer.
    multiplier : Fraction
        Lagrangian multiplier of the budget, cost per bit. It certifies the bound: ``bound`` is
        ``sum of min(cost + multiplier * bits) over each layer, - multiplier * budget_bits``,
        rounded up.
    """

    choices: tuple[LayerChoice, ...]
    budget_bits: int
    bits: int
    cost: int
    bound: int
    multiplier: Fraction

    @property
    def params(self) -> int:
        """Number of weights of all layers."""
        return sum(choice.layer.params for choice in self.choices)

    @property
    def bits_per_weight(self) -> Fraction:
        """Stored bits per weight."""
        return Fraction(self.bits, self.params)

    @property
    def mean_gap_ppm(self) -> float:
        """Mean of the gaps over all weights, in ppm."""
        return self.cost / (self.params * COST_UNITS_PER_PPM)

    @property
    def bound_distance(self) -> int:
        """Cost above the bound: the most that any other method could claim to save."""
        return self.cost - self.bound


# ----------------------------------------------------------------------------------------- checks


def _check_unique(names: Sequence[str], what: str) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(f"{what} {name} is given {count} times")


def _check_layer(layer: Layer) -> None:
    if layer.params < 1:
        raise InputError(f"layer {layer.name}: params must be at least 1, not {layer.params}")
    if not layer.options:
        raise InputError(f"layer {layer.name} has no options")
    _check_unique([option.name for option in layer.options], f"layer {layer.name}: option")
    for option in layer.options:
        where = f"layer {layer.name}, option {option.name}"
        if option.bits < 0:
            raise InputError(f"{where}: bits must not be negative, not {option.bits}")
        if not 0 <= option.gap_ppm <= _MAX_GAP_PPM:  # false for NaN too
            raise InputError(
                f"{where}: gap must be from 0 to {_MAX_GAP_PPM} ppm, not {option.gap_ppm}"
            )


def _check_feasible(smallest_bits: int, budget_bits: int, params: int) -> None:
    if smallest_bits <= budget_bits:
        return
    # To 6 decimals, away from each other: what is named as smallest can be met.
    asked = budget_bits * 10**6 // params
    smallest = -(-smallest_bits * 10**6 // params)
    raise InputError(
        f"a budget of {asked // 10**6}.{asked % 10**6:06d} bits per weight ({budget_bits} bits) "
        f"cannot be met; the smallest choice takes {smallest // 10**6}.{smallest % 10**6:06d} "
        f"bits per weight ({smallest_bits} bits)"
    )


# ------------------------------------------------------------------- one layer, linear relaxation


class _Point(NamedTuple):
    """The option at a position of a layer's list; compared by bits, then cost, then position."""

    bits: int
    cost: int
    position: int


def _points(layer: Layer) -> list[_Point]:
    return [
        _Point(
            option.bits,
            layer.params * round(Fraction(option.gap_ppm) * COST_UNITS_PER_PPM),
            position,
        )
        for position, option in enumerate(layer.options)
    ]


def _undominated(points: Sequence[_Point]) -> list[_Point]:
    """Points in ascending bits and strictly descending cost, the first of equal ones."""
    kept: list[_Point] = []
    for point in sorted(points):
        if not kept or point.cost < kept[-1].cost:
            kept.append(point)
    return kept


def _lower_hull(frontier: Sequence[_Point]) -> list[_Point]:
    """Vertices of the lower convex hull; points on an edge are no vertices."""
    hull: list[_Point] = []
    for point in frontier:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(smaller: _Point, larger: _Point) -> Fraction:
    """Cost saved per bit."""
    return Fraction(smaller.cost - larger.cost, larger.bits - smaller.bits)


@dataclass(frozen=True)
class _Relaxation:
    """Linear relaxation: its cost, the multiplier of the budget, the saving of the split step."""

    value: Fraction
    multiplier: Fraction
    split_saving: int


def _relax(hulls: Sequence[Sequence[_Point]], budget_bits: int) -> _Relaxation:
    """Walk down all hulls at once, the largest saving per bit first; split the one too large.

    Slopes fall along a hull, so no layer's steps are taken out of order.
    """
    steps = [
        (_slope(smaller, larger), larger.bits - smaller.bits, smaller.cost - larger.cost)
        for hull in hulls
        for smaller, larger in pairwise(hull)
    ]
    steps.sort(reverse=True)
    room = budget_bits - sum(hull[0].bits for hull in hulls)
    cost = sum(hull[0].cost for hull in hulls)
    for slope, bits, saving in steps:
        if bits > room:
            return _Relaxation(cost - slope * room, slope, saving)
        room -= bits
        cost -= saving
    return _Relaxation(Fraction(cost), Fraction(0), 0)


# ----------------------------------------------------------------------------------- exact search


class _Step(NamedTuple):
    """An option relative to the best one of its layer at the price of the search."""

    position: int
    bits: int
    excess: int


# int64, or Python integers where a number may not fit.
_Integers = NDArray[Any]


@dataclass(frozen=True)
class _Problem:
    """Options as steps from the choice that is best at an integer price, in scaled cost.

    ``room`` is the budget minus the bits of that choice, negative if it takes too many.
    """

    columns: list[list[_Step]]
    room: int
    price: int
    first_limit: int


def _reduce(
    frontiers: Sequence[Sequence[_Point]], budget_bits: int, relaxation: _Relaxation
) -> _Problem:
    """Scale costs by a power of two so that the multiplier rounds to an integer with care."""
    slope = relaxation.multiplier
    magnitude = slope.numerator.bit_length() - slope.denominator.bit_length()
    scale = 1 << max(0, _PRICE_BITS - magnitude)
    price = round(slope * scale)
    columns, room = [], budget_bits
    for frontier in frontiers:
        priced = [scale * point.cost + price * point.bits for point in frontier]
        least = min(priced)
        base = frontier[priced.index(least)]
        room -= base.bits
        columns.append(
            [
                _Step(point.position, point.bits - base.bits, total - least)
                for point, total in zip(frontier, priced, strict=True)
            ]
        )
    return _Problem(columns, room, price, scale * relaxation.split_saving // _FIRST_LIMIT_DIVISOR)


def _bits_ranges(columns: Sequence[Sequence[_Step]]) -> list[tuple[int, int]]:
    """For each column, the least and the most bits that all later columns can add."""
    ranges = []
    least = most = 0
    for column in reversed(columns):
        ranges.append((least, most))
        bits = [step.bits for step in column]
        least, most = least + min(bits), most + max(bits)
    return ranges[::-1]


def _order(*keys: _Integers) -> NDArray[np.intp]:
    """Stable order by the first key, then the second, and so on (any dtype, unlike lexsort)."""
    order = np.arange(len(keys[0]))
    for key in reversed(keys):
        order = order[np.argsort(key[order], kind="stable")]
    return order


def _best_states(bits: _Integers, cost: _Integers, rank: _Integers) -> NDArray[np.intp]:
    """Positions of the undominated states, ascending bits; of equal ones that of lowest rank."""
    by_bits = np.argsort(bits, kind="stable")
    # A cheap first pass: what costs more than something with no more bits is dominated.
    near = by_bits[cost[by_bits] == np.minimum.accumulate(cost[by_bits])]
    near = near[_order(bits[near], cost[near], rank[near])]
    lowest = np.minimum.accumulate(cost[near])
    first = np.ones(len(near), dtype=np.bool_)
    first[1:] = lowest[1:] < lowest[:-1]
    return near[first]


def _search(problem: _Problem, limit: int) -> list[int] | None:
    """Option of each layer in the best choice within ``limit`` of the bound, None if there is none.

    A state is the best choice for the layers so far at some number of bits. Its rank is its place
    among all states when their lists of options are compared from the first layer on.
    """
    price, room = problem.price, problem.room
    # In the order of the layer's list, as ranks need it.
    kept = [sorted(s for s in column if s.excess <= limit) for column in problem.columns]
    # Where no layer is free, any one takes the check against the budget.
    columns = [column for column in kept if len(column) > 1] or kept[:1]
    span = sum(max(abs(step.bits) for step in column) for column in columns)
    fits = (price + 1) * (2 * span + abs(room)) + 2 * limit < 1 << 63
    dtype: type = np.int64 if fits else object

    bits: _Integers = np.zeros(1, dtype=dtype)
    excess: _Integers = np.zeros(1, dtype=dtype)
    rank = np.zeros(1, dtype=np.int64)
    history: list[tuple[NDArray[np.intp], int]] = []
    for column, (least, most) in zip(columns, _bits_ranges(columns), strict=True):
        # Candidate i extends state i % states by step i // states.
        states = len(bits)
        bits = np.add.outer(np.array([s.bits for s in column], dtype=dtype), bits).ravel()
        excess = np.add.outer(np.array([s.excess for s in column], dtype=dtype), excess).ravel()
        rank = np.add.outer(np.arange(len(column)), rank * len(column)).ravel()
        unused = np.maximum(room - most - bits, 0)
        alive = np.flatnonzero((bits <= room - least) & (excess + price * unused <= limit))
        bits, excess, rank = bits[alive], excess[alive], rank[alive]
        best = _best_states(bits, excess - price * bits, rank)
        bits, excess, rank = bits[best], excess[best], np.argsort(np.argsort(rank[best]))
        history.append((alive[best], states))
        if not len(best):
            return None

    # The last state has the most bits, so the least cost.
    state, picks = len(bits) - 1, []
    for candidates, states in reversed(history):
        pick, state = divmod(int(candidates[state]), states)
        picks.append(pick)
    return [column[picks.pop() if len(column) > 1 else 0].position for column in kept]


def _optimum(problem: _Problem) -> list[int]:
    """Option of each layer in the best choice; there must be one that meets the budget.

    The first limit is 0 only where the cheapest options all fit, and then the search succeeds.
    """
    limit = problem.first_limit
    while (found := _search(problem, limit)) is None:
        limit *= 2
    return found


def solve_mckp(layers: Sequence[Layer], budget_bits: int) -> Plan:
    """Choose one option per layer: least total cost with at most ``budget_bits`` bits.

    The exact optimum. Among choices of equal cost the one with fewer bits is taken; if these are
    equal too, the one that has, in the first layer where they differ, the earlier option.

    Parameters
    ----------
    layers : sequence of Layer
        At least one; in the order that decides ties.
    budget_bits : int
        Stored bits allowed for all layers together.

    Returns
    -------
    plan : Plan

    Raises
    ------
    InputError
        If there are no layers, a layer has no options or no weights, a name is given twice, bits
        are negative, a gap is not within 0 to 2e6 ppm, or no choice meets the budget; the message
        names layer and option, or the smallest bits per weight that can be met.

    Notes
    -----
    Paper, abstract: a multiple-choice knapsack picks one option per layer so that the
    parameter-weighted total ACos is maximal under a global budget. Units, rounding, ties and method
    are this project's own (docs/numerics.md).

    Time and memory grow with the number of states near the bound: some thousands for a language
    model's layers. Problems made to be hard (every option of every layer with the same saving per
    bit) can need as many states as there are different bit totals.
    """
    if not layers:
        raise InputError("there are no layers to choose options for")
    if budget_bits < 0:
        raise InputError(f"budget must not be negative, not {budget_bits} bits")
    for layer in layers:
        _check_layer(layer)
    _check_unique([layer.name for layer in layers], "layer")

    points = [_points(layer) for layer in layers]
    frontiers = [_undominated(options) for options in points]
    hulls = [_lower_hull(frontier) for frontier in frontiers]
    smallest_bits = sum(frontier[0].bits for frontier in frontiers)
    _check_feasible(smallest_bits, budget_bits, sum(layer.params for layer in layers))

    relaxation = _relax(hulls, budget_bits)
    picks = _optimum(_reduce(frontiers, budget_bits, relaxation))
    chosen = [options[pick] for options, pick in zip(points, picks, strict=True)]
    choices = [
        LayerChoice(
            layer,
            pick,
            tuple(
                OptionRow(option, point.cost, point not in frontier, point in hull)
                for option, point in zip(layer.options, options, strict=True)
            ),
        )
        for layer, pick, options, frontier, hull in zip(
            layers, picks, points, frontiers, hulls, strict=True
        )
    ]
    return Plan(
        tuple(choices),
        budget_bits,
        sum(point.bits for point in chosen),
        sum(point.cost for point in chosen),
        math.ceil(relaxation.value),
        relaxation.multiplier,
    )
