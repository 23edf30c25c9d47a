"""One self-contained HTML page about quantized models, and its figures as PNG.

Needs the extra ``report``. Nothing but :func:`write_report` is meant to be used from outside.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from golden.extras import missing_package
from sop.shared.progress import StepReport, silent

__all__ = ["WrittenReport", "write_report"]

_EXTRA = ("matplotlib", "jinja2", "markupsafe")


@dataclass(frozen=True)
class WrittenReport:
    """What :func:`write_report` wrote.

    Attributes
    ----------
    page : Path
    page_bytes : int
    figures : int
        Number of figures on the page.
    images : tuple of Path
        PNG files.
    warnings : tuple of str
        What makes its figures less than they seem, a sentence each.
    """

    page: Path
    page_bytes: int
    figures: int
    images: tuple[Path, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "output": str(self.page),
            "bytes": self.page_bytes,
            "figures": self.figures,
            "images": [str(path) for path in self.images],
            "warnings": list(self.warnings),
        }


def write_report(
    checkpoints: Sequence[Path],
    page: Path,
    *,
    evaluation: Path | None = None,
    model: Path | None = None,
    calibration: Path | None = None,
    images: Path | None = None,
    force: bool = False,
    on_tensor: StepReport = silent,
) -> WrittenReport:
    """Write the report of one or more checkpoints; the same bytes on every run.

    Parameters
    ----------
    checkpoints : sequence of Path
        At least one.
    page : Path
        HTML file to write; its folder is made. What :func:`sop.shared.output.output_file` says is
        refused.
    evaluation : Path or None
        JSON of ``sop eval``; entries that carry a checkpoint's path, file name or stem belong to
        it, all others are baselines.
    model : Path or None
        Weights before quantization, to measure errors and histograms.
    calibration : Path or None
        Weights the measured errors; goes with `model`.
    images : Path or None
        Folder for PNG files; made if missing.
    force : bool
        Replace files that this function did not make.
    on_tensor : callable
        Called with the label of a checkpoint, the tensors done and their number.

    Raises
    ------
    InputError
        If a file is not what it should be, files do not fit each other, or the extra is missing.
    """
    try:
        from sop.report.build import build_report
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        raise missing_package("a report", error.name, "report") from error
    return build_report(
        checkpoints, page, evaluation=evaluation, model=model, calibration=calibration,
        images=images, force=force, on_tensor=on_tensor,
    )  # fmt: skip
