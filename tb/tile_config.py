"""Configurations of the benches of tiles; needs no simulator."""

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from golden.activations import ActivationFormat, parse_activation_format
from golden.formats import HIF_FORMATS
from golden.notation import QuantFormat, parse_format
from rtl.lookup import DEFAULT_LOOKUP
from rtl.lut_tile import LutTile
from rtl.modes import Modes
from rtl.products import DEFAULT_MULTIPLIER
from rtl.sop_tile import SopTile
from rtl.tile_units import tile_name, tile_parameters

__all__ = ["LutTileConfig", "TileConfig"]

_VARIABLE = "SOP_BENCH"

_Config = TypeVar("_Config", bound="TileConfig")


@dataclass(frozen=True)
class TileConfig:
    """One configuration of the tile and of its traffic, passed to the bench as JSON.

    Parameters
    ----------
    weights, activations : str
        Format of the weights, an atom with its scale, and of the activations; their blocks are
        equally long.
    rows, columns : int
    stalls : str
        One of :data:`tb.stalls.STALL_MODES`.
    seed : int
        Seed of the traffic and of the stalls.
    multiplier : str
        One of :data:`rtl.products.MULTIPLIERS`.
    """

    UNIT: ClassVar[tuple[str, str]] = ("rtl.sop_tile", "SopTile")

    weights: str = "HIF7^8sS1E5M5"
    activations: str = "INT8^8sUE8M0"
    rows: int = 4
    columns: int = 4
    stalls: str = "none"
    seed: int = 1
    multiplier: str = DEFAULT_MULTIPLIER

    @property
    def weight_format(self) -> QuantFormat:
        """The parsed format of the weights."""
        return parse_format(self.weights)

    @property
    def activation_format(self) -> ActivationFormat:
        """The parsed format of the activations."""
        fmt = parse_activation_format(self.activations)
        assert fmt is not None
        return fmt

    @property
    def name(self) -> str:
        """Name of the module."""
        return tile_name(
            self.weight_format, self.activation_format,
            rows=self.rows, columns=self.columns, multiplier=self.multiplier,
        )  # fmt: skip

    def build(self, unit_class: Any = SopTile) -> Any:
        """The unit."""
        return unit_class(
            rows=self.rows, columns=self.columns, multiplier=self.multiplier,
            **tile_parameters(self.weight_format, self.activation_format),
        )  # fmt: skip

    def as_environment(self) -> dict[str, str]:
        """Environment of the simulation."""
        return {_VARIABLE: json.dumps(dataclasses.asdict(self))}

    @classmethod
    def from_environment(cls: type[_Config]) -> _Config:
        """Configuration of the running simulation."""
        return cls(**json.loads(os.environ[_VARIABLE]))


@dataclass(frozen=True)
class LutTileConfig(TileConfig):
    """The same of :class:`rtl.lut_tile.LutTile`; ``weights`` is what comes out of the LUTs.

    Parameters
    ----------
    formats : str
        Stored formats of the weights, separated by spaces.
    hif_name : str
        Format of LUT entries.
    lookup : str
        One of :data:`rtl.lookup.LOOKUPS`.
    """

    UNIT = ("rtl.lut_tile", "LutTile")

    formats: str = "BOF4-NF4^8sS1E5M5"
    hif_name: str = "HIF7"
    lookup: str = DEFAULT_LOOKUP

    @property
    def modes(self) -> Modes:
        """The stored formats as the hardware sees them."""
        hif = HIF_FORMATS[self.hif_name]
        return Modes(tuple(parse_format(name, hif) for name in self.formats.split()))

    @property
    def name(self) -> str:
        """Name of the module."""
        return "lut_tile_under_test"

    def build(self, unit_class: Any = LutTile) -> Any:
        """The unit."""
        activations = self.activation_format
        return unit_class(
            rows=self.rows, columns=self.columns, modes=self.modes, lookup=self.lookup,
            activation=activations.element, activation_scale=activations.scale,
            multiplier=self.multiplier,
        )  # fmt: skip
