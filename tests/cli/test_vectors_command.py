"""``sop vectors`` as its users see it: files, manifest, the same bytes, errors."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

import sop.commands.vectors
import sop.shared.console
from golden.errors import InputError
from golden.vectors.files import VectorFile, VectorJob
from sop.commands.vectors import vectors
from tests.support.commands import invoke_alone

FORMATS = ("--format", "BOF4-NF4^8sUE4M3", "-f", "E2M1^32sUE8M0")


def run(*arguments: str | Path, check: bool = True) -> Result:
    done = invoke_alone(vectors, *arguments)
    if check:
        assert done.exit_code == 0, done.output
    return done


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_manifest_lists_exactly_the_files(tmp_path: Path) -> None:
    summary = json.loads(run("-o", tmp_path, *FORMATS, "--json").stdout)
    files = contents(tmp_path)
    manifest = json.loads(files.pop("manifest.json"))
    assert manifest["version"] == 2
    assert manifest["level"] == "quick"
    assert manifest["formats"] == ["BOF4-NF4^8sUE4M3", "E2M1^32sUE8M0"]
    assert {entry["name"] for entry in manifest["files"]} == set(files)
    for entry in manifest["files"]:
        content = files[entry["name"]]
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["bytes"] == len(content)
    assert summary == {
        "manifest": str(tmp_path / "manifest.json"),
        "level": "quick",
        "files": len(files),
        "cases": manifest["cases"],
        "bytes": sum(map(len, files.values())),
    }


def test_same_bytes_on_every_run(tmp_path: Path) -> None:
    script = (
        "import typer; from sop.commands.vectors import vectors; "
        "app = typer.Typer(); app.command()(vectors); app()"
    )
    first, second = tmp_path / "first", tmp_path / "second"
    run("-o", first, *FORMATS)
    subprocess.run(
        [sys.executable, "-c", script, "-o", str(second), *FORMATS],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert contents(first) == contents(second)


def test_summary_names_every_kind_and_the_manifest(tmp_path: Path) -> None:
    text = run("-o", tmp_path, "-f", "E2M1^32sUE8M0").stdout
    for kind in ("numbers", "encode", "codebooks", "tensors", "blocks"):
        assert kind in text
    assert text.rstrip().endswith("manifest.json")


def test_lut_entry_format_is_chosen(tmp_path: Path) -> None:
    run("-o", tmp_path, "-f", "DD6^8sUE2M2", "--hif", "HIF8T")
    assert (tmp_path / "tensors" / "DD6_b8sUE2M2_HIF8T.json").is_file()
    assert (tmp_path / "decode" / "DD6_b8sUE2M2_HIF8T.float32.hex").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--level", "full"], "--level must be one of quick, exhaustive, not 'full'"),
        (["--format", "NF5sUE4M4"], "unknown element 'NF5'"),
        (["--format", "NF4sUE4M4", "--hif", "HIF9"], "--hif must be one of HIF7, HIF8, HIF8T"),
        (["--hif", "HIF8"], "--hif goes with --format"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    folder = tmp_path / "set"
    done = run("-o", folder, *arguments, check=False)
    assert isinstance(done.exception, InputError)
    assert message in str(done.exception)
    assert not folder.exists()


def test_an_interrupted_run_leaves_no_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> VectorFile:
        raise KeyboardInterrupt

    def two_jobs(*_: Any) -> list[VectorJob]:
        return [
            VectorJob("numbers", "good.json", lambda: VectorFile("{}\n", 1)),
            VectorJob("numbers", "bad.json", fail),
        ]

    run("-o", tmp_path, "-f", "E2M1^32sUE8M0")
    assert (tmp_path / "manifest.json").is_file()
    monkeypatch.setattr(sop.commands.vectors, "jobs", two_jobs)
    with pytest.raises(KeyboardInterrupt):
        vectors(folder=tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    assert (tmp_path / "numbers" / "good.json").is_file()
    # By this a later run knows the files of the set that was not finished.
    assert [path.name for path in tmp_path.rglob(".*")] == [".manifest.json"]


def test_long_work_reports_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(sop.commands.vectors, "_REPORT_SECONDS", 0.0)
    monkeypatch.setattr(sop.shared.console.progress, "print", lines.append)
    vectors(folder=tmp_path, format_names=["E2M1^32sUE8M0"], as_json=True)
    count = json.loads(capsys.readouterr().out)["files"]
    assert lines[0] == f"writing numbers/E2M1.json (1 of {count})"
    assert len(lines) == count
