"""Names by which software tells one piece of hardware, and one format, from another.

A name is text of everything that decides what comes out; its identification is the first 32 bits of
the SHA-256 of the text. Registers, C header, descriptions and checkpoints all take it from here.
"""

import hashlib
from collections.abc import Sequence

from golden.notation import QuantFormat
from rtl.registers import MAP_VERSION

__all__ = ["build_text", "format_part", "format_text", "hexadecimal", "identification"]


def identification(text: str) -> int:
    """First 32 bits of the SHA-256 of a text, most significant first as hexadecimals show them."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def hexadecimal(value: int) -> str:
    """An identification as files and reports show it."""
    return f"0x{value:08x}"


def format_part(fmt: QuantFormat) -> str:
    """Everything of a format but codebook names and the format of LUT entries.

    ``m`` marks a metabit and so two LUTs, ``r`` a row scale: ``lut4g16ms1e5m5``, ``e2m3g16ue4m4``.
    """
    element = fmt.atom.name.lower() if fmt.atom else f"lut{fmt.index_bits}"
    marks = "r" * fmt.row_scale + "m" * fmt.word.metabit_bits
    return f"{element}g{fmt.block_size}{marks}{fmt.word.scale.name.lower()}"


def format_text(fmt: QuantFormat) -> str:
    """Name of what a tensor's planes and LUTs mean: ``hif8t_lut4g16ms1e5m5``; of atoms without HIF.

    Two formats that differ in codebook names only have the same: LUT contents are in the file.
    """
    hif = f"{fmt.hif.name.lower()}_" if fmt.codebooks else ""
    return hif + format_part(fmt)


def build_text(formats: Sequence[QuantFormat], *, lut_entry: str, lanes: int, output: str) -> str:
    """Name of an AXI decoder: all that software has to know of it.

    Parameters
    ----------
    formats : sequence of QuantFormat
        In the order of ``MODE``.
    lut_entry : str
        Format of LUT entries, and of the codes of E2M3.
    lanes : int
    output : str
        One of :data:`rtl.registers.OUTPUTS`.
    """
    version = ".".join(map(str, MAP_VERSION))
    names = ",".join(format_text(fmt) for fmt in formats)
    return (
        f"sop_decoder_axi {version} lanes={lanes} output={output} "
        f"lut_entry={lut_entry.lower()} formats={names}"
    )
