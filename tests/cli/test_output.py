"""What commands refuse to write to, before they do any work."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from golden.checkpoint import Checkpoint
from golden.errors import InputError
from sop.quantizing.quantization import quantize_model
from sop.quantizing.settings import Settings
from sop.shared.output import CALIBRATION, CHECKPOINT, output_file, output_folder
from tests.support.commands import output_of
from tests.support.folders import contents
from tests.support.one_matrix import FAST, LAYER, one_matrix, quantized


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return one_matrix(tmp_path / "source")


@pytest.fixture
def checkpoint(source: Path, tmp_path: Path) -> Path:
    return quantized(source, tmp_path / "q.sop")


# ---------------------------------------------------------------------------------------- inputs


def same(source: Path) -> Path:
    return source


def hard_link(source: Path) -> Path:
    os.link(source, source.parent.parent / "hard")
    return source.parent.parent / "hard"


def symbolic_link(source: Path) -> Path:
    (source.parent.parent / "soft").symlink_to(source)
    return source.parent.parent / "soft"


def linked_folder(source: Path) -> Path:
    (source.parent.parent / "again").symlink_to(source.parent)
    return source.parent.parent / "again" / source.name


def through_parent(source: Path) -> Path:
    return source.parent / ".." / source.parent.name / source.name


NAMES = [same, hard_link, symbolic_link, linked_folder, through_parent]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("force", [[], ["--force"]], ids=["", "force"])
def test_an_input_is_never_replaced(
    source: Path, tmp_path: Path, name: Callable[[Path], Path], force: list[str]
) -> None:
    output = name(source)
    before = contents(tmp_path)
    with pytest.raises(InputError, match="is the input"):
        output_of("quantize", source, *FAST, "-o", output, *force)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "new.sop", "deep/new.sop"])
def test_nothing_is_written_into_the_folder_of_a_model(
    source: Path, tmp_path: Path, name: str
) -> None:
    before = contents(tmp_path)
    with pytest.raises(InputError, match="which is an input"):
        output_of("quantize", source.parent, *FAST, "-o", source.parent / name, "--force")
    assert contents(tmp_path) == before


def test_a_shard_that_is_a_link_is_an_input_too(source: Path, tmp_path: Path) -> None:
    blob = source.rename(tmp_path / "blob")  # as in the cache of the hub
    source.symlink_to(blob)
    with pytest.raises(InputError, match="is the input"):
        output_of("quantize", source.parent, *FAST, "-o", blob, "--force")


@pytest.mark.parametrize("option", ["--calibration", "--codebooks", "--config"])
def test_other_inputs_are_as_safe_as_the_model(source: Path, tmp_path: Path, option: str) -> None:
    path = tmp_path / "given"
    path.write_text("")
    with pytest.raises(InputError, match="is the input"):
        output_of("quantize", source, *FAST, option, path, "-o", path, "--force")
    assert path.read_text() == ""


def test_other_commands_refuse_their_inputs(checkpoint: Path, source: Path, tmp_path: Path) -> None:
    page, decoded = tmp_path / "q.html", tmp_path / "q.safetensors"
    for path in (page, decoded):
        os.link(checkpoint, path)
    before = contents(tmp_path)
    for arguments in (
        ("decode", checkpoint, "-o", decoded),
        ("report", checkpoint, "-o", page),
        ("calibrate", source, "-o", source),
        ("calibrate", source.parent, "-o", source.parent / "c.safetensors"),
    ):
        with pytest.raises(InputError, match=r"is the input|which is an input"):
            output_of(*arguments, "--force")
    assert contents(tmp_path) == before


# ------------------------------------------------------------------------------- no regular files


@pytest.mark.parametrize("force", [False, True])
def test_only_regular_files_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    Path("folder").mkdir()
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    Path("null").symlink_to("/dev/null")
    Path("out").symlink_to("/dev/stdout")
    for name, problem in {
        "pipe": "is a named pipe",
        "socket": "is a socket",
        "folder": "is a folder",
        ".": "is a folder",
        "..": "is a folder",
        "/": "is a folder",
        "/dev/null": "is a device",
        "null": "is a device",
        "/dev/stdout": "is an open stream",
        "/dev/fd/1": "is an open stream",
        "/proc/self/fd/1": "is an open stream",
        "out": "is an open stream",
        "-": "standard output",
        "dangling": "does not exist",
        "loop": "is a link",
        "a\0b": "NUL",
        "x" * 300: "File name too long",
        "x" * 250: "File name too long",
    }.items():
        with pytest.raises(InputError, match=problem):
            output_file(Path(name), CHECKPOINT, force=force)
    assert sorted(os.listdir()) == ["dangling", "folder", "loop", "null", "out", "pipe", "socket"]


def test_a_link_stands_for_the_file_behind_it(
    source: Path, tmp_path: Path, checkpoint: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(checkpoint)
    checkpoint.rename(tmp_path / "other")
    with pytest.raises(InputError, match="does not exist"):
        output_of("quantize", source, *FAST, "-o", link)
    (tmp_path / "other").rename(checkpoint)
    output_of("quantize", source, "-f", "E4M3sUE4M4", "-j", 1, "-o", link)
    assert link.is_symlink()
    assert b"E4M3sUE4M4" in checkpoint.read_bytes()


# ---------------------------------------------------------------------------------- foreign files


def test_a_file_of_another_kind_is_replaced_with_force_only(
    source: Path, tmp_path: Path, checkpoint: Path
) -> None:
    made = checkpoint.read_bytes()
    calibration = tmp_path / "calibration"
    save_file({"a": np.zeros(1)}, calibration, {"sop_calibration": "{}"})
    for content in (b"", b"mine", source.read_bytes(), calibration.read_bytes()):
        checkpoint.write_bytes(content)
        with pytest.raises(InputError, match="exists and is not a checkpoint; --force replaces it"):
            output_of("quantize", source, *FAST, "-o", checkpoint)
        assert checkpoint.read_bytes() == content
        output_of("quantize", source, *FAST, "-o", checkpoint, "--force")
        assert checkpoint.read_bytes() == made
    output_of("quantize", source, *FAST, "-o", checkpoint)  # its own needs no force


def test_every_kind_knows_its_own(checkpoint: Path, source: Path, tmp_path: Path) -> None:
    page, decoded = tmp_path / "q.html", tmp_path / "q.safetensors"
    decoding = ["decode", checkpoint, "-o", decoded]
    reporting = ["report", checkpoint, "-o", page, "--png", tmp_path / "figures"]
    for command, output in ((decoding, decoded), (reporting, page)):
        output.write_text("mine")
        with pytest.raises(InputError, match="exists and is not"):
            output_of(*command)
        assert output.read_text() == "mine"
        output_of(*command, "--force")
        output_of(*command)
    (figure,) = (tmp_path / "figures").glob("*-formats.png")
    figure.write_bytes(b"mine")
    with pytest.raises(InputError, match=r"formats\.png: exists and is not"):
        output_of(*reporting)
    assert figure.read_bytes() == b"mine"


def test_weights_are_not_replaced_by_their_statistics(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    other.write_bytes(source.read_bytes())
    with pytest.raises(InputError, match="exists and is not a calibration file"):
        output_of("calibrate", source.parent, "-o", other)
    (tmp_path / "c.safetensors.partial").write_bytes(b"mine")
    with pytest.raises(InputError, match="partial: is in the way"):
        output_of("calibrate", source.parent, "-o", tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors.partial").read_bytes() == b"mine"


def test_a_read_only_file_stays(source: Path, checkpoint: Path) -> None:
    checkpoint.chmod(0o444)
    with pytest.raises(InputError, match="is read-only"):
        output_of("quantize", source, *FAST, "-o", checkpoint, "--force")


# ---------------------------------------------------------------------------------------- folders


def test_a_folder_that_cannot_be_written_to_is_found_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for path in ("file/a", "file/a/b"):
        with pytest.raises(InputError, match=r"is not a folder|is a file"):
            output_file(tmp_path / path, CHECKPOINT)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        output_file(tmp_path / "nowhere" / "a", CHECKPOINT, make_folder=False)
    # Root may write everywhere but here.
    with pytest.raises(InputError, match="cannot be written to"):
        output_folder(Path("/sys/kernel/new"), ["a"], CHECKPOINT)
    monkeypatch.chdir(tmp_path)
    assert output_file(Path("build/a"), CHECKPOINT, make_folder=False) == tmp_path / "build" / "a"


def test_a_refused_folder_is_not_made(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b").write_text("mine")
    with pytest.raises(InputError, match="out/b: exists and is not"):
        output_folder(tmp_path / "out", ["deep/a", "b"], CALIBRATION)
    assert contents(tmp_path) == {"out": None, "out/b": b"mine"}
    with pytest.raises(InputError, match="is not a folder"):
        output_folder(tmp_path / "out" / "b", ["a"], CALIBRATION)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["verilog", "float_to_hif", "--lanes", "1"], "float_to_hif_1_bf16_hif8t.v"),
        (["datasheet", "float_to_hif", "--text-only"], "float_to_hif.md"),
        (["vectors", "-f", "E2M1^32sUE8M0"], "blocks/E2M1_b32sUE8M0.json"),
    ],
)
def test_commands_that_fill_a_folder_replace_their_own_files_only(
    tmp_path: Path, arguments: list[str], name: str
) -> None:
    folder = tmp_path / "out"
    command = [*arguments, "-o", folder]
    output_of(*command)
    made = contents(folder)
    assert name in made, sorted(made)
    output_of(*command)
    (folder / "notes").write_text("mine")
    unknown = folder / name
    if arguments[0] == "vectors":  # its files are those that a manifest names
        (folder / "manifest.json").unlink()
    unknown.write_text("mine")
    before = contents(folder)
    with pytest.raises(InputError, match="exists and is not"):
        output_of(*command)
    assert contents(folder) == before
    output_of(*command, "--force")
    assert contents(folder) == {**made, "notes": b"mine"}


def test_a_set_of_vectors_that_was_not_finished_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    command = ["vectors", "-f", "E2M1^32sUE8M0", "-o", tmp_path]
    with monkeypatch.context() as patch:
        patch.setattr("sop.commands.vectors.manifest_text", fail)
        with pytest.raises(OSError, match="disk full"):
            output_of(*command)
    assert not (tmp_path / "manifest.json").exists()
    output_of(*command)
    assert not (tmp_path / ".manifest.json").exists()


@pytest.mark.parametrize("name", ["resources.json", "resources.md"])
def test_tables_of_others_stay(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="exists and is not a table of `sop synth`"):
        output_of("synth", "-o", tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_an_exported_model_is_a_new_folder(
    checkpoint: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(folder: Path) -> None:
        output_of("export", checkpoint, "-o", folder, "--model", source.parent)

    export(tmp_path / "new")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    before = contents(tmp_path)
    for name, problem in {
        "new": "not an empty folder",
        "full": "not an empty folder",
        "link": "is a link",
        "source": "which is an input",
        "source/new": "which is an input",
        "q.sop": "is not a folder",
    }.items():
        with pytest.raises(InputError, match=problem):
            export(tmp_path / name)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "empty")
    with pytest.raises(InputError, match="not an empty folder"):
        export(tmp_path / "empty")
    assert contents(tmp_path) == before
    monkeypatch.undo()
    export(tmp_path / "empty")


def test_the_checkpoint_of_verilog_is_never_replaced(checkpoint: Path, tmp_path: Path) -> None:
    command = ["verilog", "float_to_hif", "--lanes", "1", "-o", tmp_path / "out"]
    output_of(*command)
    name = tmp_path / "out" / "float_to_hif_1_bf16_hif8t.v"
    os.replace(checkpoint, name)
    before = contents(tmp_path)
    with pytest.raises(InputError, match="is the input"):
        output_of(*command, "--checkpoint", name, "--force")
    assert contents(tmp_path) == before


def test_a_link_in_a_folder_stands_for_the_file_behind_it(tmp_path: Path) -> None:
    command = ["verilog", "float_to_hif", "--lanes", "1", "-o", tmp_path / "out"]
    output_of(*command)
    made = contents(tmp_path / "out")
    link = tmp_path / "out" / "float_to_hif_1_bf16_hif8t.v"
    link.rename(tmp_path / "real.v")
    link.symlink_to(tmp_path / "real.v")
    (tmp_path / "real.v").write_text("mine")
    output_of(*command, "--force")
    assert link.is_symlink()
    assert contents(tmp_path / "out") == made


def test_builds_go_into_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is not a folder"):
        output_of("synth", "--cache", tmp_path / "file")


def test_builds_do_not_go_into_the_folder_of_a_model(source: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    with pytest.raises(InputError, match="which is an input"):
        output_of("sim", source.parent, "--lanes", 16, "--build", source.parent / "builds")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("files", [{}, {"notes": "mine"}, {"lock": "mine"}, {"run.json": "{}"}])
def test_a_folder_of_parts_that_no_run_made_is_left_alone(
    source: Path, tmp_path: Path, files: dict[str, str]
) -> None:
    folder = tmp_path / "q.sop.parts"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    before = contents(tmp_path)
    command = ["quantize", source, *FAST, "-o", tmp_path / "q.sop"]
    if files:
        for options in ([], ["--resume"], ["--force"]):
            with pytest.raises(InputError, match=r"was not made by|is in the way"):
                output_of(*command, *options)
        assert contents(tmp_path) == before
    else:
        output_of(*command)
        assert contents(tmp_path).keys() == {*before, "q.sop"}


def test_files_that_somebody_put_among_the_parts_stay(source: Path, tmp_path: Path) -> None:
    parts = tmp_path / "q.sop.parts"

    def put(what: str, done: int, total: int) -> None:
        (parts / "notes").write_text("mine")

    settings = Settings("NF4sUE4M4", None, effort="fast")
    quantize_model(source, [LAYER], tmp_path / "q.sop", settings, progress=put)
    assert contents(parts) == {"notes": b"mine"}


def test_a_refused_run_leaves_no_parts(source: Path, tmp_path: Path) -> None:
    weights = np.ones((16, 32), np.float32)
    broken = weights.copy()
    broken[3, 5] = np.nan
    save_file({LAYER: weights, LAYER.replace("0", "1"): broken}, source)
    with pytest.raises(InputError, match="nan"):
        output_of("quantize", source, *FAST, "-o", tmp_path / "q.sop")
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_the_result_names_the_output_as_the_user_did(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        json.loads(output_of("quantize", source, *FAST, "-o", "q.sop", "--json"))["output"]
        == "q.sop"
    )


def test_names_need_not_be_utf_8(source: Path, tmp_path: Path) -> None:
    model = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff.safetensors"))
    source.rename(model)
    output = Path(os.fsdecode(os.fsencode(tmp_path) + b"/q\xff.sop"))
    for _ in range(2):  # the second time its own file is known
        assert json.loads(output_of("quantize", model, *FAST, "-o", output, "--json"))["layers"]
    with Checkpoint(output) as opened:
        assert opened.config["source"]["file"] == "m\ufffd.safetensors"


def test_a_model_in_the_current_folder_has_a_name(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    output_of("quantize", ".", *FAST, "-o", "../q.sop")
    with Checkpoint(tmp_path / "q.sop") as opened:
        assert opened.config["source"]["file"] == "source"
