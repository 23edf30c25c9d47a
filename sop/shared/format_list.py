"""What ``sop formats`` lists."""

from typing import Any

from golden.codebooks import FIXED_CODEBOOKS, fixed_lut
from golden.formats import ATOMS, HIF_FORMATS, NumberFormat, scale_format
from golden.notation import DEFAULT_BLOCK_SIZE, QuantFormat, parse_format

__all__ = ["KNOWN_FORMATS", "KNOWN_SCALES", "describe_format", "format_list"]

KNOWN_SCALES = (
    "UE4M3", "UE4M4", "UE5M3", "UE5M5", "UE5M7", "S1E2M4", "S1E4M3", "S1E5M5", "UE8M0", "BF16",
)  # fmt: skip
"""Scale formats that the paper or this project uses; others work too."""

KNOWN_FORMATS = {
    "BOF4sS1E4M3": "one fixed codebook, signed 8-bit scale word",
    "NF4sUE4M4": "one fixed codebook, unsigned 8-bit scale word",
    "BOF4-NF4sUE4M3": "fixed pair, metabit in an 8-bit scale word",
    "BOF4-NF4sS1E5M5": "fixed pair, sign and metabit in a 12-bit scale word; the default",
    "NF4-BOF4sS1E5M5": "the same pair in the other order",
    "NF4-DD4sRS1E2M4": "pair with a trained codebook, 8-bit scale word and a scale per row",
    "NF4-DD4sS1E5M5": "pair with a trained codebook",
    "DD6sS1E4M3": "one trained codebook of 64 levels",
    "E2M1^32sUE8M0": "MXFP4",
    "E2M3^32sUE8M0": "MXFP6",
    "E4M3^32sUE8M0": "MXFP8",
    "E2M3sUE4M4": "the paper's 6.5-bit point",
    "HIF7sUE4M4": "HIF7 as an element",
    "INT8sUE5M3": "8-bit integers",
    "E4M3^0sUE8M0": "FP8 with one power-of-two scale per layer, the paper's baseline",
    "E3M4sUE4M4": "promotion to FP8",
    "E4M5sUE4M4": "promotion to FP10",
    "E5M6sUE4M4": "promotion to FP12",
}
"""Format names worth knowing, with a note each."""


def _describe_number(fmt: NumberFormat) -> dict[str, Any]:
    return {
        "name": fmt.name,
        "bits": fmt.width,
        "distinct_values": fmt.distinct_values,
        "min": float(fmt.min_value),
        "max": float(fmt.max_value),
    }


def describe_format(fmt: QuantFormat, note: str = "") -> dict[str, Any]:
    """Facts of one quantization format as JSON-ready values."""
    return {
        "name": fmt.name,
        "bits_per_weight": float(fmt.bits_per_weight),
        "index_bits": fmt.index_bits,
        "block_size": fmt.block_size,
        "scale_word_bits": fmt.word.width,
        "scale": fmt.word.scale.name,
        "metabit": bool(fmt.word.metabit_bits),
        "row_scale": fmt.row_scale,
        "elements": fmt.atom.name if fmt.atom else "-".join(fmt.codebooks),
        "lut_entry_format": None if fmt.atom else fmt.hif.name,
        "note": note,
    }


def format_list() -> dict[str, list[dict[str, Any]]]:
    """Every atom and codebook, and the scales and block formats worth knowing."""
    codebooks = []
    for name in FIXED_CODEBOOKS:
        tables = {
            hif.name: fixed_lut(name, DEFAULT_BLOCK_SIZE, hif).values.tolist()
            for hif in HIF_FORMATS.values()
        }
        codebooks.append({"name": name, "block_size": DEFAULT_BLOCK_SIZE, "levels": tables})
    return {
        "atoms": [_describe_number(fmt) for fmt in ATOMS.values()],
        "scales": [_describe_number(scale_format(name)) for name in KNOWN_SCALES],
        "codebooks": codebooks,
        "formats": [
            describe_format(parse_format(name), note) for name, note in KNOWN_FORMATS.items()
        ],
    }
