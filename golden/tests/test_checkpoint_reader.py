"""Reading a checkpoint: hostile files, and what is asked of a good one that it does not have."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import golden.container
import golden.strict_json
from golden.checkpoint import (
    METADATA_KEY,
    Checkpoint,
    CheckpointWriter,
)
from golden.errors import InputError
from golden.tests.checkpoint_files import (
    CONFIG,
    File,
    about,
    append,
    assert_same,
    attribute,
    both,
    config,
    entry,
    lists,
    load,
    meta,
    nested,
    poke,
    random_corrections,
    random_tensor,
    raw_header,
    raw_metadata,
    read_all,
    remove,
    shift,
    source_of,
    swap_pokes,
    write_one,
    write_valid,
)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What :func:`write_valid` writes."""
    path = tmp_path_factory.mktemp("valid") / "valid.safetensors"
    write_valid(path)
    return path


def test_headers_beyond_the_limit_are_neither_written_nor_read(
    valid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden.container, "_MAX_HEADER_BYTES", 300)
    with pytest.raises(InputError, match=r"header: length \d{4}, at most 300 allowed"):
        Checkpoint(valid)
    with pytest.raises(InputError, match=r"model: header of \d{3} bytes, at most 300"):
        write_one(tmp_path / "model", random_tensor("NF4sUE4M4"), random_corrections((5, 37), 1))
    monkeypatch.undo()
    monkeypatch.setattr(golden.strict_json, "_MAX_MARKS", 20)
    with pytest.raises(InputError, match="header: JSON of more than 20 commas"):
        Checkpoint(valid)
    with pytest.raises(InputError, match="model: header of more than 20 commas"):
        write_one(tmp_path / "model", random_tensor("NF4sUE4M4"), random_corrections((5, 37), 1))
    assert not list(tmp_path.iterdir())


def test_the_file_apart_and_together_again_is_valid(valid: Path, tmp_path: Path) -> None:
    file = load(valid)
    del file.header["__metadata__"][METADATA_KEY]
    (tmp_path / "same").write_bytes(file.build())
    read_all(tmp_path / "same")


DEEP = 200_000
INDICES, INDPTR, COLUMNS = "a.indices", "a.corrections.indptr", "a.corrections.columns"
HOSTILE: dict[str, tuple[Callable[[File], None], str]] = {
    # the container
    "length 2^63": (attribute("length", 1 << 63), "header: length 9223372036854775808, at most"),
    "length 2^64-1": (attribute("length", (1 << 64) - 1), "header: length 18446744073709551615"),
    "length one too long": (attribute("length", 1 << 20), "header: length 1048576"),
    "length 0": (attribute("length", 0), "header: must be a JSON object"),
    "length too short": (attribute("length", 100), "header: must be a JSON object"),
    "not UTF-8": (raw_header(b'{"\xff":1}'), "header: not UTF-8: .* at byte 10"),
    "BOM": (raw_header(b"\xef\xbb\xbf{}"), "header: must be a JSON object"),
    "list": (raw_header(b"[]"), "header: must be a JSON object"),
    "leading space": (raw_header(b" {}"), "header: must be a JSON object"),
    "padded with newlines": (raw_header(b"{}\n"), "header: must be a JSON object"),
    "two objects": (raw_header(b"{}{}"), "header: not JSON: Extra data"),
    "broken JSON": (raw_header(b'{"a":}'), "header: not JSON: Expecting value"),
    "deep lists": (raw_header(b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}"), "nested too deep"),
    "deep objects": (raw_header(b'{"a":' * DEEP + b"1" + b"}" * DEEP), "nested too deep"),
    "lists almost too deep": (
        raw_header(b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"), "must be an object|too deep"
    ),
    "lists in a tensor": (lambda file: file.header.update(n=lists(300)), "'n': must be an object"),
    "many values": (raw_header(b'{"a":[' + b"1," * 4_000_000 + b"1]}"), "JSON of more than"),
    "duplicate tensor": (raw_header(b'{"a":1,"a":1}'), "header: duplicate key 'a'"),
    "duplicate dtype": (raw_header(b'{"a":{"dtype":"U8","dtype":"U8"}}'), "duplicate key 'dtype'"),
    "huge integer": (raw_header(b'{"a":' + b"9" * 1_000_000 + b"}"), "more than 20 digits"),
    "NaN": (raw_header(b'{"a":NaN}'), "header: NaN is not JSON"),
    "no metadata": (lambda file: file.header.pop("__metadata__"), "__metadata__: no key"),
    "metadata of numbers": (lambda file: file.header.update(__metadata__={"a": 1}), "of strings"),
    "metadata list": (lambda file: file.header.update(__metadata__=[]), "of strings"),
    "another program's": (
        attribute("metadata_key", "other_program"),
        "this is a safetensors file, but no checkpoint",
    ),
    "entry not an object": (lambda file: file.header.update(n=3), "tensor 'n': must be an object"),
    "entry without dtype": (lambda file: file.header["n"].pop("dtype"), "key 'dtype' is missing"),
    "entry with more": (entry("n", "more", 1), "tensor 'n': unknown key 'more'"),
    "empty name": (append("", "U8", [0], b""), "tensor '': name '' is reserved, empty"),
    "long name": (append("x" * 1025, "U8", [0], b""), "over 1024 bytes"),
    "line in a name": (append("a\nb", "U8", [0], b""), "a control character or line separator"),
    "line separator": (append("a\u2028b", "U8", [0], b""), "a control character or line separ"),
    "surrogate name": (append("\ud800", "U8", [0], b""), "not valid Unicode"),
    "dtype number": (entry("n", "dtype", 32), "tensor 'n': field 'dtype': 32 is not a string"),
    "dtype unknown": (entry("n", "dtype", "F31"), "tensor 'n': field 'dtype': 'F31', expected"),
    "shape number": (entry("n", "shape", 3), "tensor 'n': field 'shape': must be a list"),
    "shape bool": (entry("n", "shape", [True]), "field 'shape': must be a list"),
    "shape float": (entry("n", "shape", [3.0]), "field 'shape': must be a list"),
    "shape negative": (entry("n", "shape", [-3]), "field 'shape': must be a list"),
    "shape 2^63": (entry("n", "shape", [1 << 63]), "field 'shape': .* is no shape"),
    "shape that wraps to 3": (
        entry("n", "shape", [1 << 62, 16, 3]), "data_offsets': 12 bytes, F32 .* has"
    ),
    "shape of rank 33": (entry("n", "shape", [1] * 33), "field 'shape': .* is no shape"),
    "shape of rank 100000": (entry("n", "shape", [1 << 62] * 100_000), "field 'shape': .* is no"),
    "offsets past the end": (shift("b.indices", 1 << 40, 1 << 40), "is no part of"),
    "offsets 2^63": (entry("n", "data_offsets", [0, 1 << 63]), "is no part of"),
    "offsets backward": (entry("n", "data_offsets", [12, 0]), "is no part of"),
    "offsets negative": (entry("n", "data_offsets", [-12, 0]), "must be a list of integers"),
    "three offsets": (entry("n", "data_offsets", [0, 12, 24]), "is no part of"),
    "overlap": (shift("n", -4, -4), "field 'data_offsets': starts at"),
    "the same bytes twice": (
        lambda file: file.header.update(x=file.header["n"]), "'data_offsets': starts at"
    ),
    "hole": (
        lambda file: file.header.pop("a.luts"), "field 'data_offsets': starts at .* ends at"
    ),
    "hole at the end": (attribute("data", b""), "is no part of 0 bytes"),
    "length and shape differ": (entry("n", "shape", [2]), "12 bytes, F32 .* has 8"),
    # the metadata
    "metadata not JSON": (raw_metadata(lambda text: text[:-1]), "metadata .*: not JSON"),
    "metadata a list": (raw_metadata(lambda text: "[1]"), "metadata .*: must be an object"),
    "metadata deep": (raw_metadata(lambda text: "[" * DEEP), "metadata .*: JSON is nested too"),
    "metadata duplicate key": (
        raw_metadata(lambda text: '{"version": 2, ' + text[1:]), "duplicate key 'version'"
    ),
    "tensor twice": (
        raw_metadata(lambda text: text.replace('"c":', '"a":')), "metadata .*: duplicate key 'a'"
    ),
    "version 1": (meta("version", 1), "version 1, .* reads version 2; .* quantize .* again"),
    "version 3": (meta("version", 3), "version 3, this program reads version 2"),
    "version 1.0": (meta("version", 1.0), "version 1.0, this program"),
    "version true": (meta("version", True), "version True"),
    "no version": (lambda file: file.metadata.pop("version"), "version None"),
    "unknown key": (meta("more", 1), "metadata .*: unknown key 'more'"),
    "missing key": (lambda file: file.metadata.pop("calibration"), "'calibration' is missing"),
    "config hash": (meta("config_hash", "0" * 64), "config_hash: '0000.* config has"),
    "config changed": (meta("config", "{}"), "config_hash: .* config has '44136fa3"),
    "config an object": (meta("config", {}), "config: must be a string, not {}"),
    "config surrogate": (meta("config", "\ud800"), "config: is not valid Unicode"),
    "config no JSON": (config("{"), "config: not JSON"),
    "config twice": (config('{"a":1,"a":2}'), "config: duplicate key 'a'"),
    "config a list": (config("[]"), "config: must be an object"),
    "config infinite": (config('{"a":1e999}'), "config: inf is not a finite"),
    "config deep": (config(json.dumps(nested(17))), "config: nested more than 16 deep"),
    "calibration a list": (meta("calibration", []), "calibration: must be an object"),
    "tensors a list": (meta("tensors", []), "tensors: must be an object"),
    "tensor not an object": (lambda file: file.metadata["tensors"].update(a=1), "'a': must be an"),
    "tensor with more": (about("a", "bits", 4), "tensor 'a': unknown key 'bits'"),
    "format unknown": (about("a", "format", "NF5sUE4M4"), "'a': field 'format': .*unknown element"),
    "format number": (about("a", "format", 4), "field 'format': 4 is not the name"),
    "format long": (about("a", "format", "NF4-" * 99), "field 'format': .* is not the name"),
    "format spelled otherwise": (
        about("b", "format", "E4M3^16sBF16"), "'b': field 'format': .* must be spelled 'E4M3sBF16'"
    ),
    "hif unknown": (about("a", "hif", "HIF9"), "tensor 'a': field 'hif': 'HIF9', expected HIF7"),
    "hif a list": (about("a", "hif", []), "tensor 'a': field 'hif': "),
    "rank 3": (about("a", "shape", [4, 20, 1]), "'a': field 'shape': must have two dimensions"),
    "no rows": (about("a", "shape", [0, 20]), "'a': field 'shape': must be a list of integers"),
    "shape huge": (about("a", "shape", [1 << 62, 1 << 62]), "field 'indices': U8 .*, expected U8"),
    "shape transposed": (about("a", "shape", [20, 4]), "tensor 'a': field 'indices': "),
    "rows changed": (about("b", "shape", [4, 17]), "tensor 'b': field 'indices': "),
    "exponent 128": (about("a", "layer_exponent", 128), "field 'layer_exponent': 128 is not in"),
    "exponent float": (about("a", "layer_exponent", 0.5), "field 'layer_exponent': 0.5 is not"),
    "source missing": (
        lambda file: file.metadata["tensors"]["a"].pop("source"), "'a': key 'source' is missing"
    ),
    "source a list": (about("a", "source", []), "tensor 'a': field 'source': must be an object"),
    "source of another name": (
        about("a", "source", source_of("b", transposed=True)), "'source': 'b', expected the name"
    ),
    "source that says nothing": (about("a", "source", source_of("a")), "'source': must be null"),
    "source without count": (
        about("a[0]", "source", source_of("a", 0, None)), "'index' and 'count' must both be"
    ),
    "source index true": (
        about("a[0]", "source", source_of("a", True, 2)), "'index' must be a number or null"
    ),
    "source index past the end": (
        about("a[0]", "source", source_of("a", 0, 0)), "'source': index 0 is not below 0"
    ),
    "source transposed 1": (
        about("a", "source", source_of("a") | {"transposed": 1}), "'transposed' must be true or"
    ),
    "source with more": (
        about("a", "source", source_of("a") | {"x": 1}), "field 'source': unknown key 'x'"
    ),
    "source tensor a number": (
        about("a", "source", source_of("a") | {"tensor": 1}), "'tensor' must be a string, not 1"
    ),
    "source tensor long": (
        about("a", "source", source_of("x" * 2000)), "field 'source': name .* over 1024 bytes"
    ),
    "source dtype": (about("a", "dtype", "F\n32"), "field 'dtype': .* is not a type name"),
    # the fields of a tensor
    "indices missing": (remove(INDICES), "tensor 'a': field 'indices': is missing"),
    "luts missing": (remove("a.luts"), "tensor 'a': field 'luts': is missing"),
    "row scales missing": (remove("a.row_scales"), "tensor 'a': field 'row_scales': is missing"),
    "indptr missing": (remove(INDPTR), "tensor 'a': field 'corrections.indptr': is missing"),
    "values missing": (remove("a.corrections.values"), "field 'corrections.values': is missing"),
    "luts of atoms": (append("b.luts", "U8", [0], b""), "'b': field 'luts': .* no such field"),
    "row scales of others": (append("b.row_scales", "BF16", [3], bytes(6)), "no such field"),
    "stored twice": (append("a", "U8", [0], b""), "'a': name 'a' is stored quantized and"),
    "name is a field": (
        lambda file: file.metadata["tensors"].update({INDICES: file.metadata["tensors"]["a"]}),
        "tensor 'a.indices': name 'a.indices' is also of another",
    ),
    "indices short": (
        both(remove(INDICES), append(INDICES, "U8", [63], bytes(63))), r"U8 \[63\], expected U8"
    ),
    "indices 2-D": (entry(INDICES, "shape", [4, 16]), r"U8 \[4, 16\], expected U8 \[64\]"),
    "indices signed": (entry(INDICES, "dtype", "I8"), r"field 'indices': I8 \[64\], expected U8"),
    "one LUT": (both(remove("a.luts"), append("a.luts", "U8", [1, 16], bytes(16))),
                r"field 'luts': U8 \[1, 16\], expected U8 \[2, 16\]"),
    "row scales as F16": (entry("a.row_scales", "dtype", "F16"), "F16 .*, expected BF16"),
    "columns as I16": (entry(COLUMNS, "dtype", "I16"), r"field 'corrections.columns': I16 \[4\]"),
    "one column less": (
        both(remove(COLUMNS), append(COLUMNS, "U16", [3], bytes(6))), r"U16 \[3\], expected"
    ),
    # codes
    "LUT entry reserved": (poke("a.luts", 16 + 3, 0xE1), r"field 'luts\[1\]': HIF8 code 0xe1 .*3"),
    "LUT entry not canonical": (poke("a.luts", 15, 0x42), r"luts\[0\]': LUT entry 15: .*0x42 is n"),
    "LUT not sorted": (swap_pokes, r"'a': field 'luts\[1\]': LUT entries must ascend strictly"),
    "LUT entry wide": (poke("c.luts", 0, 0x90), r"field 'luts\[0\]': LUT entries must be 7-bit"),
    "atom NaN": (poke("b.indices", 33, 0xFF), r"'b': field 'indices': E4M3 code 0xff at \(1, 0, 1"),
    "scale NaN": (poke("b.scales", 2, 0x80, 0x7F), "tensor 'b': field 'scales': BF16 code 0x7f80"),
    "row scale infinite": (poke("a.row_scales", 2, 0x80, 0x7F), "'row_scales': BF16 .* 0x7f80 at"),
    "bits after the last": (poke("c.scales", 1, 0xFF), "'c': field 'scales': plane has bits set"),
    # corrections
    "value NaN": (poke("a.corrections.values", 2, 0xC0, 0x7F), "'corrections.values': entry 1"),
    "column twice": (poke(COLUMNS, 2, 3, 0), r"'corrections.columns': entry 1 .* follows column 3"),
    "columns descend": (poke(COLUMNS, 2, 0, 0), "columns': entry 1 .* follows column 3"),
    "column past the end": (poke(COLUMNS, 6, 20, 0), "entry 3 .*, column 20. is not in range"),
    "indptr from 1": (poke(INDPTR, 0, 1), "field 'corrections.indptr': starts at 1"),
    "indptr descends": (poke(INDPTR, 4, 5), "corrections.indptr': entry 2 is 2, less than 5"),
    "indptr ends early": (poke(INDPTR, 16, 3), "corrections.indptr': ends at 3, but there are 4"),
    "indptr 2^32-1": (poke(INDPTR, 16, 255, 255, 255, 255), "indptr': ends at 4294967295"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_at_once(valid: Path, tmp_path: Path, case: str) -> None:
    change, message = HOSTILE[case]
    file = load(valid)
    del file.header["__metadata__"][METADATA_KEY]
    change(file)
    path = tmp_path / "model.safetensors"
    path.write_bytes(file.build())
    start = time.perf_counter()
    with pytest.raises(InputError, match=message) as caught:
        read_all(path)
    assert time.perf_counter() - start < 1
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    assert len(text) < 1000 + len(str(path))


def test_every_truncation_and_extension_is_refused(valid: Path, tmp_path: Path) -> None:
    data = valid.read_bytes()
    path = tmp_path / "model.safetensors"
    file = load(valid)
    borders = {7, 8, file.start, len(data) - 1}
    for name, value in file.header.items():
        if name != "__metadata__":
            borders.add(file.start + value["data_offsets"][0])
    for length in sorted(borders.union(range(0, len(data), 9))):
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=rf"^{path}: "):
            Checkpoint(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(InputError, match=rf"^{path}: header: tensors cover"):
        Checkpoint(path)


def refusal(path: Path) -> str | None:
    """The error that reading everything ends with, if it does."""
    try:
        read_all(path)
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("seed", [24])
def test_changed_bytes_are_refused_or_read_but_never_crash(
    valid: Path, tmp_path: Path, seed: int
) -> None:
    data = valid.read_bytes()
    rng = np.random.default_rng(seed)
    path = tmp_path / "model.safetensors"
    refused = 0
    for _ in range(400):
        changed = bytearray(data)
        for _ in range(int(rng.integers(1, 4))):
            changed[int(rng.integers(len(changed)))] = int(rng.integers(256))
        path.write_bytes(changed)
        message = refusal(path)
        refused += message is not None
        assert message is None or message.startswith(f"{path}: ")
    assert refused > 200


def test_reading_one_tensor_does_not_touch_another(valid: Path, tmp_path: Path) -> None:
    file = load(valid)
    del file.header["__metadata__"][METADATA_KEY]
    file.poke("a.luts", 19, b"\xe1")
    (tmp_path / "model").write_bytes(file.build())
    with Checkpoint(tmp_path / "model") as broken, Checkpoint(valid) as whole:
        stored = whole.read("b")
        assert_same(broken.read("b"), stored.tensor, stored.corrections)
        with pytest.raises(InputError, match="tensor 'a': field 'luts"):
            broken.read("a")


def test_a_file_that_shrinks_while_open_is_an_error(tmp_path: Path) -> None:
    path, size = tmp_path / "model", 1 << 17  # beyond what a buffered file has read already
    with CheckpointWriter(path, CONFIG) as writer:
        writer.add_raw("r", "I16", (size // 2,), [bytes(size)])
        writer.add("w", random_tensor("NF4sUE4M4"), None, "F32")
    with Checkpoint(path) as checkpoint:
        os.truncate(path, size // 2)
        with pytest.raises(InputError, match=r"tensor 'w': field '\w+': the file ends after 0 of"):
            checkpoint.read("w")
        with pytest.raises(
            InputError, match=r"tensor 'r': the file ends after \d+ of 131072 bytes"
        ):
            checkpoint.read_raw("r")
        with pytest.raises(InputError, match="tensor 'r': the file ends at byte 65536, before"):
            list(checkpoint.raw_chunks("r"))


def test_names_and_paths_that_do_not_exist(valid: Path, tmp_path: Path) -> None:
    with Checkpoint(valid) as checkpoint:
        quantized: list[Callable[[str], object]] = [checkpoint.read, checkpoint.info]
        raw: list[Callable[[str], object]] = [checkpoint.read_raw, checkpoint.raw_info]
        for call in quantized:
            with pytest.raises(InputError, match=rf"{valid}: tensor 'n': no such quantized tensor"):
                call("n")
        for call in [*raw, checkpoint.bits]:
            with pytest.raises(InputError, match=r"tensor 'a.luts': no such raw tensor"):
                call("a.luts")
    with pytest.raises(InputError, match="no such file"):
        Checkpoint(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(InputError, match="not a regular file"):
            Checkpoint(path)
