"""The plan of a budget, and what it is made from, in files that other steps read.

The plan is in the configuration of a checkpoint, where ``sop report`` finds it; what was tried of a
matrix is a result of its own, which a run that is resumed finds.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from golden.errors import InputError
from golden.knapsack import Layer, LayerChoice, Option, Plan
from sop.shared.json_fields import (
    count_field,
    json_list,
    json_object,
    number_field,
    shown,
    text_field,
    unique,
)

__all__ = ["PlannedLayer", "StoredPlan", "TriedFormats", "config_with_plan", "plan_of_config"]

_KEY = "plan"
_MAX_GAP_PPM = 2e6  # ACos = -1
_GAP_DECIMALS = 4


def _option(value: object, where: str, known: Mapping[str, Option]) -> Option:
    """One more option of a layer, from what ``asdict`` gave."""
    table = json_object(value, where)
    name, bits = text_field(table, "name", where), count_field(table, "bits", where)
    gap = number_field(table, "gap_ppm", where, _MAX_GAP_PPM)
    return Option(unique(name, known, where), bits, gap)


@dataclass(frozen=True)
class TriedFormats:
    """Bits and gap of a matrix in each format that was tried, in the order of preference."""

    options: tuple[Option, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """Everything as JSON values."""
        return [asdict(option) for option in self.options]

    @classmethod
    def from_json(cls, value: object, where: str) -> "TriedFormats":
        """Check what :meth:`to_json` gave; InputErrors start with `where` and name the field."""
        options: dict[str, Option] = {}
        for position, item in enumerate(json_list(value, where, least=1)):
            option = _option(item, f"{where}: options[{position}]", options)
            options[option.name] = option
        return cls(tuple(options.values()))


@dataclass(frozen=True)
class PlannedLayer:
    """A layer of the plan.

    Attributes
    ----------
    layer : Layer
        Name, weights and options.
    chosen : Option
    hull : tuple of Option
        Vertices of the lower convex hull, ascending bits; the gap does not rise.
    """

    layer: Layer
    chosen: Option
    hull: tuple[Option, ...]

    @classmethod
    def of_choice(cls, choice: LayerChoice) -> "PlannedLayer":
        """Keep the chosen option and those of the hull, with gaps of four decimals.

        All others, and more digits, would only make the header of the file longer.
        """
        rows = [row for row in choice.rows if row.on_hull or row.option is choice.option]
        options = {}
        for row in rows:
            gap = round(row.option.gap_ppm, _GAP_DECIMALS)
            options[row.option.name] = Option(row.option.name, row.option.bits, gap)
        hull = [options[row.option.name] for row in rows if row.on_hull]
        layer = Layer(choice.layer.name, choice.layer.params, tuple(options.values()))
        ascending = tuple(sorted(hull, key=lambda option: option.bits))
        return cls(layer, options[choice.option.name], ascending)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values; an option is on the hull unless it says that it is not."""
        return {
            "name": self.layer.name,
            "params": self.layer.params,
            "chosen": self.chosen.name,
            "options": [
                asdict(option) | ({} if option in self.hull else {"on_hull": False})
                for option in self.layer.options
            ],
        }

    @classmethod
    def from_json(cls, value: object, where: str) -> "PlannedLayer":
        """Check what :meth:`to_json` gave; InputErrors name option and field."""
        table = json_object(value, where)
        options: dict[str, Option] = {}
        hull = []
        items = json_list(table.get("options"), f"{where}: field 'options'", least=1)
        for position, item in enumerate(items):
            place = f"{where}: options[{position}]"
            option = _option(item, place, options)
            on_hull = item.get("on_hull", True)
            if type(on_hull) is not bool:
                problem = f"must be true or false, not {shown(on_hull)}"
                raise InputError(f"{place}: field 'on_hull': {problem}")
            options[option.name] = option
            hull += [option] * on_hull
        chosen = text_field(table, "chosen", where)
        if chosen not in options:
            raise InputError(f"{where}: field 'chosen': {shown(chosen)} is not among the options")
        name, params = text_field(table, "name", where), count_field(table, "params", where, 1)
        layer = Layer(name, params, tuple(options.values()))
        return cls(layer, options[chosen], _checked_hull(hull, where))


def _checked_hull(options: list[Option], where: str) -> tuple[Option, ...]:
    hull = sorted(options, key=lambda option: option.bits)
    if not hull:
        raise InputError(f"{where}: field 'options': none has 'on_hull'")
    for smaller, larger in pairwise(hull):
        # Equal gaps may have differed before they were rounded.
        if larger.bits == smaller.bits or larger.gap_ppm > smaller.gap_ppm:
            names = f"{shown(smaller.name)} and {shown(larger.name)}"
            problem = "on the hull, options differ in bits, and more bits never have a larger gap"
            raise InputError(f"{where}: options {names}: {problem}")
    return tuple(hull)


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

    @classmethod
    def of_plan(cls, plan: Plan) -> "StoredPlan":
        """What is kept of an optimum."""
        layers = tuple(map(PlannedLayer.of_choice, plan.choices))
        return cls(plan.budget_bits, plan.bits, layers)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "budget_bits": self.budget_bits,
            "bits": self.bits,
            "layers": [planned.to_json() for planned in self.layers],
        }

    @classmethod
    def from_json(cls, value: object, where: str) -> "StoredPlan":
        """Check what :meth:`to_json` gave.

        Raises
        ------
        InputError
            If it is not a plan; the message starts with `where` and names layer and field.
        """
        table = json_object(value, where)
        layers: dict[str, PlannedLayer] = {}
        items = json_list(table.get("layers"), f"{where}: field 'layers'", least=1)
        for position, item in enumerate(items):
            place = f"{where}: layers[{position}]"
            planned = PlannedLayer.from_json(item, place)
            layers[unique(planned.layer.name, layers, place)] = planned
        return cls(
            count_field(table, "budget_bits", where),
            count_field(table, "bits", where),
            tuple(layers.values()),
        )


def config_with_plan(config: Mapping[str, Any], plan: Plan | None) -> dict[str, Any]:
    """Configuration of a checkpoint with its plan, null where there was no budget."""
    return {**config, _KEY: None if plan is None else StoredPlan.of_plan(plan).to_json()}


def plan_of_config(config: Mapping[str, Any], where: str) -> StoredPlan | None:
    """Read the plan of a checkpoint's configuration, if there is one.

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
    if config.get(_KEY) is None:
        return None
    return StoredPlan.from_json(config[_KEY], f"{where}: config: {_KEY}")
