"""The walk along the convex hulls of a plan: what each step of the knapsack buys."""

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from golden.knapsack import Option
from sop.files.stored_plan import StoredPlan

__all__ = ["HullStep", "hull_walk"]


@dataclass(frozen=True)
class HullStep:
    """The walk after one step.

    Attributes
    ----------
    layer : str
    before, after : Option
        What the step changes in that layer.
    bits : int
        Stored bits of all layers after the step.
    mean_gap_ppm : float
        Mean over all weights after the step.
    taken : bool
        Whether the plan has this much or more in that layer.
    """

    layer: str
    before: Option
    after: Option
    bits: int
    mean_gap_ppm: float
    taken: bool


def hull_walk(plan: StoredPlan) -> tuple[int, float, list[HullStep]]:
    """Walk down all hulls at once, the largest saving per bit first (equal ones in layer order).

    Returns
    -------
    bits : int
        With the smallest option of every hull.
    mean_gap_ppm : float
        There.
    steps : list of HullStep
    """
    steps = []
    for planned in plan.layers:
        slope: Fraction | None = None
        for before, after in pairwise(planned.hull):
            saving = Fraction(before.gap_ppm) - Fraction(after.gap_ppm)
            found = planned.layer.params * saving / (after.bits - before.bits)
            # Gaps were rounded before hulls were made, so slopes may rise by a rounding error.
            slope = found if slope is None else min(slope, found)
            steps.append((slope, planned, before, after))
    steps.sort(key=lambda step: -step[0])  # stable: the order inside a layer stays
    bits = sum(planned.hull[0].bits for planned in plan.layers)
    cost = sum(planned.layer.params * Fraction(p.gap_ppm) for planned in plan.layers
               for p in planned.hull[:1])  # fmt: skip
    start = bits, float(cost / plan.params)
    walk = []
    for _, planned, before, after in steps:
        bits += after.bits - before.bits
        cost += planned.layer.params * (Fraction(after.gap_ppm) - Fraction(before.gap_ppm))
        taken = after.bits <= planned.chosen.bits
        walk.append(
            HullStep(planned.layer.name, before, after, bits, float(cost / plan.params), taken)
        )
    return *start, walk
