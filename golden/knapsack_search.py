"""Exact search of a multiple-choice knapsack: one point of each list, within a budget of bits.

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

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Point", "Relaxation", "best_choice", "lower_hull", "relax", "undominated"]

# Significant bits of the integer price in the search. Any price gives a valid bound; with this many
# the bound is within 1e-9 of the best one.
_PRICE_BITS = 30

# The first limit as a divisor of the saving of the step that did not fit. The optimum is seldom
# nearer to the bound, and a search with a small limit costs next to nothing.
_FIRST_LIMIT_DIVISOR = 1024


# ------------------------------------------------------------------- one layer, linear relaxation


class Point(NamedTuple):
    """The option at a position of a layer's list; compared by bits, then cost, then position."""

    bits: int
    cost: int
    position: int


def undominated(points: Sequence[Point]) -> list[Point]:
    """Points in ascending bits and strictly descending cost, the first of equal ones."""
    kept: list[Point] = []
    for point in sorted(points):
        if not kept or point.cost < kept[-1].cost:
            kept.append(point)
    return kept


def lower_hull(frontier: Sequence[Point]) -> list[Point]:
    """Vertices of the lower convex hull; points on an edge are no vertices."""
    hull: list[Point] = []
    for point in frontier:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(smaller: Point, larger: Point) -> Fraction:
    """Cost saved per bit."""
    return Fraction(smaller.cost - larger.cost, larger.bits - smaller.bits)


@dataclass(frozen=True)
class Relaxation:
    """Linear relaxation: its cost, the multiplier of the budget, the saving of the split step."""

    value: Fraction
    multiplier: Fraction
    split_saving: int


def relax(hulls: Sequence[Sequence[Point]], budget_bits: int) -> Relaxation:
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
            return Relaxation(cost - slope * room, slope, saving)
        room -= bits
        cost -= saving
    return Relaxation(Fraction(cost), Fraction(0), 0)


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
    frontiers: Sequence[Sequence[Point]], budget_bits: int, relaxation: Relaxation
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


def best_choice(
    frontiers: Sequence[Sequence[Point]], budget_bits: int, relaxation: Relaxation
) -> list[int]:
    """Positions of the points of the best choice; there must be one that meets the budget.

    Among choices of equal cost the one with fewer bits; if these are equal too, the one that has
    the earlier position in the first list where they differ.

    Parameters
    ----------
    frontiers : sequence of sequences of Point
        As :func:`undominated` gives them.
    budget_bits : int
    relaxation : Relaxation
        Of the hulls of these frontiers.
    """
    problem = _reduce(frontiers, budget_bits, relaxation)
    # The first limit is 0 only where the cheapest options all fit, and then the search succeeds.
    limit = problem.first_limit
    while (found := _search(problem, limit)) is None:
        limit *= 2
    return found
