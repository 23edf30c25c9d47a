"""Configurations of the benches of tiles; needs no simulator."""

from dataclasses import dataclass
from typing import Any

from golden.activations import ActivationFormat, parse_activation_format
from golden.notation import QuantFormat, parse_format
from rtl.lookup import DEFAULT_LOOKUP
from rtl.modes import Modes
from rtl.products import DEFAULT_MULTIPLIER
from rtl.sop_tile import SopTile
from rtl.units import SOP_TILE, build_unit, configuration_name
from sim.bench_config import Config, parse_formats

__all__ = ["EpilogueConfig", "LutTileConfig", "MatmulConfig", "TileConfig"]


@dataclass(frozen=True)
class TileConfig(Config):
    """One configuration of the tile and of its traffic.

    Parameters
    ----------
    weights, activations : str
        Format of the weights, an atom with its scale, and of the activations; their blocks are
        equally long.
    rows, columns : int
    stalls : str
        One of :data:`sim.stalls.STALL_MODES`.
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
    def formats(self) -> tuple[QuantFormat, ...]:
        """The parsed format of the weights."""
        return (self.weight_format,)

    @property
    def options(self) -> dict[str, Any]:
        """Size, activations and multiplier."""
        return {
            "rows": self.rows, "columns": self.columns, "multiplier": self.multiplier,
            "activations": self.activation_format,
        }  # fmt: skip

    @property
    def name(self) -> str:
        """Name of the module."""
        return configuration_name(SOP_TILE.name, self.formats, **self.options)

    def build(self) -> SopTile:
        """The unit."""
        tile = build_unit(SOP_TILE.name, self.formats, **self.options)
        assert isinstance(tile, SopTile)
        return tile


@dataclass(frozen=True)
class LutTileConfig(TileConfig):
    """The same of :class:`rtl.lut_tile.LutTile`; ``weights`` is what comes out of the LUTs.

    Parameters
    ----------
    stored : str
        Stored formats of the weights, separated by spaces.
    hif_name : str
        Format of LUT entries.
    lookup : str
        One of :data:`rtl.lookup.LOOKUPS`.
    """

    stored: str = "BOF4-NF4^8sS1E5M5"
    hif_name: str = "HIF7"
    lookup: str = DEFAULT_LOOKUP

    @property
    def formats(self) -> tuple[QuantFormat, ...]:
        """The parsed stored formats."""
        return parse_formats(self.stored, self.hif_name)

    @property
    def modes(self) -> Modes:
        """The stored formats as the hardware sees them."""
        return Modes(self.formats)

    @property
    def options(self) -> dict[str, Any]:
        """Also the structure of the lookup."""
        return {**super().options, "lookup": self.lookup}


@dataclass(frozen=True)
class EpilogueConfig(TileConfig):
    """The same of :class:`rtl.tile_epilogue.TileEpilogue`; ``weights`` may have row scales.

    Parameters
    ----------
    slots : int
        Most input channels of a tile that have corrections.
    output : str
        ``"float32"`` or ``"bfloat16"``.
    """

    weights: str = "NF4^8sRUE4M4"
    slots: int = 8
    output: str = "float32"

    @property
    def options(self) -> dict[str, Any]:
        """Also slots and output."""
        return {**super().options, "slots": self.slots, "output": self.output}


@dataclass(frozen=True)
class MatmulConfig(LutTileConfig):
    """The same of :class:`rtl.matmul_tile.MatmulTile`.

    Parameters
    ----------
    slots : int
        Most input channels of a tile that have corrections.
    output : str
        ``"float32"`` or ``"bfloat16"``.
    """

    slots: int = 8
    output: str = "float32"

    @property
    def options(self) -> dict[str, Any]:
        """Also slots and output."""
        return {**super().options, "slots": self.slots, "output": self.output}
