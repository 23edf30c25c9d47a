"""Writing files so that nothing half-written is ever left behind."""

import os
import tempfile
from pathlib import Path

__all__ = ["write_files"]


def write_files(folder: Path, files: dict[str, str]) -> list[Path]:
    """Write text files into a folder, each one complete or not at all.

    Parameters
    ----------
    folder : Path
        Created if missing.
    files : dict of str to str
        File names and their contents.

    Returns
    -------
    paths : list of Path
        In the order given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, text in files.items():
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, folder / name)
        except BaseException:
            os.unlink(temporary)
            raise
        paths.append(folder / name)
    return paths
