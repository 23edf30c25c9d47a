"""Counts that the documentation names are those of the tests: typed by hand they would rot."""

import runpy
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

import pytest

from golden.checkpoint import QuantizedInfo
from golden.checkpoint.layout import field_infos
from golden.formats import ATOMS, BF16, UE8M0, FloatFormat, Kind, NumberFormat, scale_format
from golden.notation import parse_format
from golden.vectors.broken_checkpoints import BROKEN
from sop.quantizing.settings_keys import keys_markdown

ROOT = Path(__file__).parents[2]

WORDS = {6: "six", 7: "seven", 8: "eight", 9: "nine", 10: "ten", 11: "eleven", 12: "twelve"}


def defined_in(path: str) -> dict[str, Any]:
    """What a module of tests defines, without running its tests."""
    return runpy.run_path(str(ROOT / path))


def cases(test: Any) -> int:
    """How many a test is parametrized with."""
    (mark,) = test.pytestmark
    return len(mark.args[1])


def counts() -> dict[str, str]:
    """Pieces of docs/verification.md, by what they count."""
    units, axi = (
        defined_in("tests/rtl/test_rtl_faults.py"),
        defined_in("tests/rtl/test_axi_faults.py"),
    )
    tile = defined_in("tests/rtl/test_sop_tile_faults.py")
    lut_tile = defined_in("tests/rtl/test_lut_tile_rtl.py")
    epilogue = defined_in("tests/rtl/test_tile_epilogue_rtl.py")
    converter, power_up = (
        defined_in(f"tests/rtl/test_{name}.py") for name in ("float_to_hif_rtl", "power_up")
    )
    axi_rtl, shrink, units_rtl = (
        defined_in(f"tests/rtl/test_{name}.py") for name in ("axi_rtl", "shrink", "units_rtl")
    )
    determinism = defined_in("golden/tests/test_determinism.py")
    kernel = defined_in("golden/tests/test_kernel.py")
    additions = defined_in("tb/sparse_merge_bench.py")["PAIRS"]

    examples, all_examples = shrink["EXAMPLES"], shrink["ALL_EXAMPLES"]
    faults, more = len(axi["FAULTS"]), len(axi["MORE_FAULTS"])
    seeds, configurations = axi_rtl["seeds_on"], len(axi_rtl["CONFIGS"])
    # Without --all-simulations Verilator, which builds slowly, has the first configuration only.
    few = seeds("verilator", thorough=False) + configurations * seeds("icarus", thorough=False)
    many = configurations * sum(seeds(name, thorough=True) for name in ("verilator", "icarus"))
    registers = cases(power_up["test_a_register_without_reset_is_noticed"])
    sizes = cases(units_rtl["test_full_rate_at_every_size"])
    return {
        "faults of units": f"{len(units['FAULTS'])} wrong versions of the units",
        "faults of FloatToHif": f"{len(converter['FAULTS'])} of `FloatToHif`",
        "faults of the AXI decoder": (
            f"{faults} of the AXI decoder, {faults + more} with `make test-all`"
        ),
        "faults of the tile": (
            f"{len(tile['FAULTS'])} of `SopTile`, "
            f"{len(tile['FAULTS']) + len(tile['MORE_FAULTS'])} with `make test-all`"
        ),
        "faults of the tile with LUTs": (
            f"{len(lut_tile['FAULTS'])} of `LutTile`, "
            f"{len(lut_tile['FAULTS']) + len(lut_tile['MORE_FAULTS'])} with `make test-all`"
        ),
        "faults of the epilogue": (
            f"{len(epilogue['FAULTS'])} of `TileEpilogue`, "
            f"{len(epilogue['FAULTS']) + len(epilogue['MORE_FAULTS'])} with `make test-all`"
        ),
        "shapes of the epilogue": f"{WORDS[len(epilogue['CONFIGS'])]} shapes with `make test-all`",
        "AXI seeds": f"{few} seeds at every change, {many:,} with `make test-all`",
        "additions": f"{additions:,} additions of every kind",
        "examples": f"{examples:,} examples a unit, {all_examples:,} with `make test-all`",
        "registers": f"{WORDS[registers]} registers without reset are noticed",
        "sizes": f"{WORDS[sizes]} sizes",
        "formats": f"{WORDS[len(units_rtl['MIXED'].split())]} formats in one decoder",
        "activation formats": f"{len(kernel['ACTIVATION_NAMES'])} formats of activations",
        "kinds": f"{WORDS[len(determinism['CASES'])]} kinds of quantization",
    }


COUNTS = counts()


@pytest.mark.parametrize("what", COUNTS)
def test_counts_of_the_verification_page(what: str) -> None:
    text = (ROOT / "docs" / "verification.md").read_text(encoding="utf-8")
    assert COUNTS[what] in text


def test_counts_of_the_vectors_page() -> None:
    text = (ROOT / "docs" / "vectors.md").read_text(encoding="utf-8")
    faults = defined_in("golden/tests/test_vectors.py")["FAULTS"]
    breaks = defined_in("tests/docs/test_second_implementation.py")["BREAKS"]
    assert f"with the {len(BROKEN)} broken files" in text
    assert f"notices {len(faults)} ways of breaking the golden model" in text
    assert f"notices {len(breaks)} ways of breaking a rule" in text


# ------------------------------------------------------------------------- tables of docs/decode.md


def power(value: Fraction) -> str:
    """An exact value: an integer where it is short, else an odd integer times a power of two."""
    if value < 0:
        return f"-{power(-value)}"
    if value.denominator == 1 and value < 10_000:
        return str(value)
    odd, exponent = value.numerator, 1 - value.denominator.bit_length()
    while odd % 2 == 0:
        odd, exponent = odd // 2, exponent + 1
    return f"2^{exponent}" if odd == 1 else f"{odd} x 2^{exponent}"


def number_row(fmt: NumberFormat) -> str:
    """What docs/decode.md says of a number format."""
    fields = ", ".join(
        name if (name, width) == ("sign", 1) else f"{width} {name}"
        for name, width in reversed(fmt.fields)
        if width
    )
    codes = [code for code in range(1 << fmt.width) if fmt.decode(code).kind is Kind.NAN]
    reserved = [code for code in range(1 << fmt.width) if fmt.decode(code).kind is Kind.RESERVED]
    invalid = f"{', '.join(map(hex, codes))}: NaN" if codes else "none"
    if reserved:
        first, last = hex(reserved[0]), hex(reserved[-1])
        invalid = f"{first}: reserved" if first == last else f"{first} to {last}: reserved"
    if fmt is BF16:  # in two ranges, one for each sign
        invalid = "exponent all ones: reserved"
    if isinstance(fmt, FloatFormat):
        fields += f"; bias {fmt.bias}"
    smallest = next(value for value in fmt.canonical if value > 0)
    ends = (smallest, fmt.min_value, fmt.max_value)
    row = [fmt.name, fmt.width, fields, invalid, fmt.distinct_values, *map(power, ends)]
    return f"| {' | '.join(map(str, row))} |"


def scale_row(exponent_bits: int) -> str:
    """Ends of the scale formats with so many exponent bits, as formulas in m."""
    finest = scale_format(f"UE{exponent_bits}M7")
    bias, top = finest.bias, finest.max_exponent + 7  # exponent of the hidden bit of the top binade
    for m in range(8):
        fmt = scale_format(f"S1E{exponent_bits}M{m}")
        assert fmt.max_value == -fmt.min_value == (2 - Fraction(1, 1 << m)) * Fraction(2) ** top
        smallest = Fraction(2) ** (1 - bias - m)
        assert next(value for value in fmt.canonical if value > 0) == smallest
    return f"| {exponent_bits} | {bias} | 2^({1 - bias} - m) | (2 - 2^-m) x 2^{top} |"


def size_row(name: str, rows: int, columns: int) -> str:
    """Sizes of a tensor in a checkpoint, from the layout that the reader demands."""
    fmt = parse_format(name)
    info = QuantizedInfo(fmt, (rows, columns), 0, "F32")
    sizes = {field: prod(raw.shape) for field, raw in field_infos(info, None).items()}
    sizes["row_scales"] = 2 * sizes.get("row_scales", 0)
    size = fmt.block_size or rows * columns
    stored = -(-columns // size) * size if fmt.block_size else columns
    blocks = rows * stored // size
    assert 8 * sum(sizes.values()) == fmt.stored_bits(rows, columns)
    fields = [sizes.get(field) or "" for field in ("indices", "scales", "luts", "row_scales")]
    row = [f"`{name}`", fmt.index_bits, fmt.word.width, size, stored, blocks, *fields]
    return f"| {' | '.join(map(str, [*row, sum(sizes.values())]))} |"


SIZED = (
    "NF4sUE4M4", "BOF4-NF4sS1E5M5", "DD5-DD5^8sS1E4M3", "DD6-DD6^64sRS1E2M4", "E2M1^32sUE8M0",
    "E2M3^0sUE8M0", "E5M6sUE4M4",
)  # fmt: skip


def table(document: str, heading: str) -> list[str]:
    """Rows of the table whose heading begins so."""
    lines = document.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(heading)) + 2
    return lines[start : lines.index("", start)]


def test_tables_of_the_decoder_page_are_those_of_the_code() -> None:
    document = (ROOT / "docs" / "decode.md").read_text(encoding="utf-8")
    assert table(document, "| Format | bits |") == [
        number_row(fmt) for fmt in (*ATOMS.values(), BF16, UE8M0)
    ]
    assert table(document, "| e | bias |") == [scale_row(bits) for bits in range(2, 8)]
    assert table(document, "| Format | n |") == [size_row(name, 5, 100) for name in SIZED]


def test_keys_of_settings_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "quantize.md").read_text(encoding="utf-8")
    assert "\n".join(["", *keys_markdown(), ""]) in text
