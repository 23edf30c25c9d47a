"""docs/decoder.py, the second implementation, and small sets of conformance vectors for it."""

import json
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from golden.formats import HIF7, HIF8, HIF8T, HifFormat
from golden.notation import parse_format
from golden.vectors.checkpoints import checkpoint_jobs
from golden.vectors.conformance import DEFAULT_FORMATS, Level, jobs, manifest_entry, manifest_text

DECODER = Path(__file__).parents[2] / "docs" / "decoder.py"
SOURCE = DECODER.read_text()
Files = dict[str, bytes]

# Enough for every rule: a pair whose LUTs have no level at zero, a power of two with f, numbers.
FEW: tuple[tuple[str, HifFormat], ...] = (
    ("DD5-DD5sS1E4M3", HIF7),
    ("NF4T^8sUE5M0", HIF7),
    ("BOF4-NF4^8sS1E3M3", HIF8),
    ("NF4-DD4sRS1E2M4", HIF8T),
    ("E4M3^8sBF16", HIF7),
    ("INT8sS1E4M3", HIF7),
    ("DD5^8sUE5M7", HIF7),  # products of more than 8 bits, which bfloat16 rounds
)


def load(text: str) -> Any:
    """The second implementation, from its source text."""
    module = ModuleType("second_implementation")
    exec(compile(text, str(DECODER), "exec"), module.__dict__)
    return module


@cache
def some_vectors(*kinds: str) -> Files:
    """A small set that holds these kinds of files only."""
    formats = [parse_format(name, hif) for name, hif in FEW]
    found = [job for job in jobs(Level.QUICK, formats) if job.folder in kinds]
    if "checkpoints" in kinds:
        every = [parse_format(name, hif) for name, hif in DEFAULT_FORMATS]
        own = [parse_format("siss-miss^8sUE4M4"), parse_format("NF4T-SH4T^32sS1E4M3", HIF8)]
        found = [job for job in found if job.folder != "checkpoints"]
        found += checkpoint_jobs([*every, *own], whole=True)
    files, entries = {}, []
    for job in found:
        file = job.build()
        files[job.path] = file.data
        entries.append(manifest_entry(job, file))
    return files | {"manifest.json": manifest_text(Level.QUICK, formats, entries).encode()}


@cache
def verdicts() -> dict[str, tuple[bytes, tuple[str | None, ...] | None]]:
    """Content and verdict of every checkpoint, None for the good ones."""
    files = some_vectors("checkpoints")
    found: dict[str, tuple[bytes, tuple[str | None, ...] | None]] = {}
    for case in json.loads(files["checkpoints/verdicts.json"])["cases"]:
        verdict = tuple(case["verdict"][key] for key in ("kind", "tensor", "field"))
        found[case["file"]] = (files[f"checkpoints/{case['file']}"], verdict)
    return found
