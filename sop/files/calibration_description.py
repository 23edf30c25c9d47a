"""What a calibration file says about itself: the JSON in its metadata.

:mod:`sop.llm.gathering` writes it, :mod:`sop.files.calibration` reads it; the file is described in
docs/calibration.md. Of a checkpoint it is the summary of the calibration, without the layers.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from golden.errors import InputError

__all__ = [
    "FORMAT_VERSION",
    "CalibrationDescription",
    "CalibrationRun",
    "CalibrationSummary",
]

FORMAT_VERSION = 2
_TOKENS, _UNCOVERED = "layer_tokens", "uncovered"


def _error(where: str, name: str, problem: str) -> InputError:
    return InputError(f"{where}: field {name!r}: {problem}")


@dataclass(frozen=True)
class CalibrationRun:
    """What the statistics were gathered from; two equal runs give equal statistics.

    Attributes
    ----------
    model, text : str
        Names for people; not compared.
    model_sha256 : str
        :meth:`sop.files.models.Model.fingerprint` of the model's weights, hexadecimal.
    config_sha256 : str
        Hash of its configuration and tokenizer, where they are files of their own.
    text_sha256 : str
        Hash of the UTF-8 text.
    skip_tokens, tokens, window : int
        The tokens ``skip_tokens <= t < skip_tokens + tokens`` of the text, in windows of `window`
        tokens that start without context; the last may be shorter.
    prefix_tokens : tuple of int
        What every window starts with, within its `window` tokens: a begin-of-text token, or none.
    second_moment : bool
        Whether second moments were gathered too.
    software : str
        Versions of what computes, and the number of threads, all of which sway the last bits.
    """

    model: str = field(compare=False)
    model_sha256: str
    config_sha256: str
    text: str = field(compare=False)
    text_sha256: str
    skip_tokens: int
    tokens: int
    window: int
    prefix_tokens: tuple[int, ...]
    second_moment: bool
    software: str

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values; also the summary of the calibration in a checkpoint."""
        return {**asdict(self), "prefix_tokens": list(self.prefix_tokens)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str) -> "CalibrationRun":
        """Check what :meth:`to_json` gave.

        Raises
        ------
        InputError
            If a field is missing, unknown, of another type or out of range; the message starts with
            `where` and names it.
        """
        types: dict[str, Any] = {entry.name: entry.type for entry in fields(cls)}
        for name in values.keys() ^ types.keys():
            raise _error(where, name, "missing" if name in types else "unknown")
        for name, value in values.items():
            if name == "prefix_tokens":
                if not _are_token_ids(value):
                    raise _error(where, name, f"expected a list of token ids, got {value!r:.80}")
            elif type(value) is not types[name]:
                raise _error(where, name, f"expected {types[name].__name__}, got {value!r:.80}")
        for name, least in (("skip_tokens", 0), ("tokens", 1), ("window", 1)):
            if values[name] < least:
                raise _error(where, name, f"must be at least {least}, not {values[name]}")
        return cls(**{**values, "prefix_tokens": tuple(values["prefix_tokens"])})


def _are_token_ids(value: object) -> bool:
    return type(value) is list and all(type(one) is int for one in value)


@dataclass(frozen=True)
class CalibrationSummary:
    """What a checkpoint says about its calibration; None where it does not, or something else.

    Attributes
    ----------
    model_sha256, text_sha256, skip_tokens, tokens, prefix_tokens
        As in :class:`CalibrationRun`.
    """

    model_sha256: str | None = None
    text_sha256: str | None = None
    skip_tokens: int | None = None
    tokens: int | None = None
    prefix_tokens: tuple[int, ...] | None = None

    @classmethod
    def from_json(cls, value: object) -> "CalibrationSummary":
        """Take what is usable of :meth:`CalibrationRun.to_json`: a checkpoint may say anything."""
        table = value if isinstance(value, dict) else {}

        def found(name: str, kind: type) -> Any:
            return table[name] if type(table.get(name)) is kind else None

        prefix = table.get("prefix_tokens")
        return cls(
            found("model_sha256", str),
            found("text_sha256", str),
            found("skip_tokens", int),
            found("tokens", int),
            tuple(prefix) if isinstance(prefix, list) and _are_token_ids(prefix) else None,
        )


@dataclass(frozen=True)
class CalibrationDescription:
    """The metadata of a calibration file, or of the partial file of an interrupted run.

    Attributes
    ----------
    run : CalibrationRun
    layers : mapping of str to str
        For the name of every layer's weight, the name of the layer whose statistics it shares,
        which may be its own.
    layer_tokens : mapping of str to int, or None
        How many tokens each layer with statistics of its own saw; None in a partial file.
    uncovered : mapping of str to str, or None
        Layers without statistics, and why; None in a partial file.
    """

    run: CalibrationRun
    layers: Mapping[str, str]
    layer_tokens: Mapping[str, int] | None = None
    uncovered: Mapping[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        values = {
            "version": FORMAT_VERSION,
            **self.run.to_json(),
            "layers": dict(self.layers),
            _TOKENS: self.layer_tokens,
            _UNCOVERED: self.uncovered,
        }
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_json(cls, value: object, where: str, *, partial: bool) -> "CalibrationDescription":
        """Check what :meth:`to_json` gave, of a partial file if so.

        Raises
        ------
        InputError
            If it is of another version or not that; the message starts with `where` and names the
            field.
        """
        values = dict(value) if isinstance(value, dict) else {}
        version = values.pop("version", None)
        if version != FORMAT_VERSION or isinstance(version, bool):
            problem = f"{version!r} is not supported, expected {FORMAT_VERSION}"
            raise _error(where, "version", f"{problem}; make the file anew")
        layers = _layers(values.pop("layers", None), where)
        tokens, uncovered = values.pop(_TOKENS, None), values.pop(_UNCOVERED, None)
        run = CalibrationRun.from_json(values, where)
        if partial:
            return cls(run, layers)
        return cls(
            run, layers, _layer_tokens(tokens, layers, where), _reasons(uncovered, layers, where)
        )


def _layers(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not value:
        raise _error(where, "layers", "expected a JSON object with at least one layer")
    for name, leader in value.items():
        if not isinstance(leader, str) or value.get(leader) != leader:
            problem = f"layer {name[:80]!r} refers to {leader!r:.80}, which has no statistics"
            raise _error(where, "layers", problem)
    return value


def _layer_tokens(value: object, layers: Mapping[str, str], where: str) -> dict[str, int]:
    if not isinstance(value, dict) or value.keys() != set(layers.values()):
        raise _error(where, _TOKENS, "expected a count for each layer with statistics")
    for name, count in value.items():
        if type(count) is not int or count < 1:
            raise _error(where, _TOKENS, f"{name[:80]!r}: {count!r:.80} tokens")
    return value


def _reasons(value: object, layers: Mapping[str, str], where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(
        isinstance(reason, str) and name not in layers for name, reason in value.items()
    ):
        raise _error(where, _UNCOVERED, "expected a reason for layers without statistics")
    return value
