"""Hugging Face folders, hub names, and tensors that are passed on as they are."""

import json
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from golden.errors import InputError
from sop.cli import main
from sop.files.choice import choose_tensors
from sop.files.model_folder import is_hub_name
from sop.files.models import Model, embedded_model_path, open_model, resolve_model

NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.norm.weight",
    "model.layers.1.mlp.up_proj.weight",
]


def tensors() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(1)
    return {
        name: rng.standard_normal((8,) if "norm" in name else (4, 16)).astype(np.float32)
        for name in NAMES
    }


def sharded(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Write a model of two shards."""
    made = tensors()
    parts = {"model-00001-of-00002.safetensors": NAMES[:2]}
    parts["model-00002-of-00002.safetensors"] = NAMES[2:]
    for file, names in parts.items():
        save_file({name: made[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in parts.items() for name in names}
    write_index(folder, {"metadata": {}, "weight_map": weight_map})
    return made


def write_index(folder: Path, index: object) -> None:
    text = index if isinstance(index, str) else json.dumps(index)
    (folder / "model.safetensors.index.json").write_text(text)


def with_map(folder: Path, **changes: Any) -> dict[str, Any]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= changes
    return dict(index)


# ----------------------------------------------------------------------------------------- folders


def test_shards_are_one_model(tmp_path: Path) -> None:
    made = sharded(tmp_path)
    with open_model(tmp_path) as model:
        assert sorted(model.tensors) == sorted(NAMES)
        assert model.path == tmp_path
        assert [file.name for file in model.files] == [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ]
        for name in NAMES:
            np.testing.assert_array_equal(model.read(name), made[name])


def test_a_folder_with_one_file_needs_no_index(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors")
    with open_model(tmp_path) as model:
        assert sorted(model.tensors) == sorted(NAMES)


def test_files_may_be_links_as_in_the_cache_of_the_hub(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file(tensors(), blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    with open_model(snapshot) as model:
        assert len(model.tensors) == len(NAMES)


@pytest.mark.parametrize(
    "file",
    [
        "../model-00001-of-00002.safetensors",
        "/etc/passwd",
        "..",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "model\0.safetensors",
        ".hidden.safetensors",
        "model.bin",
        "https://example.org/model.safetensors",
        "",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_an_index_may_only_name_files_of_the_folder(tmp_path: Path, file: object) -> None:
    sharded(tmp_path)
    write_index(tmp_path, with_map(tmp_path, **{NAMES[0]: file}))
    message = rf"index\.json: field 'weight_map': tensor '{NAMES[0]}' is in .*, expected a"
    with pytest.raises(InputError, match=message):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ("[]", "field 'weight_map': must be an object"),
        ("{}", "field 'weight_map': must be an object"),
        ('{"weight_map": {}}', "field 'weight_map': must be an object"),
        ('{"weight_map": [1]}', "field 'weight_map': must be an object"),
        ('{"weight_map": {"w": "none.safetensors"}}', "there is no file 'none.safetensors'"),
        (" " * (33 << 20), "at most 33554432 are read"),
    ],
    ids=["cut", "deep", "list", "empty", "no_tensor", "map_is_list", "no_file", "huge"],
)
def test_broken_indexes_are_refused(tmp_path: Path, index: str, message: str) -> None:
    sharded(tmp_path)
    write_index(tmp_path, index)
    started = time.monotonic()
    with pytest.raises(InputError, match=message):
        open_model(tmp_path)
    assert time.monotonic() - started < 1


def test_index_and_shards_must_name_the_same_tensors(tmp_path: Path) -> None:
    sharded(tmp_path)
    first = "model-00001-of-00002.safetensors"
    write_index(tmp_path, with_map(tmp_path, other=first))
    with pytest.raises(InputError, match=rf"{first}: tensor 'other': is not in it"):
        open_model(tmp_path)
    index = with_map(tmp_path)
    del index["weight_map"]["other"], index["weight_map"][NAMES[1]]
    write_index(tmp_path, index)
    with pytest.raises(InputError, match=rf"{first}: tensor '{NAMES[1]}': is not in the index"):
        open_model(tmp_path)


def test_broken_shards_are_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"00002-of-00002\.safetensors: not a valid safetensors"):
        open_model(tmp_path)


def test_folders_without_weights_say_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no weights; expected model\.safetensors or model\."):
        open_model(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(InputError, match="pickled files are never opened"):
        open_model(tmp_path)


# --------------------------------------------------------------------------------------------- hub


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HuggingFaceTB/SmolLM2-135M", True),
        ("a/b.c", True),
        ("folder/model.gguf", False),
        ("folder/model.safetensors", False),
        ("a/b/c", False),
        ("../b", False),
        ("name", False),
        ("/a/b", False),
        ("a b/c", False),
    ],
)
def test_hub_names(text: str, expected: bool) -> None:
    assert is_hub_name(text) == expected


def test_a_path_that_exists_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    assert not is_hub_name("owner/name")


def test_the_embedded_model_has_a_name_unless_there_is_such_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_model("embedded") == embedded_model_path()
    Path("embedded").mkdir()
    assert resolve_model("embedded") == Path("embedded")
    assert resolve_model("some/where/else") == Path("some/where/else")


def hub(monkeypatch: pytest.MonkeyPatch, download: Any) -> None:
    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = download  # type: ignore[attr-defined] # a stand-in
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)


def test_a_hub_name_is_downloaded_without_code_or_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded(tmp_path)
    asked: list[tuple[str, Sequence[str]]] = []

    def download(name: str, allow_patterns: Sequence[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path)

    hub(monkeypatch, download)
    with open_model("owner/no-such-folder") as model:
        assert model.path == tmp_path
    ((name, patterns),) = asked
    assert name == "owner/no-such-folder"
    assert "*.safetensors" in patterns
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in patterns)


def test_what_the_hub_says_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, allow_patterns: Sequence[str]) -> str:
        raise OSError("no network\nat all")

    hub(monkeypatch, download)
    with pytest.raises(InputError, match=r"owner/x: is neither .* does not give it: no network at"):
        open_model("owner/x")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"owner/x: .* install the llm extra"):
        open_model("owner/x")


# ------------------------------------------------------------------------------- raw, fingerprints


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int8])
def test_raw_tensors_are_the_bytes_of_the_file(tmp_path: Path, dtype: Any) -> None:
    values = (np.arange(1_500_000) % 100).reshape(3, -1).astype(dtype)
    save_file({"w": values, "x": values[:1]}, tmp_path / "m.safetensors")
    with open_model(tmp_path / "m.safetensors") as model:
        raw = model.raw("w")
        parts = [bytes(part) for part in raw.chunks]
        assert raw.dtype == model.tensors["w"].source_type
        assert raw.shape == values.shape
        assert b"".join(parts) == values.tobytes()
        assert max(map(len, parts)) <= 1 << 20


def test_raw_gguf_tensors_are_dequantized_only_where_they_must() -> None:
    with open_model(embedded_model_path()) as model:
        norm, matrix = model.raw("blk.0.attn_norm.weight"), model.raw("blk.0.attn_k.weight")
        assert (norm.dtype, matrix.dtype) == ("F32", "F32")
        for name, raw in (("blk.0.attn_norm.weight", norm), ("blk.0.attn_k.weight", matrix)):
            assert b"".join(bytes(part) for part in raw.chunks) == model.read(name).tobytes()


def test_raw_tensors_that_are_not_there_are_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    with open_model(tmp_path) as model, pytest.raises(InputError, match="tensor 'none': not in"):
        model.raw("none")


def test_a_fingerprint_is_of_every_byte_of_every_file(tmp_path: Path) -> None:
    sharded(tmp_path)

    def fingerprint() -> str:
        with open_model(tmp_path) as model:
            return model.fingerprint()

    first = fingerprint()
    assert fingerprint() == first
    shard = tmp_path / "model-00001-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert fingerprint() != first


# -------------------------------------------------------------------------------- choosing tensors


def chosen(model: Model, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> list[str]:
    return [matrix.name for matrix in choose_tensors(model, include, exclude).matrices]


def test_linear_weights_of_the_blocks_are_the_default(tmp_path: Path) -> None:
    sharded(tmp_path)
    with open_model(tmp_path) as model:
        assert chosen(model) == [NAMES[1], NAMES[3]]
        assert chosen(model, exclude=["*.0.*"]) == [NAMES[3]]
        # Vectors are left out however they are named.
        assert sorted(chosen(model, ["*"])) == sorted({*NAMES} - {NAMES[2]})
        assert chosen(model, ["*embed*", "*.1.*"], ["*.1.*"]) == [NAMES[0]]
        with pytest.raises(InputError, match="pattern 'x': matches no tensor"):
            choose_tensors(model, ["x"])
        with pytest.raises(InputError, match="pattern 'y': matches no tensor"):
            choose_tensors(model, exclude=["y"])
        with pytest.raises(InputError, match="no matrix is left to quantize"):
            choose_tensors(model, exclude=["*"])


def test_unknown_names_must_be_included(tmp_path: Path) -> None:
    save_file({"w": np.ones((2, 16), np.float32)}, tmp_path / "m.safetensors")
    with open_model(tmp_path / "m.safetensors") as model:
        with pytest.raises(InputError, match=r"no blocks with known names; name .* --include '\*'"):
            choose_tensors(model)
        assert chosen(model, ["*"]) == ["w"]


def test_a_hostile_folder_ends_a_command_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    sharded(folder)
    write_index(folder, with_map(folder, **{NAMES[0]: "../../etc/passwd"}))
    output = tmp_path / "out.safetensors"
    monkeypatch.setattr(sys, "argv", ["sop", "quantize", str(folder), "-o", str(output)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "passwd" in capsys.readouterr().err
    assert not output.exists()
