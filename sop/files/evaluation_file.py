"""The JSON of ``sop eval``, which ``sop report`` reads; other programs may write it, too."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from golden.errors import InputError
from sop.shared.json_fields import (
    count_field,
    json_list,
    json_object,
    number_field,
    optional,
    read_json,
    shown,
    text_field,
    unique,
)

__all__ = ["EvaluationFile", "RecordedEvaluation", "RecordedLayer"]

_MAX_GAP_PPM = 2e6  # ACos = -1
_MAX_BITS = 64.0
_LARGEST = 1e300


@dataclass(frozen=True)
class RecordedLayer:
    """How far one layer is from its weights.

    Attributes
    ----------
    name : str
        Of the tensor.
    weights : int or None
        How many it has.
    gap_ppm : float
        ``(1 - ACos) * 1e6``, 0 to 2e6.
    relative_mse : float or None
        At least 0.
    """

    name: str
    weights: int | None
    gap_ppm: float
    relative_mse: float | None

    @classmethod
    def from_json(cls, value: object, where: str) -> "RecordedLayer":
        """Check one element of ``layers``."""
        table = json_object(value, where)
        return cls(
            name=text_field(table, "name", where),
            weights=optional(count_field, table, "weights", where, 1),
            gap_ppm=number_field(table, "gap_ppm", where, _MAX_GAP_PPM),
            relative_mse=optional(number_field, table, "relative_mse", where),
        )


@dataclass(frozen=True)
class RecordedEvaluation:
    """What was measured of one quantized model; None where it was not.

    Attributes
    ----------
    name : str
        Unique in its file.
    activations : str or None
        Their format, where they were quantized too.
    bits_per_weight : float or None
        Above 0; None where the weights are the model's own.
    kl, kl_standard_error : float or None
        Divergence from the unquantized model's next-token distribution, in nats.
    kl_minus_first, kl_minus_first_standard_error : float or None
        The same less that of the first evaluation of the file.
    perplexity, reference_perplexity, perplexity_ratio : float or None
        Of the quantized and of the unquantized model, and the first over the second.
    top1_agreement : float or None
        Share of tokens for which both models prefer the same next token, 0 to 1.
    gap_ppm, relative_mse : float or None
        Over all layers.
    layers : tuple of RecordedLayer
    """

    name: str
    activations: str | None
    bits_per_weight: float | None
    kl: float | None
    kl_standard_error: float | None
    kl_minus_first: float | None
    kl_minus_first_standard_error: float | None
    perplexity: float | None
    reference_perplexity: float | None
    perplexity_ratio: float | None
    top1_agreement: float | None
    gap_ppm: float | None
    relative_mse: float | None
    layers: tuple[RecordedLayer, ...]

    @classmethod
    def from_json(cls, value: object, where: str) -> "RecordedEvaluation":
        """Check one element of ``evaluations``, of which only name and bits must be there.

        Raises
        ------
        InputError
            If a value is out of range or a layer is named twice; the message names the field.
        """
        table = json_object(value, where)

        def number(key: str, most: float = _LARGEST, least: float = 0.0) -> float | None:
            return optional(number_field, table, key, where, most, least)

        if "bits_per_weight" not in table:
            raise InputError(f"{where}: field 'bits_per_weight' is missing")
        bits = number("bits_per_weight", _MAX_BITS)
        if bits == 0:
            raise InputError(f"{where}: field 'bits_per_weight': must be above 0")
        return cls(
            name=text_field(table, "name", where),
            activations=optional(text_field, table, "activations", where),
            bits_per_weight=bits,
            # The divergence of equal models may round below zero.
            kl=number("kl", least=-1e-3),
            kl_standard_error=number("kl_standard_error"),
            kl_minus_first=number("kl_minus_first", least=-_LARGEST),
            kl_minus_first_standard_error=number("kl_minus_first_standard_error"),
            perplexity=number("perplexity"),
            reference_perplexity=number("reference_perplexity"),
            perplexity_ratio=number("perplexity_ratio"),
            top1_agreement=number("top1_agreement", 1.0),
            gap_ppm=number("gap_ppm", _MAX_GAP_PPM),
            relative_mse=number("relative_mse"),
            layers=_layers(table.get("layers"), where),
        )


def _layers(value: object, where: str) -> tuple[RecordedLayer, ...]:
    layers: dict[str, RecordedLayer] = {}
    items = [] if value is None else json_list(value, f"{where}: field 'layers'")
    for position, item in enumerate(items):
        place = f"{where}: layers[{position}]"
        layer = RecordedLayer.from_json(item, place)
        layers[unique(layer.name, layers, place)] = layer
    return tuple(layers.values())


@dataclass(frozen=True)
class EvaluationFile:
    """All that one run of ``sop eval`` says; another program may leave out all but evaluations.

    Attributes
    ----------
    model, model_sha256 : str or None
        The reference as it was named, and its :meth:`sop.files.models.Model.fingerprint`.
    text, text_sha256 : str or None
        Name of the text and hash of its UTF-8 bytes.
    skip_tokens, tokens, window : int or None
        The tokens ``skip_tokens <= t < skip_tokens + tokens`` of the text, in windows.
    prefix_tokens : tuple of int or None
        What every window starts with.
    positions : int or None
        Tokens that were predicted.
    reference_perplexity : float or None
        Of the unquantized model.
    channel_norms : str or None
        File of the calibration that weighted the gaps.
    warnings : tuple of str
        What makes the figures less than they seem, a sentence each.
    evaluations : tuple of RecordedEvaluation
        At least one, of different names.
    """

    model: str | None
    model_sha256: str | None
    text: str | None
    text_sha256: str | None
    skip_tokens: int | None
    tokens: int | None
    window: int | None
    prefix_tokens: tuple[int, ...] | None
    positions: int | None
    reference_perplexity: float | None
    channel_norms: str | None
    warnings: tuple[str, ...]
    evaluations: tuple[RecordedEvaluation, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object, where: str) -> "EvaluationFile":
        """Check what :meth:`to_json` gave, or another program; unknown keys are ignored.

        Raises
        ------
        InputError
            If it is not that, a value is out of range or a name is given twice; the message names
            evaluation and field.
        """
        table = json_object(value, where)
        found: dict[str, RecordedEvaluation] = {}
        items = json_list(table.get("evaluations"), f"{where}: field 'evaluations'", least=1)
        for position, item in enumerate(items):
            place = f"{where}: evaluations[{position}]"
            evaluation = RecordedEvaluation.from_json(item, place)
            found[unique(evaluation.name, found, place)] = evaluation
        return cls(
            model=optional(text_field, table, "model", where),
            model_sha256=optional(text_field, table, "model_sha256", where),
            text=optional(text_field, table, "text", where),
            text_sha256=optional(text_field, table, "text_sha256", where),
            skip_tokens=optional(count_field, table, "skip_tokens", where),
            tokens=optional(count_field, table, "tokens", where, 1),
            window=optional(count_field, table, "window", where, 1),
            prefix_tokens=optional(_integers, table, "prefix_tokens", where),
            positions=optional(count_field, table, "positions", where, 1),
            reference_perplexity=optional(number_field, table, "reference_perplexity", where),
            channel_norms=optional(text_field, table, "channel_norms", where),
            warnings=optional(_texts, table, "warnings", where) or (),
            evaluations=tuple(found.values()),
        )

    @classmethod
    def read(cls, path: Path) -> "EvaluationFile":
        """Read a file; errors as of :meth:`from_json`, with its path, and OSError."""
        return cls.from_json(read_json(path), str(path))


def _integers(table: Mapping[str, Any], key: str, where: str) -> tuple[int, ...]:
    return tuple(_elements(table, key, where, int))


def _texts(table: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    return tuple(_elements(table, key, where, str))


def _elements(table: Mapping[str, Any], key: str, where: str, kind: type) -> list[Any]:
    value = json_list(table[key], f"{where}: field {key!r}")
    if not all(type(item) is kind for item in value):
        problem = f"must be a list of {kind.__name__}, not {shown(value)}"
        raise InputError(f"{where}: field {key!r}: {problem}")
    return value
