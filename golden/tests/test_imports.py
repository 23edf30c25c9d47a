"""The golden model stands alone."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import golden

PACKAGE = Path(golden.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__" and "tests" not in path.parts
)
BLOCKED = (
    "rtl", "sim", "tb", "sop", "torch", "amaranth", "cocotb", "gguf", "safetensors", "transformers",
    "scipy", "gfloat", "hypothesis",
)  # fmt: skip


def imported_packages(path: Path) -> set[str]:
    """Top-level names of every import statement of a file, wherever it stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module if node.module and not node.level else ".")
    return names


CHECKPOINT_LAYERS = (
    "strict_json", "container", "container_file", "checkpoint.info", "checkpoint.layout",
    "checkpoint.names", "checkpoint.metadata", "checkpoint.reader", "checkpoint.writer",
)  # fmt: skip


@pytest.mark.parametrize("layer", CHECKPOINT_LAYERS)
def test_layers_of_the_checkpoint_know_only_those_before_them(layer: str) -> None:
    path = PACKAGE.joinpath(*layer.split(".")).with_suffix(".py")
    later = {f"golden.{name}" for name in CHECKPOINT_LAYERS[CHECKPOINT_LAYERS.index(layer) :]}
    assert not imported_packages(path) & {"golden.checkpoint", *later}


def test_every_module_is_seen() -> None:
    assert {"formats", "convert", "quantize", "tensor", "packing", "errors"} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_without_hardware_and_model_packages(module: str) -> None:
    script = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({BLOCKED!r}))\n"
        f"import golden.{module}\n"
        f"print(golden.{module}.__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, check=False, cwd=PACKAGE.parent, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == f"golden.{module}", done.stderr


def test_the_package_names_what_a_program_starts_with() -> None:
    """Each one the object of its module, and none of them imported before it is used."""
    assert set(golden.__all__) == set(golden._HOMES) <= set(dir(golden))
    for name, home in golden._HOMES.items():
        assert getattr(golden, name) is getattr(importlib.import_module(f"golden.{home}"), name)
    with pytest.raises(AttributeError, match="module 'golden' has no attribute 'nothing'"):
        _ = golden.nothing
    script = "import sys, golden.errors; print('numpy' in sys.modules); golden.matmul"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, check=True, cwd=PACKAGE.parent, timeout=60,
    )  # fmt: skip
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("module", ["formats", "errors"])
def test_format_definitions_need_the_standard_library_only(module: str) -> None:
    allowed = set(sys.stdlib_module_names)
    names = imported_packages(PACKAGE / f"{module}.py")
    assert {name.split(".")[0] for name in names if name != "golden.errors"} <= allowed


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_nothing_but_numpy_and_each_other(module: str) -> None:
    """Imports inside functions included, which the import test above does not run."""
    names = {
        name.split(".")[0]
        for name in imported_packages(PACKAGE.joinpath(*module.split(".")).with_suffix(".py"))
    }
    assert names <= set(sys.stdlib_module_names) | {"golden", "numpy", "ml_dtypes", "tomli"}


@pytest.mark.parametrize("module", MODULES)
def test_all_names_what_exists(module: str) -> None:
    loaded = __import__(f"golden.{module}", fromlist=["__all__"])
    assert loaded.__all__
    for name in loaded.__all__:
        assert hasattr(loaded, name)
