"""Records of the units of the kernel: tiles, and what is around them."""

from typing import Any

from golden.activations import ActivationFormat
from golden.errors import InputError
from golden.kernel import kernel_block_size
from golden.notation import QuantFormat
from rtl.identity import format_part
from rtl.lut_tile import LATENCY as LUT_TILE_LATENCY
from rtl.lut_tile import LutTile
from rtl.matmul_tile import MatmulTile
from rtl.products import DEFAULT_MULTIPLIER
from rtl.sop_tile import LATENCY as TILE_LATENCY
from rtl.sop_tile import SopTile
from rtl.tile_epilogue import TileEpilogue
from rtl.unit_record import FLOAT_LAYOUTS, Options, Unit, shortened

__all__ = [
    "LUT_TILE",
    "MATMUL_TILE",
    "SOP_TILE",
    "TILE_EPILOGUE",
    "tile_name",
    "tile_parameters",
]

_OUTPUTS = tuple(FLOAT_LAYOUTS)


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
    name = f"sop_tile_{rows}x{columns}_g{shape['block_size']}_{weight}_{activation}"
    return name if multiplier == DEFAULT_MULTIPLIER else f"{name}_{multiplier}"


_ADDER = ("partial_0", "partial_1", "partial_2")  # registers of :mod:`rtl.parts.float_adder`


def _tile_parts(options: Options) -> dict[str, str]:
    # A name of :mod:`rtl.parts` that the tile has, too, ends in a number behind a dollar sign.
    of_adder = [r"partial_\d\$\d+", *_ADDER[options.rows * options.columns :]]
    return {
        "integer products": r"partial_\d+",
        "second register": r"block_\d+_0",
        "scale units": r"unit_\d+_[a-z]+_0|product_\d(\$\d+)?|result(\$\d+)?",
        "accumulators": "|".join(
            [*of_adder, r"normalized(\$\d+)?|\$signal(\$\d+)?|overflow(\$\d+)?|unit_\d+_\d+"]
        ),
    }


def _weights_of_tile(options: Options) -> QuantFormat:
    if len(options.formats) != 1:
        raise InputError(f"takes one format, not {len(options.formats)}")
    return options.formats[0]


def _tile_arguments(options: Options) -> dict[str, Any]:
    return {
        "rows": options.rows,
        "columns": options.columns,
        "multiplier": options.multiplier,
        **tile_parameters(_weights_of_tile(options), options.activations),
    }


def _tile_name(options: Options) -> str:
    return tile_name(
        _weights_of_tile(options), options.activations,
        rows=options.rows, columns=options.columns, multiplier=options.multiplier,
    )  # fmt: skip


def _lut_tile_arguments(options: Options) -> dict[str, Any]:
    return {
        "rows": options.rows,
        "columns": options.columns,
        "modes": options.modes,
        "lookup": options.lookup,
        "activation": options.activations.element,
        "activation_scale": options.activations.scale,
        "multiplier": options.multiplier,
    }


def _lut_tile_parts(name: str, options: Options) -> list[str]:
    activations = options.activations
    return [
        f"{name}_{options.rows}x{options.columns}",
        *sorted({fmt.hif.name.lower() for fmt in options.formats if fmt.codebooks}),
        *map(format_part, options.formats),
        f"{activations.element.name}{activations.scale.name}".lower(),
        options.lookup,
        options.multiplier,
    ]


def _lut_tile_name(options: Options) -> str:
    return shortened(_lut_tile_parts("lut_tile", options), options.formats)


def _matmul_tile_arguments(options: Options) -> dict[str, Any]:
    return {
        **_lut_tile_arguments(options),
        "slots": options.slots,
        "float_layout": FLOAT_LAYOUTS[options.output],
    }


def _matmul_tile_name(options: Options) -> str:
    parts = [*_lut_tile_parts("matmul_tile", options), str(options.slots), options.output]
    return shortened(parts, options.formats)


def _epilogue_arguments(options: Options) -> dict[str, Any]:
    return {
        "rows": options.rows,
        "columns": options.columns,
        "block_size": options.modes.block_size,
        "activation": options.activations.element,
        "activation_scale": options.activations.scale,
        "slots": options.slots,
        "row_scales": options.modes.row_scale,
        "float_layout": FLOAT_LAYOUTS[options.output],
    }


def _epilogue_name(options: Options) -> str:
    activations = options.activations
    parts = [
        f"tile_epilogue_{options.rows}x{options.columns}",
        f"g{options.modes.block_size}{'r' * options.modes.row_scale}",
        f"{activations.element.name}{activations.scale.name}".lower(),
        str(options.slots),
        options.output,
    ]
    return "_".join(parts)


SOP_TILE = Unit(
    "sop_tile", SopTile, ("rows", "columns", "format", "hif", "activations", "multiplier"),
    {"i": "tile_weights", "i_activation": "tile_activations", "o": "tile_outputs"},
    latency=TILE_LATENCY,
    arguments=_tile_arguments, module_name=_tile_name, parts=_tile_parts,
)  # fmt: skip

LUT_TILE = Unit(
    "lut_tile", LutTile,
    ("rows", "columns", "format", "hif", "lookup", "activations", "multiplier"),
    {
        "i": "tile_indices", "i_lut": "lut_write", "i_activation": "tile_activations",
        "o": "tile_outputs",
    },
    latency=LUT_TILE_LATENCY, arguments=_lut_tile_arguments, module_name=_lut_tile_name,
)  # fmt: skip

TILE_EPILOGUE = Unit(
    "tile_epilogue", TileEpilogue,
    ("rows", "columns", "format", "activations", "slots", "output"),
    {
        "i": "tile_outputs", "i_row_scale": "tile_row_scales",
        "i_activation": "epilogue_activations", "i_column": "correction_column",
        "i_correction": "tile_correction", "o": "epilogue_outputs",
    },
    latency=None, throughput="one correction of all tokens per clock", outputs=_OUTPUTS,
    arguments=_epilogue_arguments, module_name=_epilogue_name,
)  # fmt: skip

MATMUL_TILE = Unit(
    "matmul_tile", MatmulTile,
    ("rows", "columns", "format", "hif", "lookup", "activations", "multiplier", "slots", "output"),
    {
        "i": "tile_indices", "i_lut": "lut_write", "i_row_scale": "tile_row_scales",
        "i_activation": "epilogue_activations", "i_column": "correction_column",
        "i_correction": "tile_correction", "o": "epilogue_outputs",
    },
    latency=None, throughput="rows x columns products per clock", outputs=_OUTPUTS,
    arguments=_matmul_tile_arguments, module_name=_matmul_tile_name,
)  # fmt: skip
