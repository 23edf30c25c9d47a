"""A text, and the windows of tokens that a model is run over."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from golden.errors import InputError
from golden.text_file import decode_text
from sop.files.recorded_source import recorded_name
from sop.llm.model import TorchModel

__all__ = ["DEFAULT_WINDOW", "Text", "Windows", "cut_windows", "default_text", "read_text"]

DEFAULT_WINDOW = 1024
"""Tokens of a window where the model has no smaller limit."""


@dataclass(frozen=True)
class Text:
    """A text to run a model over, with a name for people."""

    name: str
    content: str


def read_text(path: Path) -> Text:
    """Text of a UTF-8 file, under the name of the file.

    Raises
    ------
    InputError
        If it is not UTF-8.
    OSError
        If it cannot be read.
    """
    return Text(recorded_name(path), decode_text(path.read_bytes(), path))


def default_text() -> Text:
    """English prose that comes with every CPython: the topics of its `help`.

    The topics are sorted by key and joined by blank lines. Other versions of Python have other
    prose, hence another hash.
    """
    from pydoc_data.topics import topics

    prose = "\n\n".join(topics[key] for key in sorted(topics))
    return Text("pydoc_data.topics", prose)


@dataclass(frozen=True)
class Windows:
    """Windows of tokens, each run without context.

    Attributes
    ----------
    parts : tuple of int64 array
        Token ids of each window, the prefix included.
    prefix : tuple of int
        What each window starts with.
    tokens : int
        Tokens of the text in all windows.
    window : int
        Longest window, the prefix included.
    """

    parts: tuple[NDArray[np.int64], ...]
    prefix: tuple[int, ...]
    tokens: int
    window: int

    @property
    def context(self) -> int:
        """Positions at the start of a window whose prediction is no token of the text."""
        return max(0, len(self.prefix) - 1)


def cut_windows(
    model: TorchModel,
    text: Text,
    *,
    tokens: int,
    window: int | None = None,
    skip_tokens: int = 0,
    bos: str = "auto",
    least_tokens: int = 1,
) -> Windows:
    """Cut part of a text into windows.

    Parameters
    ----------
    model : TorchModel
    text : Text
    tokens : int
        Use at most this many tokens of the text, fewer if it ends.
    window : int, optional
        Tokens that the model sees together, those of the prefix included; the last window may be
        shorter. Without it :data:`DEFAULT_WINDOW`, or what the model was made for if that is less.
    skip_tokens : int
        Leave out this many at the start of the text.
    bos : str
        See :meth:`sop.llm.model.TorchModel.prefix`.
    least_tokens : int
        Tokens that a window must have at least, the prefix included; shorter ones are left out.

    Raises
    ------
    InputError
        If a setting is out of range, a window is longer than the model allows, or the text is too
        short.
    """
    prefix, limit = model.prefix(bos), model.context_length
    if window is None:
        window = min(DEFAULT_WINDOW, limit or DEFAULT_WINDOW)
    shortest = max(least_tokens, len(prefix) + 1)
    settings = (
        ("tokens", tokens, least_tokens),
        ("window", window, shortest),
        ("skip-tokens", skip_tokens, 0),
    )
    for name, value, least in settings:
        if value < least:
            raise InputError(f"--{name} must be at least {least}, not {value}")
    if limit is not None and window > limit:
        raise InputError(f"--window {window} is too long: {model.path} was made for {limit} tokens")
    every = model.encode(text.content)
    ids = every[skip_tokens : skip_tokens + tokens]
    if ids.size < least_tokens:
        problem = f"has {every.size} tokens, so {ids.size} are left after skipping {skip_tokens}"
        raise InputError(f"{text.name}: {problem}; at least {least_tokens} are needed")
    start, step = np.array(prefix, dtype=np.int64), window - len(prefix)
    parts = [np.concatenate([start, ids[at : at + step]]) for at in range(0, ids.size, step)]
    return Windows(
        tuple(part for part in parts if part.size >= least_tokens), prefix, int(ids.size), window
    )
