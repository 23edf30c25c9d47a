"""Text that people write: UTF-8 with or without byte-order mark, and TOML in it."""

import codecs
import sys
from typing import Any

from golden.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # the same library under its name before it joined Python

__all__ = ["decode_text", "parse_toml"]

# Longer marks first: that of UTF-32, little-endian, begins with that of UTF-16.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def decode_text(content: bytes, path: object) -> str:
    """Text of the bytes of a UTF-8 file, without the byte-order mark that some editors write.

    Parameters
    ----------
    content : bytes
    path : object
        Name of the file, for messages.

    Raises
    ------
    InputError
        If it is not UTF-8; the message names UTF-16 and UTF-32 where it is one of them.
    """
    for mark, name in _OTHER_MARKS.items():
        if content.startswith(mark):
            raise InputError(f"{path}: is {name} text; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    if "\0" in text:  # UTF-16 without a mark looks like this
        raise InputError(f"{path}: not UTF-8 text: NUL at byte {content.index(0)}")
    return text


def parse_toml(content: bytes, path: object) -> dict[str, Any]:
    """Table of a TOML file; ``path`` is for messages.

    Raises
    ------
    InputError
        If it is not TOML in UTF-8.
    """
    try:
        return tomllib.loads(decode_text(content, path))
    # A number of more digits than Python converts is a plain ValueError.
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not TOML: {error}") from None
