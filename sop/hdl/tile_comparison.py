"""What a tile is compared with, and the tables of tiles in the resource table."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from golden.activations import ACTIVATION_ELEMENTS
from golden.formats import E2M1, E2M3, E4M3, HIF7, HIF8T, INT8
from golden.kernel import kernel_block_size
from golden.notation import parse_format
from rtl.float_tile import FloatTile
from rtl.units import FLOAT_LAYOUTS, SOP_TILE, Options, Unit
from sop.shared.markdown import markdown_table

__all__ = ["Configuration", "compared", "tile_tables"]


@dataclass(frozen=True)
class Configuration:
    """One unit to synthesize.

    Parameters
    ----------
    unit : Unit
    options : Options
    placed : bool
        It is placed and routed, too.
    beside : str
        Module that it is compared with; empty if it is there for itself.
    """

    unit: Unit
    options: Options
    placed: bool = False
    beside: str = ""

    @property
    def module(self) -> str:
        """Name of its module."""
        return self.unit.module(self.options)


def _float_arguments(options: Options) -> dict[str, Any]:
    return {
        "rows": options.rows,
        "columns": options.columns,
        "weights": options.formats[0],
        "float_layout": FLOAT_LAYOUTS[options.output],
    }


def _float_name(options: Options) -> str:
    weights = options.formats[0]
    element = f"{weights.hif.name}{weights.word.scale.name}".lower()
    return f"float_tile_{options.rows}x{options.columns}_{element}_{options.output}"


def _float_parts(options: Options) -> dict[str, str]:
    return {
        "weights to float": r"decoder_\d+\..*",
        "float products": r"product_\d(\$\d+)?|result(\$\d+)?",
        "accumulators": r"partial_\d(\$\d+)?|normalized(\$\d+)?|values",
    }


FLOAT_TILE = Unit(
    "float_tile", FloatTile, ("rows", "columns", "format", "hif", "output"), {}, latency=None,
    outputs=tuple(FLOAT_LAYOUTS), arguments=_float_arguments, module_name=_float_name,
    parts=_float_parts,
)  # fmt: skip
"""A float accumulator for each product; not exported."""

_ELEMENTS = (
    (HIF7, INT8), (HIF8T, INT8), (INT8, INT8), (E2M1, E2M1), (E2M3, E2M3), (E4M3, E4M3),
)  # fmt: skip


def compared(options: Options) -> list[Configuration]:
    """Tiles of the same size, block size and scales with other elements, and float tiles.

    Parameters
    ----------
    options : Options
        Of the tile that they stand beside.
    """
    weights, activations = options.formats[0], options.activations
    size = kernel_block_size(weights, activations)
    element = weights.hif if weights.atom is None else weights.atom
    beside = SOP_TILE.module(options)
    found = []
    for first, second in _ELEMENTS:
        assert second.name in ACTIVATION_ELEMENTS
        if (first, second) == (element, activations.element):
            continue
        other = dataclasses.replace(
            options,
            formats=(parse_format(f"{first.name}^{size}s{weights.word.scale.name}"),),
            activations=dataclasses.replace(activations, element=second),
        )
        found.append(Configuration(SOP_TILE, other, beside=beside))
    found += [
        Configuration(FLOAT_TILE, dataclasses.replace(options, output=output), beside=beside)
        for output in FLOAT_TILE.outputs
    ]
    return found


def tile_tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line a tile and target: all of it, and what one of its products costs, part by part.

    Of a tile that stands beside another also how many times as much a product costs as there.
    """
    columns = ["tile", "target", "GE or LUTs", "a product", "times", "of it", "flip-flops",
               "a product", "times", "of it", "other cells", "gates deep", "Fmax, MHz"]  # fmt: skip
    known = {(row["module"], row["target"]): row["per_product"]["all"] for row in rows}
    lines = []
    for row in rows:
        logic = "gate_equivalents" if "gate_equivalents" in row else "luts"
        figures = row["per_product"]

        def shares(figure: str, figures: Mapping[str, Any] = figures) -> str:
            return ", ".join(
                f"{part} {figures[part][figure]:,}" for part in figures if part != "all"
            )

        other = known.get((row.get("beside", ""), row["target"]), {})

        def times(
            figure: str, figures: Mapping[str, Any] = figures, other: Mapping[str, Any] = other
        ) -> str:
            return f"{figures['all'][figure] / other[figure]:.2f}" if other.get(figure) else ""

        lines.append(
            [
                f"`{row['module']}`",
                row["target"],
                f"{row[logic]:,}",
                f"{figures['all'][logic]:,}",
                times(logic),
                shares(logic),
                f"{row['flip_flops']:,}",
                f"{figures['all']['flip_flops']:,}",
                times("flip_flops"),
                shares("flip_flops"),
                ", ".join(f"{count:,} {cell}" for cell, count in row["other"].items()),
                row.get("logic_depth", ""),
                row.get("fmax_mhz", ""),
            ]
        )
    return markdown_table(columns, lines)
