"""What the results of a run depend on: its description beside them, and the checkpoint's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from golden.errors import InputError
from sop.files.recorded_source import RecordedSource
from sop.shared.json_fields import json_list, json_object, optional, text_field

__all__ = ["RunConfig"]


@dataclass(frozen=True)
class RunConfig:
    """Configuration of a checkpoint, but for the plan, which is made from it.

    Attributes
    ----------
    settings : mapping of str to JSON values
        As :meth:`sop.quantizing.settings.Settings.to_json`, or of another version of it.
    source : RecordedSource
    calibration : str or None
        SHA-256 of the calibration file.
    tensors : tuple of str
        Those to be quantized.
    """

    settings: Mapping[str, Any]
    source: RecordedSource
    calibration: str | None
    tensors: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "settings": dict(self.settings),
            "source": self.source.to_json(),
            "calibration": self.calibration,
            "tensors": list(self.tensors),
        }

    @classmethod
    def from_json(cls, value: object, where: str) -> "RunConfig":
        """Check what :meth:`to_json` gave.

        Raises
        ------
        InputError
            If it is not that; the message starts with `where` and names the field.
        """
        table = json_object(value, where)
        tensors = json_list(table.get("tensors"), f"{where}: field 'tensors'")
        if not all(isinstance(name, str) for name in tensors):
            raise InputError(f"{where}: field 'tensors': must be a list of texts")
        if "source" not in table:
            raise InputError(f"{where}: field 'source' is missing")
        return cls(
            settings=json_object(table.get("settings"), f"{where}: field 'settings'"),
            source=RecordedSource.from_json(table["source"]),
            calibration=optional(text_field, table, "calibration", where),
            tensors=tuple(tensors),
        )

    def difference(self, old: "RunConfig") -> str:
        """First field in which an interrupted run differs from this one."""
        for group in ("source", "calibration", "tensors"):
            if getattr(old, group) != getattr(self, group):
                return f"of a run with another {group}"
        for key, value in self.settings.items():
            before = old.settings.get(key)
            if before != value:
                return f"of a run with another {key}: {before}, not {value}"
        return "of another run"
