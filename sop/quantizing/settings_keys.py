"""Keys of the settings, each declared once.

From :data:`KEYS` come the options of ``sop quantize``, what its TOML file may hold, the fields of
:class:`sop.quantizing.settings.Settings` (which are also the names in a checkpoint's JSON) and the
table in docs/quantize.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from golden.codebook_file import read_codebooks
from golden.errors import InputError
from golden.formats import HIF_FORMATS
from golden.text_file import decode_text, parse_toml
from sop.quantizing.settings import EFFORTS, LADDER, Override, Settings, decimal_number
from sop.shared.console import choice
from sop.shared.markdown import markdown_table

__all__ = [
    "KEYS",
    "Key",
    "Kind",
    "keys_markdown",
    "merged_settings",
    "read_settings",
    "settings_of",
]

_PAGE = "docs/quantize.md"
_SHOWN = 80  # characters of a value in a message


class Kind(Enum):
    """What a value is: as the documentation calls it, and its types in a TOML file."""

    TEXT = "text", (str,)
    NUMBER = "number", (int, float)
    NUMBER_OR_TEXT = "number or text", (str, int, float)
    SWITCH = "true or false", (bool,)
    TEXTS = "list of texts", (list,)
    OVERRIDES = "list of tables of `match` and `format`", (list,)

    def __init__(self, words: str, types: tuple[type, ...]) -> None:
        self.words = words
        self.types = types


def _density(name: str, value: str | float) -> float:
    """Share of weights: the text of an option, or a number of a file."""
    number = decimal_number(value) if isinstance(value, str) else value
    if number is None or not 0 <= number < 1:
        raise InputError(f"{name} must be at least 0 and below 1, not {str(value)[:_SHOWN]}")
    return float(number)


def _overrides(value: list[dict[str, str]]) -> tuple[Override, ...]:
    return tuple(Override(**item) for item in value)


@dataclass(frozen=True)
class Key:
    """A key of the TOML file, and mostly an option of the command line of the same name.

    Attributes
    ----------
    name : str
    kind : Kind
    help : str
        One sentence.
    field : str
        Of :class:`Settings`; empty for keys that choose tensors.
    default : str
        What holds without it, in words; empty if there is nothing to be said.
    convert : callable
        Makes the value of the field of that of the file or the option.
    in_file_only : bool
        There is no such option.
    short : str
        Short form of the option, such as ``-f``.
    """

    name: str
    kind: Kind
    help: str
    field: str = ""
    default: str = ""
    convert: Callable[[Any], Any] = lambda value: value
    in_file_only: bool = False
    short: str = ""

    def check(self, value: object, where: str) -> None:
        """Refuse a value of a file that is of another kind."""
        # TOML's true and false are no numbers, though Python's are.
        is_switch = isinstance(value, bool)
        if not isinstance(value, self.kind.types) or is_switch != (self.kind is Kind.SWITCH):
            raise InputError(f"{where}: {self.name}: {value!r} is of the wrong type")
        for position, item in enumerate(value if isinstance(value, list) else ()):
            if self.kind is Kind.TEXTS and not isinstance(item, str):
                raise InputError(f"{where}: {self.name}: must be a list of strings")
            if self.kind is Kind.OVERRIDES and not _is_override(item):
                problem = "needs match and format, both strings"
                raise InputError(f"{where}: {self.name} {position}: {problem}")


def _is_override(item: object) -> bool:
    return (
        isinstance(item, dict)
        and item.keys() == {"match", "format"}
        and all(isinstance(value, str) for value in item.values())
    )


_DEFAULTS = Settings()

KEYS = {
    key.name: key
    for key in (
        Key(
            "format", Kind.TEXT,
            "One format for all tensors; Any4 stands for the best codebook of a layer.",
            "format", short="-f",
        ),
        Key(
            "bpw", Kind.NUMBER_OR_TEXT, "Budget in bits per weight, spent layer by layer.",
            "bits_per_weight", str(_DEFAULTS.bits_per_weight), str,
        ),
        Key(
            "ladder", Kind.TEXTS, "Formats that a budget may be spent on.",
            "ladder", f"{len(LADDER)} formats, `{LADDER[0]}` to `{LADDER[-1]}`", tuple,
            in_file_only=True,
        ),
        Key(
            "effort", Kind.TEXT, f"{', '.join(EFFORTS)}: time against fidelity.",
            "effort", _DEFAULTS.effort,
        ),
        Key(
            "include", Kind.TEXTS, "Glob of tensors to quantize.",
            default="linear weights of the blocks",
        ),
        Key("exclude", Kind.TEXTS, "Glob of tensors to leave as they are."),
        Key(
            "override", Kind.OVERRIDES,
            "Formats of the tensors that match a glob; the first match decides. The format `keep` "
            "stores a tensor as it came.",
            "overrides", convert=_overrides, in_file_only=True,
        ),
        Key(
            "hif", Kind.TEXT, f"Format of LUT entries: {', '.join(HIF_FORMATS)}.",
            "hif", _DEFAULTS.hif,
        ),
        Key(
            "opq", Kind.NUMBER, "Share of outliers stored apart.",
            "outliers", f"{_DEFAULTS.outliers:g}", partial(_density, "opq"),
        ),
        Key(
            "wr", Kind.NUMBER, "Share of large residuals stored apart.",
            "residuals", f"{_DEFAULTS.residuals:g}", partial(_density, "wr"),
        ),
        Key(
            "feedback", Kind.SWITCH,
            "Error feedback where the calibration has second moments; worse on text unlike the "
            f"calibration's ({_PAGE}).",
            "feedback", "on" if _DEFAULTS.feedback else "off",
        ),
    )
}  # fmt: skip
"""All keys by name, in the order of the documentation."""


def read_settings(path: Path | None) -> dict[str, Any]:
    """Values of a TOML file by key; none if there is no file.

    Raises
    ------
    InputError
        If it is not TOML, a key is not known or a value of another kind; the message names both.
    """
    if path is None:
        return {}
    table = parse_toml(path.read_bytes(), path)
    for name, value in table.items():
        if name not in KEYS:
            raise InputError(f"{path}: unknown key {name!r}, expected {', '.join(KEYS)}")
        KEYS[name].check(value, str(path))
    return table


def merged_settings(options: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """Values by key: those of the command line win over those of a file.

    A format and a budget exclude each other, so an option for one also drops the other of the file.
    """
    merged = {**table, **options}
    for one, other in (("format", "bpw"), ("bpw", "format")):
        if one in options and other not in options:
            merged.pop(other, None)
    return merged


def settings_of(given: Mapping[str, Any], codebooks: Path | None) -> Settings:
    """Settings from values by key, and a file of codebooks; the defaults hold for all others.

    Raises
    ------
    InputError
        If a value is out of range, or the codebooks cannot be used.
    """
    hif = choice("hif", given.get("hif", _DEFAULTS.hif), tuple(HIF_FORMATS))
    values = {
        key.field: key.convert(given[key.name])
        for key in KEYS.values()
        if key.field and key.name in given
    }
    if "format" in given:
        values.setdefault("bits_per_weight", None)
    if codebooks is not None:
        read_codebooks(codebooks, HIF_FORMATS[hif])  # says what is wrong and where
        values["codebooks"] = decode_text(codebooks.read_bytes(), codebooks)
    return Settings(**values)


def keys_markdown() -> list[str]:
    """Table of all keys for the documentation."""
    rows = [
        [
            f"`{key.name}`",
            key.kind.words,
            f"`{key.field}`" if key.field else "",
            key.default,
            key.help.replace(f" ({_PAGE})", ""),  # it need not name itself
        ]
        for key in KEYS.values()
    ]
    return markdown_table(["key", "value", "in the checkpoint", "default", ""], rows)
