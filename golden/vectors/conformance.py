"""The whole set of conformance vectors: which files a level has, and the manifest of them.

docs/vectors.md describes the files for those who read them.
"""

import enum
import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any

from golden.formats import (
    ATOMS,
    BF16,
    HIF7,
    HIF8,
    HIF8T,
    UE8M0,
    HifFormat,
    NumberFormat,
    scale_format,
)
from golden.notation import QuantFormat, parse_format
from golden.vectors.blocks import block_file
from golden.vectors.checkpoints import checkpoint_jobs
from golden.vectors.decoding import (
    decode_table_bits,
    decode_table_file,
    product_file,
    tensor_file,
)
from golden.vectors.files import VectorFile, VectorJob, json_text
from golden.vectors.kernel import kernel_file
from golden.vectors.layers import file_stem
from golden.vectors.numbers import codebook_file, encode_file, number_file

__all__ = [
    "DEFAULT_FORMATS",
    "TITLE",
    "VECTOR_VERSION",
    "Level",
    "manifest_entry",
    "manifest_text",
    "jobs",
]

VECTOR_VERSION = 2
"""Version of layout and meaning; changes whenever a reader would have to change."""


TITLE = "scaled outer product: conformance vectors"
"""What every manifest begins with."""


class Level(enum.Enum):
    """How much a set covers."""

    QUICK = "quick"
    EXHAUSTIVE = "exhaustive"


DEFAULT_FORMATS: tuple[tuple[str, HifFormat], ...] = (
    # Codebooks: indices of 4, 5 and 6 bits, words of 8 to 16 bits, single and in pairs.
    ("NF4sUE4M4", HIF7),
    ("BOF4sS1E4M3", HIF7),
    ("NF4^8sUE5M5", HIF8T),
    ("BOF4^32sUE8M0", HIF8),
    ("NF4^64sBF16", HIF8T),
    ("NF4T^8sUE5M0", HIF7),  # a power of two with f, and no level at zero
    ("BOF4-NF4sUE4M3", HIF7),
    ("BOF4-NF4sS1E5M5", HIF7),
    ("NF4-BOF4sS1E5M5", HIF8),
    ("SH4-Split87^32sS1E5M3", HIF8),
    ("DD4-DD4^8sS1E7M7", HIF8),
    ("DD5sUE5M7", HIF8T),
    ("DD5-DD5sS1E4M3", HIF7),
    ("DD6sS1E4M3", HIF7),
    ("DD6-DD6sS1E5M3", HIF8T),
    ("NF4-DD4sRS1E2M4", HIF7),
    # Elements that are numbers: 4, 6, 7, 8, 10 and 12 bits.
    ("E2M1^32sUE8M0", HIF7),
    ("INT4sS1E4M3", HIF7),
    ("E2M3sUE4M4", HIF7),
    ("E3M2^8sS1E2M4", HIF7),
    ("E2M3^32sUE8M0", HIF7),
    ("HIF7sUE4M4", HIF7),
    ("E4M3^32sUE8M0", HIF7),
    ("E4M3^0sUE8M0", HIF7),
    ("INT8sUE5M3", HIF7),
    ("HIF8T^64sUE5M5", HIF7),
    ("E3M4sUE4M4", HIF7),
    ("E4M5sUE5M7", HIF7),
    ("E5M6sUE4M4", HIF7),
)
"""Names and LUT entry formats of a set for which no formats are asked."""

# Address bits of the largest decode tables: 4096 words quick, a million exhaustive.
_MAX_TABLE_BITS = {Level.QUICK: 12, Level.EXHAUSTIVE: 20}
_RANDOM_PRODUCTS = {Level.QUICK: 1024, Level.EXHAUSTIVE: 65536}
_RANDOM_MATRICES = {Level.QUICK: 1, Level.EXHAUSTIVE: 16}
_RANDOM_KERNELS = {Level.QUICK: 1, Level.EXHAUSTIVE: 2}


def _unique(formats: list[QuantFormat]) -> list[NumberFormat]:
    """Number formats that occur in quantization formats, each once, in order."""
    found: dict[str, NumberFormat] = {}
    for fmt in formats:
        element = fmt.hif if fmt.atom is None else fmt.atom
        row_scale = [BF16] if fmt.row_scale else []
        for number in (element, fmt.word.scale, *row_scale):
            found[number.name] = number
    return list(found.values())


def _every_scale() -> list[NumberFormat]:
    names = [
        f"{sign}E{exponent}M{mantissa}"
        for sign in ("U", "S1")
        for exponent in range(2, 8)
        for mantissa in range(8)
    ]
    return [*(scale_format(name) for name in names), UE8M0, BF16]


def _number_formats(
    level: Level, formats: list[QuantFormat], *, restricted: bool
) -> list[NumberFormat]:
    """Number formats of a set: those used; without a restriction every element format too."""
    used = _unique(formats)
    if restricted:
        return used
    scales = _every_scale() if level is Level.EXHAUSTIVE else used
    by_name = {fmt.name: fmt for fmt in (*ATOMS.values(), *scales)}
    return list(by_name.values())


def jobs(level: Level, formats: Sequence[QuantFormat] = ()) -> list[VectorJob]:
    """Every file of a set but the manifest, in the order of the manifest.

    Parameters
    ----------
    level : Level
    formats : sequence of QuantFormat, optional
        Restrict the set to these and the number formats in them; :data:`DEFAULT_FORMATS` and every
        element format if empty. At the exhaustive level every scale format too.
    """
    chosen = list(formats) or [parse_format(name, hif) for name, hif in DEFAULT_FORMATS]
    exhaustive = level is Level.EXHAUSTIVE
    numbers = _number_formats(level, chosen, restricted=bool(formats))
    found = [
        VectorJob("numbers", f"{fmt.name}.json", partial(number_file, fmt, exhaustive=exhaustive))
        for fmt in numbers
    ]
    found += [
        VectorJob("encode", f"{fmt.name}.hex", partial(encode_file, fmt, exhaustive=exhaustive))
        for fmt in numbers
    ]
    found.append(VectorJob("codebooks", "codebooks.json", codebook_file))
    products: dict[tuple[str, str], VectorJob] = {}
    for fmt in chosen:
        if fmt.atom is None:
            pair = (fmt.hif.name, fmt.word.scale.name)
            build = partial(product_file, fmt.hif, fmt.word.scale, count=_RANDOM_PRODUCTS[level])
            products[pair] = VectorJob("products", f"{'_'.join(pair)}.hex", build)
    found += products.values()
    tensors = {file_stem(fmt): fmt for fmt in chosen}
    for stem, fmt in tensors.items():
        found.append(VectorJob("tensors", f"{stem}.json", partial(tensor_file, fmt)))
    for stem, fmt in tensors.items():
        if (
            fmt.atom is None
            and not fmt.row_scale
            and decode_table_bits(fmt) <= _MAX_TABLE_BITS[level]
        ):
            for output in ("float32", "bfloat16"):
                build = partial(decode_table_file, fmt, output)
                found.append(VectorJob("decode", f"{stem}.{output}.hex", build))
    for stem, fmt in tensors.items():
        if not fmt.row_scale:
            build = partial(block_file, fmt, random_count=_RANDOM_MATRICES[level])
            found.append(VectorJob("blocks", f"{stem}.json", build))
    for stem, fmt in tensors.items():
        build = partial(kernel_file, fmt, exhaustive=exhaustive, repeats=_RANDOM_KERNELS[level])
        found.append(VectorJob("kernel", f"{stem}.json", build))
    return found + checkpoint_jobs(list(tensors.values()), whole=not formats)


def manifest_entry(job: VectorJob, file: VectorFile) -> dict[str, Any]:
    """What the manifest says of one file."""
    content = file.data
    return {
        "name": job.path,
        "kind": job.folder,
        "cases": file.cases,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        **file.facts,
    }


def manifest_text(
    level: Level, formats: Sequence[QuantFormat], entries: list[dict[str, Any]]
) -> str:
    """``manifest.json`` of a set.

    Parameters
    ----------
    level, formats
        As :func:`jobs`.
    entries : list of dict
        One per file, from :func:`manifest_entry`.
    """
    names = [fmt.name for fmt in formats] or [name for name, _ in DEFAULT_FORMATS]
    document = {
        "title": TITLE,
        "version": VECTOR_VERSION,
        "level": level.value,
        "formats": list(dict.fromkeys(names)),
        "cases": sum(entry["cases"] for entry in entries),
        "files": entries,
    }
    return json_text(document)
