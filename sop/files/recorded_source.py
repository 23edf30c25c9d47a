"""What a checkpoint says it was quantized from, and whether that is a model at hand."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golden.checkpoint import Checkpoint
from sop.files.models import Model

__all__ = ["RecordedSource", "other_model", "other_source", "recorded_name"]

_SHOWN = 12  # digits of a hash in a message
_MAX_NAME = 80  # characters of a file's name in a message: a checkpoint may say anything


@dataclass(frozen=True)
class RecordedSource:
    """What weights were quantized from; None where a file does not say, or says something else.

    Attributes
    ----------
    file : str or None
        Name of the file or folder (:func:`recorded_name`), for people.
    sha256 : str or None
        :meth:`sop.files.models.Model.fingerprint`, 64 hexadecimal digits.
    weight_block_size : list of int, or whatever another program wrote; None if nothing
        Rows and columns of the blocks of FP8 weights that were left as they came, checked where
        they are decoded (:func:`sop.files.scaled_weights.find_scales`).
    """

    file: str | None = None
    sha256: str | None = None
    weight_block_size: Any = None

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        described: dict[str, Any] = {"file": self.file, "sha256": self.sha256}
        if self.weight_block_size is not None:
            described["weight_block_size"] = self.weight_block_size
        return described

    @classmethod
    def from_json(cls, value: object) -> "RecordedSource":
        """Take what is usable: a checkpoint of another program may say anything."""
        table = value if isinstance(value, dict) else {}
        file, sha256 = table.get("file"), table.get("sha256")
        is_hash = isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)
        return cls(
            file if isinstance(file, str) else None,
            sha256 if is_hash else None,
            table.get("weight_block_size"),
        )

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> "RecordedSource":
        """Of the configuration of a checkpoint, where `sop quantize` writes it."""
        return cls.from_json(config.get("source"))


def recorded_name(path: Path) -> str:
    """Name of a file or folder, also of ``.``, as text for files that any language can read.

    Bytes that are no UTF-8 are replaced: Python's text has surrogates for them, which others
    refuse in JSON, and in some locales for all letters but those of ASCII.
    """
    return os.fsencode(os.path.basename(os.path.abspath(path))).decode("utf-8", "replace")


def other_model(checkpoint: Checkpoint, path: Path, fingerprint: Callable[[], str]) -> str | None:
    """Say that a checkpoint was quantized from other weights than those of a model.

    Parameters
    ----------
    checkpoint : Checkpoint
        Its configuration has a :class:`RecordedSource`, if `sop quantize` wrote it.
    path : Path
        Of the model, for the sentence.
    fingerprint : callable
        Gives :meth:`sop.files.models.Model.fingerprint` of the model; called only if it is needed.

    Returns
    -------
    problem : str or None
        A sentence that names both; None if the weights are the same, or the checkpoint does not
        say what it was quantized from.
    """
    source = RecordedSource.of_config(checkpoint.config)
    recorded = source.sha256
    if recorded is None:
        return None
    found = fingerprint()
    if recorded == found:
        return None
    name = str(source.file)[:_MAX_NAME]
    return (
        f"{checkpoint.path}: field 'source': quantized from other weights than {path}: from a file "
        f"or folder called {name}, {recorded[:_SHOWN]}, not {found[:_SHOWN]}"
    )


def other_source(a: Checkpoint | Model, b: Checkpoint | Model) -> str | None:
    """Say that one is a checkpoint and the other a model that it was not quantized from.

    See :func:`other_model`; None for two of a kind.
    """
    for checkpoint, model in ((a, b), (b, a)):
        if isinstance(checkpoint, Checkpoint) and isinstance(model, Model):
            return other_model(checkpoint, model.path, model.fingerprint)
    return None
