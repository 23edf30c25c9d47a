"""What ties a checkpoint to the hardware that decodes it, on the command line."""

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from golden.checkpoint import CheckpointWriter
from golden.errors import InputError
from golden.formats import DEFAULT_HIF, HIF7, HIF8T, HifFormat
from golden.notation import parse_format
from golden.quantize import quantize
from sop.hdl.resource_file import ResourceTable
from sop.quantizing.settings import Settings
from tests.support.commands import json_of, output_of

WEIGHTS = np.random.default_rng(1).standard_normal((2, 64)).astype(np.float32)


def checkpoint(path: Path, *formats: tuple[str, HifFormat]) -> Path:
    with CheckpointWriter(path, {}) as writer:
        for number, (name, hif) in enumerate(formats):
            writer.add(f"w{number}", quantize(WEIGHTS, parse_format(name, hif)), None, "F32")
    return path


def test_all_commands_have_the_same_lut_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().hif == DEFAULT_HIF.name
    for name in ("sim", "formats"):
        command = getattr(importlib.import_module(f"sop.commands.{name}"), name)
        assert inspect.signature(command).parameters["hif"].default == DEFAULT_HIF.name, name
    synth = importlib.import_module("sop.commands.synth")
    plans: list[Any] = []
    monkeypatch.setattr(synth, "require_tools", lambda place: None)

    def nothing_measured(plan: Any, **_: Any) -> ResourceTable:
        plans.append(plan)
        return ResourceTable()

    monkeypatch.setattr(synth, "resource_table", nothing_measured)
    assert json_of("synth", "--unit", "lut_decoder")["rows"] == []
    assert [fmt.hif for plan in plans for fmt in plan.formats] == [DEFAULT_HIF]


def built(folder: Path, *arguments: str) -> Any:
    files = json_of("verilog", "sop_decoder_axi", "--lanes", "8", "-o", str(folder), *arguments)
    (path,) = (Path(name) for name in files["files"] if name.endswith(".json"))
    return json.loads(path.read_text())


def test_hardware_without_options_decodes_what_is_quantized_without(tmp_path: Path) -> None:
    description = built(tmp_path / "rtl")
    assert description["parameters"]["lut_entry"] == DEFAULT_HIF.name


def test_hardware_of_a_checkpoint(tmp_path: Path) -> None:
    """It has every format of the file once, under the identification that `inspect` gives."""
    names = [("E2M3sUE4M4", HIF8T), ("BOF4-NF4sS1E5M5", HIF8T), ("NF4-SH4sS1E5M5", HIF8T)]
    path = checkpoint(tmp_path / "model", *names)
    tensors = json_of("inspect", str(path))["tensors"]
    formats = built(tmp_path / "rtl", "--checkpoint", str(path))["identification"]["formats"]
    assert [entry["text"] for entry in formats] == ["e2m3g16ue4m4", "hif8t_lut4g16ms1e5m5"]
    wanted = [formats[number]["format_id"] for number in (0, 1, 1)]
    assert [tensor["format_id"] for tensor in tensors] == wanted
    text = output_of("inspect", path)
    for entry in formats:
        assert f"{entry['format_id']}  {entry['text']}" in text


def test_format_without_blocks_has_no_hardware(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model", ("E4M3^0sUE8M0", HIF7))
    (tensor,) = json_of("inspect", str(path))["tensors"]
    assert (tensor["format_id"], tensor["hardware_format"]) == (None, None)
    with pytest.raises(InputError, match=r"E4M3\^0sUE8M0 has no blocks"):
        built(tmp_path / "rtl", "--checkpoint", str(path))


@pytest.mark.parametrize("option", [("--hif", "HIF8T"), ("--format", "NF4sUE4M4")])
def test_checkpoint_takes_the_place_of_formats(option: tuple[str, str], tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "model", ("NF4sUE4M4", HIF8T))
    with pytest.raises(InputError, match="leave out --format and --hif"):
        built(tmp_path / "rtl", "--checkpoint", str(path), *option)


def test_checkpoint_that_no_hardware_decodes(tmp_path: Path) -> None:
    mixed = checkpoint(tmp_path / "mixed", ("NF4sUE4M4", HIF8T), ("NF4^32sUE4M4", HIF7))
    with pytest.raises(InputError, match="all codebook formats of a decoder have the same format"):
        built(tmp_path / "rtl", "--checkpoint", str(mixed))
    with pytest.raises(InputError, match="no quantized tensor"):
        built(tmp_path / "rtl", "--checkpoint", str(checkpoint(tmp_path / "empty")))
    assert not (tmp_path / "rtl").exists()
