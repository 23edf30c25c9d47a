"""Configuration of the bench of :class:`rtl.sop_tile.SopTile`; needs no simulator."""

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any

from golden.activations import ActivationFormat, parse_activation_format
from golden.notation import QuantFormat, parse_format
from rtl.products import DEFAULT_MULTIPLIER
from rtl.sop_tile import SopTile
from rtl.tile_units import tile_name, tile_parameters

__all__ = ["TileConfig"]

_VARIABLE = "SOP_BENCH"


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

    def build(self, unit_class: Any = SopTile) -> SopTile:
        """The unit."""
        return unit_class(
            rows=self.rows, columns=self.columns, multiplier=self.multiplier,
            **tile_parameters(self.weight_format, self.activation_format),
        )  # fmt: skip

    def as_environment(self) -> dict[str, str]:
        """Environment of the simulation."""
        return {_VARIABLE: json.dumps(dataclasses.asdict(self))}

    @staticmethod
    def from_environment() -> "TileConfig":
        """Configuration of the running simulation."""
        return TileConfig(**json.loads(os.environ[_VARIABLE]))
