"""Codebooks of the user's own, from a TOML file.

.. code-block:: toml

    [codebooks.mine]   # a lower-case letter, then up to 23 lower-case letters and digits
    levels = [-1.0, -0.75, ..., 0.9]   # 16 real levels in [-1, 1], strictly ascending

The levels are stored as given, not mirrored as the fixed codebooks are: -1 becomes the lowest HIF
value. docs/formats.md has the layout for users.

Whoever has the paper's own Split87 or SH4 table can thus add it, as ``split87`` say, and use it in
format names (``split87-DD4sS1E5M5``) and in the pair search.
"""

from pathlib import Path
from typing import Any

from golden.codebooks import Lut, lut_from_levels
from golden.errors import InputError
from golden.formats import HifFormat
from golden.notation import is_user_codebook
from golden.text_file import parse_toml

__all__ = ["MAX_FILE_BYTES", "parse_codebooks", "read_codebooks"]

MAX_FILE_BYTES = 1 << 20
_ENTRIES = 16


def read_codebooks(path: Path, hif: HifFormat) -> dict[str, Lut]:
    """Codebooks of a TOML file, rounded to the grid of a HIF format, in the order of the file.

    Parameters
    ----------
    path : Path
        At most :data:`MAX_FILE_BYTES` long.
    hif : HifFormat
        Format of the LUT entries.

    Returns
    -------
    codebooks : dict from name to Lut

    Raises
    ------
    InputError
        If the file is not of that form, or a codebook cannot be a LUT; the message names file and
        codebook.
    OSError
        If the file cannot be read.
    """
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)  # what is no regular file may have no end
    return parse_codebooks(content, path, hif)


def parse_codebooks(content: bytes, path: object, hif: HifFormat) -> dict[str, Lut]:
    """As :func:`read_codebooks`, of the bytes of a file; ``path`` is for messages."""
    if len(content) > MAX_FILE_BYTES:
        raise InputError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
    table = parse_toml(content, path)
    unknown = sorted(set(table) - {"codebooks"})
    if unknown:
        raise InputError(f"{path}: unknown table {unknown[0]!r}, only [codebooks.NAME] is known")
    books = table.get("codebooks", {})
    if not isinstance(books, dict) or not books:
        raise InputError(f"{path}: holds no [codebooks.NAME]")
    return {name: _read_codebook(path, name, book, hif) for name, book in books.items()}


def _read_codebook(path: object, name: str, book: Any, hif: HifFormat) -> Lut:
    where = f"{path}: codebook {name!r}"
    if not is_user_codebook(name):
        raise InputError(
            f"{where}: names must be a lower-case letter, then up to 23 letters and digits"
        )
    if not isinstance(book, dict) or set(book) != {"levels"}:
        raise InputError(f"{where}: must hold `levels` and nothing else")
    levels = book["levels"]
    if not isinstance(levels, list) or len(levels) != _ENTRIES:
        raise InputError(f"{where}: levels must be a list of {_ENTRIES} numbers")
    for position, level in enumerate(levels):
        if isinstance(level, bool) or not isinstance(level, (int, float)):
            raise InputError(f"{where}: level {position} is {level!r}, not a number")
    try:
        return lut_from_levels([float(level) for level in levels], hif)
    except (InputError, OverflowError) as error:
        raise InputError(f"{where}: {error}") from None
