"""SHA-256 of files and texts, by which results are known to belong to what they were made from."""

import hashlib
from pathlib import Path
from typing import Protocol

__all__ = ["Digest", "add_file", "file_sha256", "text_sha256"]

_CHUNK_BYTES = 1 << 20


class Digest(Protocol):
    """A hash that bytes are added to, as :mod:`hashlib` makes them."""

    def update(self, data: bytes, /) -> None:
        """Add bytes."""


def add_file(digest: Digest, path: Path) -> None:
    """Add the bytes of a file to a hash; memory holds 1 MiB."""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)


def file_sha256(path: Path) -> str:
    """Hash of a file in lower-case hexadecimal."""
    digest = hashlib.sha256()
    add_file(digest, path)
    return digest.hexdigest()


def text_sha256(text: str) -> str:
    """Hash of a text in UTF-8, in lower-case hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()
