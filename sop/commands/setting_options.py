"""Options of the command line, made from the keys in :mod:`sop.quantizing.settings_keys`."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from sop.quantizing.settings_keys import KEYS, Key, Kind

__all__ = ["with_settings"]

_TYPES: dict[Kind, Any] = {Kind.SWITCH: bool | None, Kind.TEXTS: list[str] | None}
"""Types of options; all others are texts, numbers among them, which are read exactly."""


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every key that has one, in place of its parameter ``options``.

    The command gets those that were given as a dict by key.
    """
    keys = {key.name: _option(key) for key in KEYS.values() if not key.in_file_only}

    @wraps(command)
    def with_options(**values: Any) -> None:
        found = {name: values.pop(name) for name in keys}
        given = {name: value for name, value in found.items() if value not in (None, [])}
        command(**values, options=given)

    signature = inspect.signature(command)
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        parameters += keys.values() if name == "options" else [parameter]
    # What Typer reads.
    with_options.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {one.name: one.annotation for one in parameters}
    return with_options


def _option(key: Key) -> inspect.Parameter:
    name = f"--{key.name}"
    names = [f"{name}/--no-{key.name}"] if key.kind is Kind.SWITCH else [name]
    text = f"{key.help} [{key.default}]" if key.default else key.help
    option = typer.Option(*names, *([key.short] if key.short else []), help=text)
    annotation = Annotated[_TYPES.get(key.kind, str | None), option]  # type: ignore[valid-type]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(key.name, kind, default=None, annotation=annotation)
