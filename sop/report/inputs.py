"""What a report is made from, besides checkpoints: evaluations and the plan of the optimizer.

Both are JSON of other programs, so every field is checked; keys that are not known are ignored.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

from golden.errors import InputError
from golden.knapsack import Layer, Option

__all__ = [
    "Evaluation",
    "HullStep",
    "LayerError",
    "PlannedLayer",
    "StoredPlan",
    "hull_walk",
    "plan_of_config",
    "read_evaluations",
]

_MAX_GAP_PPM = 2e6  # ACos = -1
_SHOWN = 80  # characters of a value from the file that a message quotes


@dataclass(frozen=True)
class LayerError:
    """How far one layer is from its weights.

    Attributes
    ----------
    gap_ppm : float
        ``(1 - ACos) * 1e6``, 0 to 2e6.
    relative_mse : float or None
        At least 0.
    """

    gap_ppm: float
    relative_mse: float | None


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one quantized model; None where it was not.

    Attributes
    ----------
    name : str
        Unique in its file.
    bits_per_weight : float
        Above 0.
    kl, kl_standard_error : float or None
        Divergence from the unquantized model's next-token distribution, in nats.
    perplexity, reference_perplexity : float or None
        Of the quantized and of the unquantized model.
    top1_agreement : float or None
        Share of tokens for which both models prefer the same next token, 0 to 1.
    gap_ppm, relative_mse : float or None
        Over all layers.
    layers : mapping of str to LayerError
        By tensor name.
    """

    name: str
    bits_per_weight: float
    kl: float | None
    kl_standard_error: float | None
    perplexity: float | None
    reference_perplexity: float | None
    top1_agreement: float | None
    gap_ppm: float | None
    relative_mse: float | None
    layers: Mapping[str, LayerError]


@dataclass(frozen=True)
class PlannedLayer:
    """A layer of the plan.

    Attributes
    ----------
    layer : Layer
        Name, weights and options.
    chosen : Option
    hull : tuple of Option
        Vertices of the lower convex hull, ascending bits, strictly descending gap.
    """

    layer: Layer
    chosen: Option
    hull: tuple[Option, ...]


@dataclass(frozen=True)
class StoredPlan:
    """What the optimizer left in the configuration of a checkpoint; bits of all layers."""

    budget_bits: int
    bits: int
    layers: tuple[PlannedLayer, ...]

    @property
    def params(self) -> int:
        """Number of weights of all layers."""
        return sum(planned.layer.params for planned in self.layers)

    @property
    def mean_gap_ppm(self) -> float:
        """Mean of the chosen gaps over all weights, in ppm."""
        return sum(p.layer.params * p.chosen.gap_ppm for p in self.layers) / self.params


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


# ----------------------------------------------------------------------------------------- checks


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: must be an object, not {_shown(value)}")
    return value


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: must be a list of at least one element, not {_shown(value)}")
    return value


def _string(table: Mapping[str, Any], key: str, where: str) -> str:
    value = table.get(key)
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: field {key!r}: must be a text, not {_shown(value)}")
    return value


def _count(table: Mapping[str, Any], key: str, where: str, smallest: int) -> int:
    value = table.get(key)
    if type(value) is not int or not smallest <= value < 1 << 63:
        problem = f"must be an integer from {smallest} up, not {_shown(value)}"
        raise InputError(f"{where}: field {key!r}: {problem}")
    return value


def _number(
    table: Mapping[str, Any], key: str, where: str, most: float, least: float = 0.0
) -> float | None:
    """A finite number in [least, most]; None if the field is null or missing."""
    value = table.get(key)
    if value is None:
        return None
    if type(value) not in (int, float) or not least <= value <= most or not isfinite(value):
        problem = f"must be a number from {least:g} to {most:g}, not {_shown(value)}"
        raise InputError(f"{where}: field {key!r}: {problem}")
    return float(value)


def _required(value: float | None, key: str, where: str) -> float:
    if value is None:
        raise InputError(f"{where}: field {key!r} is missing")
    return value


# ------------------------------------------------------------------------------------ evaluations


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def read_evaluations(path: Path) -> list[Evaluation]:
    """Read what ``sop eval --json`` printed: an object with a list under ``evaluations``.

    Raises
    ------
    InputError
        If the file is not that, a value is out of range or a name is given twice; the message names
        file, evaluation and field.
    OSError
        If the file cannot be read.
    """
    try:
        content = json.loads(path.read_bytes(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {' '.join(str(error).split())[:200]}") from error
    table = _object(content, str(path))
    items = _list(table.get("evaluations"), f"{path}: field 'evaluations'")
    found: dict[str, Evaluation] = {}
    for position, item in enumerate(items):
        evaluation = _evaluation(item, f"{path}: evaluations[{position}]")
        if evaluation.name in found:
            problem = f"field 'name': {_shown(evaluation.name)} is given twice"
            raise InputError(f"{path}: evaluations[{position}]: {problem}")
        found[evaluation.name] = evaluation
    return list(found.values())


def _evaluation(value: object, where: str) -> Evaluation:
    table = _object(value, where)
    most = 1e300
    bits = _number(table, "bits_per_weight", where, 64.0)
    if bits == 0:
        raise InputError(f"{where}: field 'bits_per_weight': must be above 0")
    return Evaluation(
        name=_string(table, "name", where),
        bits_per_weight=_required(bits, "bits_per_weight", where),
        # The divergence of equal models may round below zero.
        kl=_number(table, "kl", where, most, -1e-3),
        kl_standard_error=_number(table, "kl_standard_error", where, most),
        perplexity=_number(table, "perplexity", where, most),
        reference_perplexity=_number(table, "reference_perplexity", where, most),
        top1_agreement=_number(table, "top1_agreement", where, 1.0),
        gap_ppm=_number(table, "gap_ppm", where, _MAX_GAP_PPM),
        relative_mse=_number(table, "relative_mse", where, most),
        layers=_layer_errors(table.get("layers"), where),
    )


def _layer_errors(value: object, where: str) -> dict[str, LayerError]:
    if value is None:
        return {}
    if not isinstance(value, list):
        raise InputError(f"{where}: field 'layers': must be a list, not {_shown(value)}")
    errors: dict[str, LayerError] = {}
    for position, item in enumerate(value):
        place = f"{where}: layers[{position}]"
        table = _object(item, place)
        name = _string(table, "name", place)
        if name in errors:
            raise InputError(f"{place}: field 'name': {_shown(name)} is given twice")
        gap = _number(table, "gap_ppm", place, _MAX_GAP_PPM)
        errors[name] = LayerError(
            _required(gap, "gap_ppm", place), _number(table, "relative_mse", place, 1e300)
        )
    return errors


# ------------------------------------------------------------------------------------------- plan


def plan_of_config(config: Mapping[str, Any], where: str) -> StoredPlan | None:
    """Read the optional entry ``plan`` of a checkpoint's configuration.

    Parameters
    ----------
    config : mapping
        Configuration of the checkpoint.
    where : str
        What messages start with: the file.

    Raises
    ------
    InputError
        If there is such an entry and it is not a plan; the message names layer and field.
    """
    if config.get("plan") is None:
        return None
    where = f"{where}: config: plan"
    table = _object(config["plan"], where)
    layers: dict[str, PlannedLayer] = {}
    for position, item in enumerate(_list(table.get("layers"), f"{where}: field 'layers'")):
        place = f"{where}: layers[{position}]"
        planned = _planned_layer(_object(item, place), place)
        if planned.layer.name in layers:
            problem = f"field 'name': {_shown(planned.layer.name)} is given twice"
            raise InputError(f"{place}: {problem}")
        layers[planned.layer.name] = planned
    return StoredPlan(
        _count(table, "budget_bits", where, 0),
        _count(table, "bits", where, 0),
        tuple(layers.values()),
    )


def _planned_layer(table: dict[str, Any], where: str) -> PlannedLayer:
    options: dict[str, Option] = {}
    on_hull = []
    for position, item in enumerate(_list(table.get("options"), f"{where}: field 'options'")):
        place = f"{where}: options[{position}]"
        entry = _object(item, place)
        gap = _number(entry, "gap_ppm", place, _MAX_GAP_PPM)
        option = Option(
            _string(entry, "name", place),
            _count(entry, "bits", place, 0),
            _required(gap, "gap_ppm", place),
        )
        if option.name in options:
            raise InputError(f"{place}: field 'name': {_shown(option.name)} is given twice")
        is_on_hull = entry.get("on_hull", True)
        if type(is_on_hull) is not bool:
            problem = f"must be true or false, not {_shown(is_on_hull)}"
            raise InputError(f"{place}: field 'on_hull': {problem}")
        options[option.name] = option
        on_hull += [option] * is_on_hull
    chosen = _string(table, "chosen", where)
    if chosen not in options:
        raise InputError(f"{where}: field 'chosen': {_shown(chosen)} is not among the options")
    layer = Layer(
        _string(table, "name", where), _count(table, "params", where, 1), tuple(options.values())
    )
    return PlannedLayer(layer, options[chosen], _hull(on_hull, where))


def _hull(options: list[Option], where: str) -> tuple[Option, ...]:
    hull = sorted(options, key=lambda option: option.bits)
    if not hull:
        raise InputError(f"{where}: field 'options': none has 'on_hull'")
    for smaller, larger in pairwise(hull):
        if larger.bits == smaller.bits or larger.gap_ppm >= smaller.gap_ppm:
            names = f"{_shown(smaller.name)} and {_shown(larger.name)}"
            problem = "more bits must go with a smaller gap on the hull"
            raise InputError(f"{where}: options {names}: {problem}")
    return tuple(hull)


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
