"""``docs/resources.json``: what units cost. ``sop synth`` writes it, ``sop datasheet`` reads it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sop.shared.json_fields import json_list, json_object, read_json

__all__ = ["IDENTITY", "ResourceTable"]

IDENTITY = ("target", "formats", "activations", "multiplier", "output", "lookup", "lanes", "rows",
            "columns")  # fmt: skip
"""Fields of a row that, with ``unit`` and ``module``, say what was measured; others are figures."""


@dataclass(frozen=True)
class ResourceTable:
    """All that one run of ``sop synth`` says; somebody else may have measured other figures.

    Attributes
    ----------
    rows : sequence of mapping
        One per unit, size and target: fields of :data:`IDENTITY` that apply, and figures.
    per_lane : sequence of mapping
        Derived from the rows: what a lane costs, and the rest.
    tools : mapping of str to str
        Versions.
    commands : mapping of str to list of str
        Passes of Yosys by target.
    gate_equivalents : mapping of str to float
        Of the cells of target ``gates``.
    device : list of str or None
        Options of nextpnr; None where nothing was placed.
    """

    rows: Sequence[Mapping[str, Any]] = ()
    per_lane: Sequence[Mapping[str, Any]] = ()
    tools: Mapping[str, str] = field(default_factory=dict)
    commands: Mapping[str, list[str]] = field(default_factory=dict)
    gate_equivalents: Mapping[str, float] = field(default_factory=dict)
    device: list[str] | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "tools": dict(self.tools),
            "commands": dict(self.commands),
            "gate_equivalents": dict(self.gate_equivalents),
            "device": self.device,
            "rows": list(self.rows),
            "per_lane": list(self.per_lane),
        }

    @classmethod
    def from_json(cls, value: object, where: str) -> "ResourceTable":
        """Check what :meth:`to_json` gave, of which all may be missing, or a bare list of rows.

        Raises
        ------
        InputError
            If it is something else; the message starts with `where` and names the field.
        """
        table = {"rows": value} if isinstance(value, list) else json_object(value, where)

        def rows(name: str) -> list[dict[str, Any]]:
            place = f"{where}: field {name!r}"
            found = json_list(table.get(name, []), place)
            return [json_object(row, f"{place}: [{number}]") for number, row in enumerate(found)]

        def entries(name: str) -> dict[str, Any]:
            return json_object(table.get(name, {}), f"{where}: field {name!r}")

        device = table.get("device")
        return cls(
            rows=rows("rows"),
            per_lane=rows("per_lane"),
            tools=entries("tools"),
            commands=entries("commands"),
            gate_equivalents=entries("gate_equivalents"),
            device=None if device is None else json_list(device, f"{where}: field 'device'"),
        )

    @classmethod
    def read(cls, path: Path) -> "ResourceTable":
        """Read a file; empty if there is none. Errors as of :meth:`from_json`, with its path."""
        return cls.from_json(read_json(path), str(path)) if path.exists() else cls()
