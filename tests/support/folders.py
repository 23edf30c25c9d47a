"""What is in a folder."""

from pathlib import Path


def contents(folder: Path) -> dict[str, bytes | None]:
    """All files below a folder, and the folders, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if not path.is_fifo()
    }
