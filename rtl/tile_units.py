"""Parameters and names of tiles by their formats."""

from typing import Any

from golden.activations import ActivationFormat
from golden.kernel import kernel_block_size
from golden.notation import QuantFormat
from rtl.products import DEFAULT_MULTIPLIER

__all__ = ["TILE_UNIT", "tile_name", "tile_parameters"]

TILE_UNIT = "sop_tile"
"""Name of the unit in :data:`rtl.units.UNITS`."""


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
