"""What the vector files are made of: text of JSON and hex files, and reproducible numbers.

The files themselves are described in docs/vectors.md.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "VectorFile",
    "VectorJob",
    "VectorStream",
    "float32_bits",
    "hex_lines",
    "hex_strings",
    "json_text",
    "word_fields",
]


@dataclass(frozen=True)
class VectorFile:
    """One finished file of the set.

    Attributes
    ----------
    content : str or bytes
        ASCII text with a newline at the end, or the bytes of a checkpoint.
    cases : int
        How many answers the file holds; docs/vectors.md says what counts in each kind.
    facts : dict
        JSON-ready facts that the manifest lists beside name, size and checksum.
    """

    content: str | bytes
    cases: int
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def data(self) -> bytes:
        """Bytes of the file."""
        return self.content.encode("ascii") if isinstance(self.content, str) else self.content


@dataclass(frozen=True)
class VectorJob:
    """A file to be made.

    Attributes
    ----------
    folder, name : str
        Where it goes inside the set; the folder says the kind of file.
    build : callable
        Makes the file.
    """

    folder: str
    name: str
    build: Callable[[], VectorFile]

    @property
    def path(self) -> str:
        """Path inside the set, with ``/``."""
        return f"{self.folder}/{self.name}"


class VectorStream:
    """Endless reproducible 32-bit words.

    Block k = 0, 1, ... is the SHA-256 digest of the ASCII text ``<seed>/<k>``, read as eight
    little-endian words.

    Parameters
    ----------
    seed : str
        ASCII text.
    """

    def __init__(self, seed: str) -> None:
        self._words = self._generate(seed)

    @staticmethod
    def _generate(seed: str) -> Iterator[int]:
        block = 0
        while True:
            digest = hashlib.sha256(f"{seed}/{block}".encode("ascii")).digest()
            for start in range(0, len(digest), 4):
                yield int.from_bytes(digest[start : start + 4], "little")
            block += 1

    def words(self, count: int) -> NDArray[np.int64]:
        """Take the next ``count`` words, in ``range(2**32)``."""
        return np.array([next(self._words) for _ in range(count)], dtype=np.int64)

    def codes(self, count: int, allowed: NDArray[np.bool_]) -> NDArray[np.uint16]:
        """Take words until ``count`` are usable.

        Parameters
        ----------
        count : int
        allowed : bool array, shape (2**width,)
            Which codes may occur; a word counts with its low ``width`` bits and is skipped where
            they are not allowed. At least one must be.
        """
        mask = len(allowed) - 1
        taken: list[int] = []
        while len(taken) < count:
            code = next(self._words) & mask
            if allowed[code]:
                taken.append(code)
        return np.array(taken, dtype=np.uint16)

    def bell(self, count: int) -> NDArray[np.float64]:
        """Take bell-shaped numbers in [-2, 2): the sum of four 16-bit integers, centred.

        Exact: ``(sum - 2**17) / 2**16``, from the low halves of four words each.
        """
        sums = (self.words(4 * count) & 0xFFFF).reshape(count, 4).sum(axis=1)
        return (sums - (1 << 17)) / 65536.0


def float32_bits(values: NDArray[np.floating[Any]]) -> NDArray[np.uint32]:
    """Bit patterns of values after rounding to float32, same shape."""
    return values.astype(np.float32).view(np.uint32)


def hex_strings(codes: NDArray[np.unsignedinteger], width: int) -> list[str]:
    """Lower-case hex digits of each code, as many as ``width`` bits need."""
    digits = -(-width // 4)
    return [f"{code:0{digits}x}" for code in codes.reshape(-1).tolist()]


def word_fields(*fields: tuple[str, int]) -> list[dict[str, Any]]:
    """Describe the fields of a hex word, given as name and width from the top bit down."""
    offset = sum(width for _, width in fields)
    described = []
    for name, width in fields:
        offset -= width
        described.append({"name": name, "offset": offset, "width": width})
    return described


def hex_lines(columns: Iterable[tuple[NDArray[np.unsignedinteger], int]]) -> str:
    """One word a line for ``$readmemh``: columns of (codes, width) from the top, joined by ``_``.

    Widths are multiples of 4, so that the underscores lie between fields.
    """
    parts = [hex_strings(codes, width) for codes, width in columns]
    return "".join("_".join(fields) + "\n" for fields in zip(*parts, strict=True))


def json_text(document: dict[str, Any]) -> str:
    """JSON with one key, one row or one case a line."""
    return _render(document, "") + "\n"


def _is_flat(value: Any) -> bool:
    items = value.values() if isinstance(value, dict) else value
    return not any(isinstance(item, (dict, list)) and item for item in items)


def _render(value: Any, indent: str) -> str:
    deeper = indent + " "
    if isinstance(value, dict) and (indent == "" or not _is_flat(value)):
        items = [f"{json.dumps(key)}: {_render(item, deeper)}" for key, item in value.items()]
        brackets = "{}"
    elif isinstance(value, list) and not _is_flat(value):
        items = [_render(item, deeper) for item in value]
        brackets = "[]"
    else:
        return json.dumps(value)
    body = ",\n".join(deeper + item for item in items)
    return f"{brackets[0]}\n{body}\n{indent}{brackets[1]}"
