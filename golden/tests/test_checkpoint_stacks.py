"""Stacked tensors in a checkpoint: slices that belong together."""

from collections.abc import Callable
from pathlib import Path

import pytest

from golden.checkpoint import (
    METADATA_KEY,
    Checkpoint,
    CheckpointWriter,
    SourceInfo,
)
from golden.errors import InputError
from golden.tensor import QuantizedTensor
from golden.tests.checkpoint_files import (
    CONFIG,
    File,
    append,
    assert_same,
    load,
    random_tensor,
)

SLICES = [("t", (5, 37)), ("u", (3, 16))]


def write_slices(path: Path) -> dict[str, QuantizedTensor]:
    """Two stacked tensors of two slices each, the second transposed, beside a transposed matrix."""
    added = {}
    with CheckpointWriter(path, CONFIG) as writer:
        for tensor, shape in SLICES:
            for index in range(2):
                name = f"{tensor}[{index}]"
                added[name] = random_tensor("NF4sUE4M4", shape, index)
                source = SourceInfo(tensor, index, 2, tensor == "u")
                writer.add(name, added[name], None, "BF16", source)
        added["v"] = random_tensor("NF4sUE4M4", (4, 16), 7)
        writer.add("v", added["v"], None, "BF16", SourceInfo("v", None, None, True))
    return added


def test_slices_of_stacked_tensors_come_back(tmp_path: Path) -> None:
    added = write_slices(tmp_path / "model")
    with Checkpoint(tmp_path / "model") as checkpoint:
        for name, tensor in added.items():
            assert_same(checkpoint.read(name), tensor, None)
        assert checkpoint.model_tensors == {
            "t": ("t[0]", "t[1]"), "u": ("u[0]", "u[1]"), "v": ("v",)
        }  # fmt: skip
        shapes = []
        for names in checkpoint.model_tensors.values():
            info = checkpoint.info(names[0])
            assert info.source is not None
            shapes.append(info.source.model_shape(info.shape))
        assert shapes == [(2, 5, 37), (2, 16, 3), (16, 4)]


def change_source(name: str, **values: object) -> Callable[[File], None]:
    return lambda file: file.metadata["tensors"][name]["source"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.metadata["tensors"].pop("t[1]"), r"'t\[0\]': .* 1 of 2 slices of 't'"),
        (change_source("t[0]", count=3), r"'t\[1\]': .* count, shape and .* those of 't\[0\]'"),
        (change_source("u[1]", transposed=False), r"'u\[1\]': .* 'transposed' must be those"),
        (append("t", "U8", [0], b""), "tensor 't': is stored in slices and as a whole"),
        (change_source("t[1]", index=0), r"'t\[1\]': .*'t\[0\]', expected the name"),
    ],
)
def test_stacks_that_do_not_fit_together_are_refused(
    tmp_path: Path, change: Callable[[File], None], message: str
) -> None:
    path = tmp_path / "model"
    write_slices(path)
    file = load(path)
    del file.header["__metadata__"][METADATA_KEY]
    change(file)
    path.write_bytes(file.build())
    with pytest.raises(InputError, match=message):
        Checkpoint(path)


def test_a_stack_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "model"
    message = r"model: tensor 't\[0\]': field 'source': 1 of 2 slices of 't' are here"
    tensor = random_tensor("NF4sUE4M4", (5, 37), 1)
    with pytest.raises(InputError, match=message), CheckpointWriter(path, CONFIG) as writer:
        writer.add("t[0]", tensor, None, "BF16", SourceInfo("t", 0, 2, False))
    assert not list(tmp_path.iterdir())
    with CheckpointWriter(path, CONFIG) as writer, pytest.raises(InputError, match="'t', expected"):
        writer.add("x", tensor, None, "BF16", SourceInfo("t", None, None, True))
