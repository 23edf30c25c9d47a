"""``sop vectors``."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from golden.errors import InputError
from golden.formats import DEFAULT_HIF, HIF_FORMATS
from golden.vectors.conformance import TITLE, Level, jobs, manifest_entry, manifest_text
from sop.shared.console import (
    ForceOption,
    JsonOption,
    choice,
    parse_format_option,
    print_json,
    print_rows,
    progress,
)
from sop.shared.output import Kind, write_files, writing_folder

__all__ = ["vectors"]

MANIFEST = "manifest.json"

_UNFINISHED = ".manifest.json"
_REPORT_SECONDS = 2.0


def _files_of_a_set(folder: Path) -> Kind:
    """Manifests, and the files that those in a folder name."""

    def listed(manifest: Path) -> set[str]:
        try:
            document = json.loads(manifest.read_bytes())
        except (OSError, ValueError):
            return set()
        if not isinstance(document, dict) or document.get("title") != TITLE:
            return set()
        return {manifest.name, *(str(entry.get("name")) for entry in document.get("files", ()))}

    target = folder.resolve()
    known = listed(target / MANIFEST) | listed(target / _UNFINISHED)
    return Kind(
        "a file of `sop vectors`", lambda path: path.relative_to(target).as_posix() in known
    )


def _print_summary(entries: list[dict[str, Any]], manifest: Path) -> None:
    kinds = list(dict.fromkeys(entry["kind"] for entry in entries))
    rows = []
    for kind in kinds:
        of_kind = [entry for entry in entries if entry["kind"] == kind]
        cases, size = (sum(entry[key] for entry in of_kind) for key in ("cases", "bytes"))
        rows.append([kind, str(len(of_kind)), f"{cases:,}", f"{size:,}"])
    print_rows("conformance vectors", ["kind", "files", "cases", "bytes"], rows)
    print(manifest)


def vectors(
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder to write into.")] = Path(
        "build/vectors"
    ),
    level: Annotated[
        str, typer.Option(help=f"How much: {' or '.join(level.value for level in Level)}.")
    ] = "quick",
    format_names: Annotated[
        list[str] | None,
        typer.Option(
            "--format", "-f", help="Restrict the set to a format; may be repeated. Default: many."
        ),
    ] = None,
    hif: Annotated[
        str | None,
        typer.Option(
            help=f"Format of LUT entries with --format: {', '.join(HIF_FORMATS)}; "
            f"default {DEFAULT_HIF.name}."
        ),
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write conformance vectors: JSON and hex files to test any RTL or software against.

    They need none of this program to be read; docs/vectors.md describes them. The same bytes on
    every run. The manifest is written last: a folder without one holds no complete set.

    Example: `sop vectors -o vectors --level exhaustive --format BOF4-NF4sS1E5M5`
    """
    chosen_level = Level(choice("level", level, tuple(level.value for level in Level)))
    if hif is not None and not format_names:
        raise InputError("--hif goes with --format; a full set has every LUT entry format")
    formats = [parse_format_option(name, hif or DEFAULT_HIF.name) for name in format_names or ()]
    todo = jobs(chosen_level, formats)
    names = [job.path for job in todo]
    kind = _files_of_a_set(folder)
    with writing_folder(folder, [*names, MANIFEST, _UNFINISHED], kind, force=force):
        # Tells a later run which files are those of a set that was not finished.
        unfinished = {"title": TITLE, "files": [{"name": name} for name in names]}
        write_files(folder, {_UNFINISHED: json.dumps(unfinished) + "\n"})
        (folder / MANIFEST).unlink(missing_ok=True)
        entries = []
        reported = time.monotonic()
        for number, job in enumerate(todo):
            if time.monotonic() - reported >= _REPORT_SECONDS:
                reported = time.monotonic()
                progress.print(escape(f"writing {job.path} ({number + 1} of {len(todo)})"))
            file = job.build()
            write_files(folder / job.folder, {job.name: file.content})
            entries.append(manifest_entry(job, file))
        write_files(folder, {MANIFEST: manifest_text(chosen_level, formats, entries)})
        (folder / _UNFINISHED).unlink()
    if as_json:
        facts = {key: sum(entry[key] for entry in entries) for key in ("cases", "bytes")}
        manifest = str(folder / MANIFEST)
        print_json({"manifest": manifest, "level": level, "files": len(entries), **facts})
    else:
        _print_summary(entries, folder / MANIFEST)
