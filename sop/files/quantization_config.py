"""What a model's ``config.json`` says about how its weights were quantized, wherever it says so."""

from collections.abc import Mapping
from typing import Any

from golden.errors import InputError

__all__ = ["described_quantization", "plain_config"]

_FIELDS = ("quantization_config", "compression_config", "quantization")


def described_quantization(
    config: Mapping[str, Any], where: object
) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the fields of a configuration that describe quantized weights, and their content.

    Models of several parts (text, vision, audio) have them in the parts' configurations, so all
    mappings and lists in it are searched.

    Parameters
    ----------
    config : mapping
        The content of ``config.json``; empty if there is none.
    where : object
        Names the file in errors.

    Returns
    -------
    described : list of (str, mapping)
        Fields as paths, such as ``"text_config.quantization_config"``, outermost first.

    Raises
    ------
    InputError
        If such a field is no object; null and false stand for no field.
    """
    found: list[tuple[str, Mapping[str, Any]]] = []
    level: list[tuple[str, Any]] = [("", config)]
    while level:  # no recursion: a configuration may be nested deeply
        deeper = []
        for path, value in level:
            for key, inner in _items(value):
                field = f"{path}.{key}" if path else str(key)
                if key not in _FIELDS:
                    deeper.append((field, inner))
                elif isinstance(inner, Mapping):
                    found.append((field, inner))
                elif inner is not None and inner is not False:
                    problem = f"{str(inner)[:80]!r}, expected an object"
                    raise InputError(f"{where}: field {field[-200:]!r}: {problem}")
        level = deeper
    return found


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without what says that weights are quantized, in its parts too."""
    return {key: _plain(value) for key, value in config.items() if key not in _FIELDS}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(member) for member in value]
    return plain_config(value) if isinstance(value, Mapping) else value


def _items(value: Any) -> list[tuple[Any, Any]]:
    """Members of an object, or of a list by position."""
    if isinstance(value, Mapping):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list) else []
