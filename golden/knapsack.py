"""One storage option per layer under a bit budget: an exact multiple-choice knapsack (MCKP).

Exact arithmetic. The gap of an option, ``(1 - ACos) * 1e6`` in ppm, is rounded once, to a whole
multiple of 1e-6 ppm (half to even); the **cost** of the option is the number of weights of the
layer times that multiple. Costs and bits are Python integers, so the optimum is that of an integer
problem, the same on every machine. Minimal cost is maximal parameter-weighted total ACos.

The method is that of :mod:`golden.knapsack_search`.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from golden.errors import InputError
from golden.knapsack_search import Point, best_choice, lower_hull, relax, undominated

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


def _points(layer: Layer) -> list[Point]:
    return [
        Point(
            option.bits,
            layer.params * round(Fraction(option.gap_ppm) * COST_UNITS_PER_PPM),
            position,
        )
        for position, option in enumerate(layer.options)
    ]


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
    frontiers = [undominated(options) for options in points]
    hulls = [lower_hull(frontier) for frontier in frontiers]
    smallest_bits = sum(frontier[0].bits for frontier in frontiers)
    _check_feasible(smallest_bits, budget_bits, sum(layer.params for layer in layers))

    relaxation = relax(hulls, budget_bits)
    picks = best_choice(frontiers, budget_bits, relaxation)
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
