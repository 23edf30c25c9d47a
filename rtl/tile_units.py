"""Tiles by the names of formats."""

from typing import Any

from golden.activations import ActivationFormat
from golden.errors import InputError
from golden.kernel import kernel_block_size
from golden.notation import QuantFormat
from rtl.products import DEFAULT_MULTIPLIER
from rtl.sop_tile import SopTile

__all__ = ["TILE_UNIT", "build_tile", "tile_name", "tile_parameters"]

TILE_UNIT = "sop_tile"
"""Name of the unit; it is not one of :data:`rtl.units.UNITS`, which have lanes."""


def tile_parameters(weights: QuantFormat, activations: ActivationFormat) -> dict[str, Any]:
    """Parameters of :class:`rtl.sop_tile.SopTile` that follow from the formats.

    Codebooks give elements in the format of their LUTs; row scales and metabits are not the tile's.

    Raises
    ------
    InputError
        If blocks of the activations are not whole blocks of the weights.
    """
    return {
        "block_size": kernel_block_size(weights, activations),
        "weight": weights.hif if weights.atom is None else weights.atom,
        "activation": activations.element,
        "weight_scale": weights.word.scale,
        "activation_scale": activations.scale,
    }


def build_tile(
    weights: QuantFormat, activations: ActivationFormat, *, rows: int, columns: int,
    multiplier: str = DEFAULT_MULTIPLIER,
) -> SopTile:  # fmt: skip
    """Make a tile.

    Raises
    ------
    InputError
        If the hardware cannot take the formats or the size.
    """
    try:
        return SopTile(
            rows=rows, columns=columns, multiplier=multiplier,
            **tile_parameters(weights, activations),
        )  # fmt: skip
    except ValueError as error:
        raise InputError(
            f"{TILE_UNIT} for {weights.name} and {activations.name}: {error}"
        ) from None


def tile_name(
    weights: QuantFormat, activations: ActivationFormat, *, rows: int, columns: int,
    multiplier: str = DEFAULT_MULTIPLIER,
) -> str:  # fmt: skip
    """Module and file name of a tile: every parameter that shapes the hardware."""
    shape = tile_parameters(weights, activations)
    weight, activation = (
        f"{shape[name].name}{shape[f'{name}_scale'].name}".lower()
        for name in ("weight", "activation")
    )
    name = f"{TILE_UNIT}_{rows}x{columns}_g{shape['block_size']}_{weight}_{activation}"
    return name if multiplier == DEFAULT_MULTIPLIER else f"{name}_{multiplier}"
