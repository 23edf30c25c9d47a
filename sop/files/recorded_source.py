"""What a checkpoint says it was quantized from, and whether that is a model at hand."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from golden.checkpoint import Checkpoint
from sop.files.models import Model

__all__ = ["other_model", "other_source", "recorded_name"]

_SHOWN = 12  # digits of a hash in a message
_MAX_NAME = 80  # characters of a file's name in a message: a checkpoint may say anything


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
        Its configuration has the field ``source`` with ``file`` and ``sha256``, if `sop quantize`
        wrote it.
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
    source = checkpoint.config.get("source")
    source = source if isinstance(source, dict) else {}
    recorded = source.get("sha256")
    if not (isinstance(recorded, str) and re.fullmatch("[0-9a-f]{64}", recorded)):
        return None
    found = fingerprint()
    if recorded == found:
        return None
    name = str(source.get("file"))[:_MAX_NAME]
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
