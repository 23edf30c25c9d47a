"""Options of ``sop verilog`` in the datasheet: legal values, and those of the example."""

from golden.activations import ACTIVATION_ELEMENTS
from golden.codebooks import BLOCK_SIZES
from golden.float_input import SOURCES
from golden.formats import HIF_FORMATS
from rtl.lookup import LOOKUPS
from rtl.modes import MAX_LANES, MAX_MODES
from rtl.products import MULTIPLIERS
from rtl.sop_tile import ELEMENTS, MAX_OUTPUTS
from rtl.tile_epilogue import MAX_SLOTS
from rtl.units import UNITS, options_of, outputs_of
from sim.timing.diagrams import diagrams_of

__all__ = ["legal_options"]


def legal_options(unit: str) -> list[tuple[str, str, str]]:
    """Options of ``sop verilog`` that shape a unit: option, legal values, value of the example."""
    takes, config = UNITS[unit].takes, diagrams_of(unit).example
    example = options_of(config.formats, **config.options)
    (fmt,) = example.formats
    whole = "format" in takes
    lanes = f"{BLOCK_SIZES[0] if whole else 1} to {MAX_LANES}"
    if whole:
        lanes += "; a multiple or a divisor of the smallest block size"
    sizes = ", ".join(map(str, BLOCK_SIZES))
    formats = (
        f"1 to {MAX_MODES} times; any format with blocks of {sizes}: LUTs of 16, 32 or 64 "
        "entries, one or two, or atoms; scale words up to 16 bits; row scales"
    )
    if "lookup" in takes and "activations" in takes:
        formats += "; together only those with one block size, scale format and element format"
    elif "slots" in takes:
        formats = f"one, with blocks of {sizes}; these and row scales, if it has any, count"
    elif "activations" in takes:
        elements = ", ".join(element.name for element in ELEMENTS)
        formats = (
            f"one, with blocks of {sizes}; atoms {elements}, or LUTs, whose entries are the "
            "elements then"
        )
    size = f"1 or more; at most {MAX_OUTPUTS:,} rows x columns"
    known = {
        "lanes": (lanes, str(example.lanes)),
        "rows": (size, str(example.rows)),
        "columns": (size, str(example.columns)),
        "format": (formats, fmt.name),
        "hif": (", ".join(HIF_FORMATS), fmt.hif.name),
        "output": (", ".join(outputs_of(unit)), example.output),
        "source": (", ".join(SOURCES), example.source),
        "lookup": (", ".join(LOOKUPS), example.lookup),
        "activations": (
            f"elements {', '.join(ACTIVATION_ELEMENTS)}; blocks of whole blocks of the weights, or "
            "one scale a token",
            example.activations.name,
        ),
        "multiplier": (", ".join(MULTIPLIERS), example.multiplier),
        "slots": (f"a power of two, 2 to {MAX_SLOTS:,}", str(example.slots)),
    }
    return [(f"--{option}", *known[option]) for option in takes]
