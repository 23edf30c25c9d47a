"""A checkpoint set beside a model of the same shapes that it was not quantized from."""

import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from golden.checkpoint import Checkpoint, CheckpointWriter
from golden.errors import InputError
from golden.notation import parse_format
from golden.quantize import quantize
from sop.files.models import open_model
from tests.support.commands import invoke_or_raise, json_of

NAME = "model.layers.0.mlp.up_proj.weight"
Float32 = NDArray[np.float32]


def weights(seed: int) -> Float32:
    return np.random.default_rng(seed).standard_normal((32, 32)).astype(np.float32)


def folder(path: Path, seed: int) -> Path:
    path.mkdir()
    save_file({NAME: weights(seed)}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return path


@pytest.fixture
def right(tmp_path: Path) -> Path:
    return folder(tmp_path / "right", 1)


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    return folder(tmp_path / "wrong", 2)


@pytest.fixture
def made(right: Path, tmp_path: Path) -> Path:
    """A checkpoint of the right model."""
    path = tmp_path / "q.safetensors"
    assert invoke_or_raise("quantize", right, "-o", path, "-f", "NF4sUE4M4", "-j", 1).exit_code == 0
    return path


def checkpoint(path: Path, config: dict[str, object]) -> Path:
    """One that another program may have written."""
    with CheckpointWriter(path, config) as writer:
        writer.add(NAME, quantize(weights(1), parse_format("NF4sUE4M4")), None, "F32")
    return path


def said(made: Path, wrong: Path) -> str:
    """What is said of the wrong model, everywhere."""
    with Checkpoint(made) as opened, open_model(wrong) as model:
        source, found = opened.config["source"], model.fingerprint()
    assert isinstance(source, dict)
    return (
        f"{made}: field 'source': quantized from other weights than {wrong}: from a file or folder "
        f"called right, {source['sha256'][:12]}, not {found[:12]}"
    )


def test_export_refuses_another_model_unless_allowed(
    made: Path, wrong: Path, tmp_path: Path
) -> None:
    target, before = tmp_path / "out", sorted(tmp_path.iterdir())
    arguments = ["export", made, "-o", target, "--model", wrong]
    with pytest.raises(InputError) as refused:
        invoke_or_raise(*arguments)
    assert str(refused.value) == f"{said(made, wrong)}; --allow-other-model takes it"
    assert sorted(tmp_path.iterdir()) == before
    done = invoke_or_raise(*arguments, "--allow-other-model", "--json")
    assert json.loads(done.stdout)["notes"] == [said(made, wrong)]
    assert (target / "model.safetensors").exists()


def test_the_same_weights_under_other_names_are_the_same_model(
    made: Path, right: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"dtype": "bfloat16"}')
    os.link(right / "model.safetensors", other / "model.safetensors")
    (tmp_path / "link").symlink_to(other)
    linked = tmp_path / "linked"  # as in the cache of the hub
    linked.mkdir()
    (linked / "config.json").write_text("{}")
    (linked / "model.safetensors").symlink_to(right / "model.safetensors")
    for number, model in enumerate((right, other, tmp_path / "link", linked)):
        target = tmp_path / str(number)
        assert json_of("export", made, "-o", target, "--model", model)["notes"] == []
    one = right / "model.safetensors"
    assert json.loads(invoke_or_raise("compare", one, made, "--json").stdout)["warnings"] == []


@pytest.mark.parametrize("source", [None, "right", {}, {"file": "m"}, {"sha256": 3}])
def test_a_checkpoint_that_does_not_name_its_source_is_taken(
    source: object, right: Path, tmp_path: Path
) -> None:
    config = {} if source is None else {"source": source}
    path = checkpoint(tmp_path / "q.safetensors", config)
    done = invoke_or_raise("export", path, "-o", tmp_path / "out", "--model", right, "--json")
    assert json.loads(done.stdout)["notes"] == []


def test_commands_that_measure_warn_in_the_same_words(
    made: Path, right: Path, wrong: Path, tmp_path: Path
) -> None:
    page = tmp_path / "r.html"
    other = tmp_path / "other.safetensors"
    invoke_or_raise("quantize", wrong, "-o", other, "-f", "NF4sUE4M4", "-j", 1)
    unnamed = checkpoint(tmp_path / "unnamed.safetensors", {})
    for model, warnings in ((wrong, [said(made, wrong)]), (right, [])):
        for arguments in (
            ["compare", model, made],
            ["compare", made, model],
            ["diff", made, unnamed, "--model", model],
            ["report", made, "--model", model, "-o", page],
        ):
            done = invoke_or_raise(*arguments, "--json")
            assert json.loads(done.stdout)["warnings"] == warnings
            # On a slow machine progress is shown as well.
            said_here = [line for line in done.stderr.splitlines() if "warning" in line]
            assert said_here == [f"warning: {one}" for one in warnings]
        text = page.read_text(encoding="utf-8")
        assert ("which are not those that were quantized" in text) == bool(warnings)
    done = invoke_or_raise("compare", made, other, "--json")  # two checkpoints: nothing is a source
    assert json.loads(done.stdout)["warnings"] == []


def test_a_gguf_file_is_told_from_another(tmp_path: Path) -> None:
    for name, seed in (("right", 1), ("wrong", 2)):
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "llama")
        writer.add_tensor("blk.0.ffn_up.weight", weights(seed))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    made, link = tmp_path / "q.safetensors", tmp_path / "link.gguf"
    link.symlink_to(tmp_path / "right.gguf")
    invoke_or_raise("quantize", link, "-o", made, "-f", "NF4sUE4M4", "-j", 1)
    arguments = ["export", made, "-o", tmp_path / "out", "--model"]
    with pytest.raises(InputError, match=r"quantized from other weights than .*wrong\.gguf: from"):
        invoke_or_raise(*arguments, tmp_path / "wrong.gguf")
    with pytest.raises(InputError, match=r"llama\.\w"):  # the next that is checked
        invoke_or_raise(*arguments, tmp_path / "right.gguf")
