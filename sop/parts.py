"""The folder in which a run gathers its results, so that an interrupted one can go on."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from golden.errors import InputError

__all__ = ["Parts"]


class Parts:
    """Folder of finished results, one file each, put into place at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, config: Mapping[str, Any], resume: bool) -> None:
        """Make the folder, or check that an old one belongs to the same run."""
        text = json.dumps(config, sort_keys=True)
        described = self.folder / "run.json"
        if not described.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            self.put("run.json", text.encode())
            return
        if not resume:
            raise InputError(
                f"{self.folder}: left by an interrupted run; go on with --resume, or remove it"
            )
        old = described.read_text(encoding="utf-8")
        if old != text:
            raise InputError(f"{self.folder}: {_difference(old, config)}; remove it to start anew")

    def put(self, name: str, content: bytes) -> None:
        """Write a file so that it is there as a whole or not at all."""
        temporary = self.folder / f".{name}.tmp"
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.folder / name)

    def __contains__(self, name: str) -> bool:
        """Whether the result is there."""
        return (self.folder / name).is_file()

    def path(self, name: str) -> Path:
        """Where a result is."""
        return self.folder / name

    def remove(self) -> None:
        """Remove everything; called when the output is in place."""
        shutil.rmtree(self.folder)


def _difference(old: str, config: Mapping[str, Any]) -> str:
    """First field in which an interrupted run differs from this one."""
    try:
        before = json.loads(old)
    except ValueError:
        return "run.json is damaged"
    new = json.loads(json.dumps(config))
    for group in ("source", "calibration", "tensors", "settings"):
        if before.get(group) != new.get(group):
            if group != "settings":
                return f"of a run with another {group}"
            for key, value in new[group].items():
                if before[group].get(key) != value:
                    return f"of a run with another {key}: {before[group].get(key)}, not {value}"
    return "of another run"
