"""The layout of the code is the one that docs/architecture.md describes, and stays small."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rtl.units import UNITS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
LONGEST = 500
UNIT_RECORDS = {"rtl/units.py", "rtl/tile_units.py", "sop/hdl/datasheet_text.py"}
TABLES = {"docs/decoder.py", "sop/hdl/datasheet_text.py"}


def table(heading: str) -> dict[str, set[str]]:
    """What each name in the table of this heading may import."""
    rows = PAGE.partition(f"| {heading} | May import |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {name.strip("`"): set(re.findall(r"`(\w+)`", allowed)) for name, allowed, _ in cells}


PACKAGES, PARTS = table("Package"), table("Part of `sop`")
PARTS["commands"] = set(PARTS) - {"commands"}


def imports(path: Path) -> set[str]:
    """Modules of every import statement of a file, wherever it stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def product_files(package: str) -> list[Path]:
    """Python files of a package, without its tests."""
    files = [path for path in (ROOT / package).rglob("*.py") if "tests" not in path.parts]
    assert files
    return sorted(files)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_downwards(package: str) -> None:
    for path in product_files(package):
        used = {name.partition(".")[0] for name in imports(path)} & set(PACKAGES)
        assert used <= PACKAGES[package] | {package}, path


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_sop_import_downwards(part: str) -> None:
    for path in product_files(f"sop/{part}"):
        used = {name.split(".")[1] for name in imports(path) if name.startswith("sop.")}
        assert used <= PARTS[part] | {part, "__version__"}, path


def test_the_tables_name_all_there_is() -> None:
    folders = {path.name for path in (ROOT / "sop").iterdir() if (path / "__init__.py").exists()}
    assert set(PARTS) == folders
    packaged = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for package in PACKAGES:
        for folder in {path.parent for path in product_files(package)}:
            if (folder / "__init__.py").exists():
                name = ".".join(folder.relative_to(ROOT).parts)
                assert f'"{name}"' in packaged, f"{name} is not packaged"


def test_files_that_the_page_names_exist() -> None:
    for name in re.findall(r"`((?:golden|rtl|sim|tb|sop)/[\w/]+(?:\.py)?/?)`", PAGE):
        assert "NAME" in name or (ROOT / name).exists(), name


def test_units_are_named_in_their_records_only() -> None:
    """Elsewhere code asks the record for what it wants to know, or names the record."""
    named = {
        path.relative_to(ROOT).as_posix()
        for package in set(PACKAGES) - {"golden"}  # which has functions of such names
        for path in product_files(package)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in UNITS
    }
    assert named == UNIT_RECORDS


def test_no_module_is_long() -> None:
    folders = (*PACKAGES, "tests", "docs", "scripts")
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {name for name, lines in lengths.items() if lines > LONGEST} <= TABLES


# --- what one file adds ---------------------------------------------------------------------------


def run_with(folder: Path, script: str) -> str:
    """Output of a script that finds the changed copy of golden before ours."""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def changed_golden(folder: Path, module: str, *changes: tuple[str, str]) -> None:
    """Copy golden, with one module changed."""
    ignore = shutil.ignore_patterns("tests", "__pycache__")
    shutil.copytree(ROOT / "golden", folder / "golden", ignore=ignore)
    path = folder / "golden" / module
    text = path.read_text(encoding="utf-8")
    for before, after in changes:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    path.write_text(text, encoding="utf-8")


QUANTIZE = """
import golden
assert "{folder}" in golden.__file__, golden.__file__
import numpy as np
from golden.formats import HIF7
from golden.notation import parse_format
from golden.quantize import quantize
from golden.tensor import decode
from rtl.units import unit_verilog
fmt = parse_format("{name}", HIF7)
weights = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
print(np.abs(decode(quantize(weights, fmt)) - weights).max() < 1)
print("module" in unit_verilog("float_decoder", (fmt,), lanes=16)[1])
"""


def test_a_number_format_is_added_in_one_file(tmp_path: Path) -> None:
    changed_golden(
        tmp_path, "formats.py",
        ('E3M2 = FloatFormat("E3M2", True, 3, 2)\n',
         'E3M2 = FloatFormat("E3M2", True, 3, 2)\nE3M3 = FloatFormat("E3M3", True, 3, 3)\n'),
        ("for fmt in (E2M1, E2M3,", "for fmt in (E3M3, E2M1, E2M3,"),
    )  # fmt: skip
    script = QUANTIZE.format(folder=tmp_path, name="E3M3sUE4M4")
    assert run_with(tmp_path, script) == "True\nTrue\n"


def test_a_fixed_codebook_is_added_in_one_file(tmp_path: Path) -> None:
    changed_golden(
        tmp_path, "codebooks.py",
        ('PAPER_CODEBOOKS = ("NF4",', 'PAPER_CODEBOOKS = ("LIN", "NF4",'),
        ('tables = {"NF4": _NF4,',
         'tables = {"LIN": tuple((k - 7) / 8 for k in range(16)), "NF4": _NF4,'),
    )  # fmt: skip
    script = QUANTIZE.format(folder=tmp_path, name="LINsUE4M4")
    assert run_with(tmp_path, script) == "True\nTrue\n"
