"""What vectors of different kinds say about a quantization format, and the LUTs they use."""

from typing import Any

import numpy as np

from golden.codebooks import FIXED_CODEBOOKS, Lut, fixed_lut
from golden.formats import HifFormat
from golden.notation import QuantFormat
from golden.vectors.files import VectorStream, word_fields

__all__ = ["describe_layer", "file_stem", "stand_in_luts", "vector_luts"]


def file_stem(fmt: QuantFormat) -> str:
    """File name of a format's vectors without extension: ``^`` replaced, LUT entries named."""
    name = fmt.name.replace("^", "_b")
    return name if fmt.atom is not None else f"{name}_{fmt.hif.name}"


def describe_layer(fmt: QuantFormat) -> dict[str, Any]:
    """Facts of a quantization format that a decoder needs."""
    fields = [(name, width) for name, width in reversed(fmt.word.fields) if width]
    return {
        "format": fmt.name,
        "elements": "number" if fmt.atom is not None else "lut",
        "element_format": fmt.atom.name if fmt.atom is not None else fmt.hif.name,
        "index_bits": fmt.index_bits,
        "block_size": fmt.block_size,
        "scale_format": fmt.word.scale.name,
        "scale_word_bits": fmt.word.width,
        "scale_word": word_fields(*fields),
        "lut_count": len(fmt.codebooks),
        "row_scale": fmt.row_scale,
    }


def _trained_stand_in(name: str, entries: int, hif: HifFormat) -> Lut:
    """LUT in place of a trained one: reproducible, irregular, ascending, on both sides of zero."""
    codes = list(hif.canonical.values())
    # Both ends stay near those of the format, as training leaves them.
    keys = VectorStream(f"lut/{name}/{hif.name}").words(len(codes))
    keys[[1, -2]] = -1
    picked = np.sort(np.argsort(keys, kind="stable")[:entries])
    return Lut(hif, tuple(codes[position] for position in picked.tolist()))


def stand_in_luts(fmt: QuantFormat, seed: str) -> tuple[Lut, ...]:
    """Arbitrary LUTs for a format, others for every seed."""
    return tuple(
        _trained_stand_in(f"{seed}/{position}", fmt.lut_entries, fmt.hif)
        for position in range(len(fmt.codebooks))
    )


def vector_luts(fmt: QuantFormat) -> tuple[Lut, ...]:
    """LUTs of a format's vectors: fixed codebooks, and stand-ins for trained and user ones."""
    return tuple(
        fixed_lut(name, fmt.block_size, fmt.hif)
        if name in FIXED_CODEBOOKS
        else _trained_stand_in(f"{name}/{position}", fmt.lut_entries, fmt.hif)
        for position, name in enumerate(fmt.codebooks)
    )
