"""Reading files of activation statistics: what they hold, and which are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from golden.errors import InputError
from sop.files.calibration import FEW_TOKENS, Calibration

Arrays = dict[str, NDArray[Any]]


NORMS_Q = np.array([3.0, 0.0, 0.5])
NORMS_DOWN = np.array([1.0, 2.0])
MOMENT_Q = np.array([[9, 0, 1.5], [0, 0, 0], [1.5, 0, 0.25]], np.float32)
MOMENT_DOWN = np.array([[1, -1], [-1, 4]], np.float32)


def good_description() -> dict[str, Any]:
    return {
        "version": 2,
        "model": "m.gguf",
        "model_sha256": "ab",
        "config_sha256": "",
        "text": "t.txt",
        "text_sha256": "cd",
        "skip_tokens": 0,
        "tokens": 7,
        "window": 4,
        "prefix_tokens": [],
        "second_moment": True,
        "software": "numpy 2",
        "layers": {"q": "q", "k": "q", "down": "down"},
        "layer_tokens": {"q": 7, "down": 3},
        "uncovered": {"up": "no token was sent there"},
    }


def good_arrays() -> Arrays:
    return {
        "q.channel_norms": NORMS_Q.copy(),
        "q.second_moment": MOMENT_Q.copy(),
        "down.channel_norms": NORMS_DOWN.copy(),
        "down.second_moment": MOMENT_DOWN.copy(),
    }


def write_file(path: Path, arrays: Arrays, description: object) -> Path:
    save_file(arrays, path, {"sop_calibration": json.dumps(description)})
    return path


def test_reader_gives_what_the_file_holds(tmp_path: Path) -> None:
    path = write_file(tmp_path / "c.safetensors", good_arrays(), good_description())
    calibration = Calibration(path)
    assert list(calibration.layers) == ["q", "k", "down"]
    assert calibration.run.tokens == 7
    for name, norms, moment in (
        ("q", NORMS_Q, MOMENT_Q),
        ("k", NORMS_Q, MOMENT_Q),
        ("down", NORMS_DOWN, MOMENT_DOWN),
    ):
        np.testing.assert_array_equal(calibration.channel_norms(name), norms, strict=True)
        read = calibration.second_moment(name)
        assert read is not None
        np.testing.assert_array_equal(read, moment.astype(np.float64), strict=True)


def test_reader_without_second_moments(tmp_path: Path) -> None:
    arrays = {key: value for key, value in good_arrays().items() if key.endswith("norms")}
    description = good_description() | {"second_moment": False}
    calibration = Calibration(write_file(tmp_path / "c.safetensors", arrays, description))
    assert calibration.second_moment("k") is None
    np.testing.assert_array_equal(calibration.channel_norms("k"), NORMS_Q)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 1, "field 'version': 1 is not supported, expected 2; make the file anew"),
        ("version", True, "field 'version': True is not supported"),
        ("tokens", "7", "field 'tokens': expected int, got '7'"),
        ("tokens", True, "field 'tokens': expected int, got True"),
        ("tokens", 0, "field 'tokens': must be at least 1, not 0"),
        ("skip_tokens", -1, "field 'skip_tokens': must be at least 0, not -1"),
        ("window", 0, "field 'window': must be at least 1, not 0"),
        ("second_moment", 1, "field 'second_moment': expected bool, got 1"),
        ("second_moment", False, "second_moment': unknown"),
        ("extra", 1, "field 'extra': unknown"),
        ("layers", [], "field 'layers': expected a JSON object"),
        ("layers", {}, "field 'layers': expected a JSON object with at least one layer"),
        ("layers", {"q": "k"}, "layer 'q' refers to 'k', which has no statistics"),
        ("layers", {"q": "k", "k": "q"}, "layer 'q' refers to 'k', which has no statistics"),
        ("layers", {"q": ["q"]}, r"layer 'q' refers to \['q'\]"),
        ("layers", {"q": "q"}, "field 'layer_tokens': expected a count for each layer with"),
        ("layers", {"q": "q", "down": "down", "o": "o"}, "field 'layer_tokens': expected a count"),
        ("layer_tokens", {"q": 7, "down": 0}, "field 'layer_tokens': 'down': 0 tokens"),
        ("layer_tokens", {"q": 7, "down": True}, "field 'layer_tokens': 'down': True tokens"),
        ("layer_tokens", [7, 3], "field 'layer_tokens': expected a count"),
        ("uncovered", {"q": "lost"}, "field 'uncovered': expected a reason for layers without"),
        ("uncovered", {"up": 1}, "field 'uncovered': expected a reason"),
        ("prefix_tokens", 0, "field 'prefix_tokens': expected a list of token ids, got 0"),
        ("prefix_tokens", ["1"], "field 'prefix_tokens': expected a list of token ids"),
    ],
)
def test_reader_refuses_descriptions(
    tmp_path: Path, field: str, value: object, message: str
) -> None:
    description = good_description() | {field: value}
    path = write_file(tmp_path / "c.safetensors", good_arrays(), description)
    with pytest.raises(InputError, match=f"c.safetensors: .*{message}"):
        Calibration(path)


def test_reader_refuses_missing_fields(tmp_path: Path) -> None:
    for field in good_description():
        description = good_description()
        del description[field]
        path = write_file(tmp_path / "c.safetensors", good_arrays(), description)
        with pytest.raises(InputError, match=f"c.safetensors: field '{field}': "):
            Calibration(path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "not in the metadata; this is not such a calibration file"),
        ({"sop_calibration": "{"}, "field 'sop_calibration': not JSON: Expecting"),
        ({"sop_calibration": "[" * 100_000}, "field 'sop_calibration': JSON is nested too deep"),
        ({"sop_calibration": "[]"}, "field 'sop_calibration': must be an object"),
        ({"sop_calibration": '{"a": 1, "a": 2}'}, "field 'sop_calibration': duplicate key 'a'"),
    ],
)
def test_reader_refuses_metadata(
    tmp_path: Path, metadata: dict[str, str] | None, message: str
) -> None:
    save_file(good_arrays(), tmp_path / "c.safetensors", metadata)
    with pytest.raises(InputError, match=message):
        Calibration(tmp_path / "c.safetensors")


def test_reader_refuses_other_files(tmp_path: Path) -> None:
    (tmp_path / "c.safetensors").write_bytes(b"not a header")
    with pytest.raises(InputError, match=r"c\.safetensors: not a valid safetensors file"):
        Calibration(tmp_path / "c.safetensors")
    with pytest.raises(OSError, match="missing"):
        Calibration(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("key", "array", "message"),
    [
        ("q.channel_norms", np.ones(3, np.float32), "field 'dtype': F32, expected F64"),
        ("q.channel_norms", np.ones((3, 3)), r"field 'shape': \(3, 3\), expected \(columns,\)"),
        ("q.channel_norms", np.ones(0), r"field 'shape': \(0,\)"),
        ("q.channel_norms", np.array([1, -1.0, 1]), "channel 1 is -1.0, expected"),
        ("q.channel_norms", np.array([1, 1, np.inf]), "channel 2 is inf, expected"),
        ("q.channel_norms", np.array([np.nan, 1, 1]), "channel 0 is nan, expected"),
        ("q.second_moment", np.ones((3, 3)), "field 'dtype': F64, expected F32"),
        ("q.second_moment", np.ones((3, 2), np.float32), r"'shape': \(3, 2\), expected \(columns"),
        ("q.second_moment", np.ones((2, 2), np.float32), "but there are 3 channel norms"),
        ("q.second_moment", np.full((3, 3), np.nan, np.float32), "a value is not finite"),
        ("q.second_moment", np.triu(MOMENT_Q), "not symmetric"),
        ("q.second_moment", MOMENT_Q * np.float32(1.00001), "the diagonal differs"),
    ],
)
def test_reader_refuses_tensors(
    tmp_path: Path, key: str, array: NDArray[Any], message: str
) -> None:
    arrays = good_arrays() | {key: array}
    path = write_file(tmp_path / "c.safetensors", arrays, good_description())
    with pytest.raises(InputError, match=f"c.safetensors: tensor '{key}': .*{message}"):
        Calibration(path).second_moment("k")


def test_reader_names_close_layers(tmp_path: Path) -> None:
    path = write_file(tmp_path / "c.safetensors", good_arrays(), good_description())
    with pytest.raises(InputError, match="tensor 'dwn': not calibrated here, but 'down' are"):
        Calibration(path).channel_norms("dwn")


def warnings_of(tmp_path: Path, **changes: object) -> list[str]:
    path = write_file(tmp_path / "c.safetensors", good_arrays(), good_description() | changes)
    return list(Calibration(path).warnings())


def test_weak_statistics_are_warned_of(tmp_path: Path) -> None:
    few = "only 7 tokens: the statistics are those of a few words"
    lost = "1 layer without statistics: no token was sent there; the first: up"
    assert warnings_of(tmp_path) == [few, lost]
    much = {"tokens": FEW_TOKENS, "layer_tokens": {"q": FEW_TOKENS, "down": FEW_TOKENS}}
    assert warnings_of(tmp_path, **much, uncovered={}) == []
    uneven = {"tokens": 9999, "layer_tokens": {"q": 2, "down": 1}, "uncovered": {}}
    assert warnings_of(tmp_path, **uneven) == [
        f"3 layers saw fewer than {FEW_TOKENS} tokens; the fewest, 1: down",
        "2 of 2 second moments have fewer tokens than channels, so they are singular and know "
        "some directions not at all; the first: q",
    ]
    reasons = {"a": "lost", "b": "no token was sent there", "c": "lost"}
    assert warnings_of(tmp_path, **much, uncovered=reasons) == [
        "2 layers without statistics: lost; the first: a",
        "1 layer without statistics: no token was sent there; the first: b",
    ]


def test_layers_without_statistics_count_alike(tmp_path: Path) -> None:
    calibration = Calibration(
        write_file(tmp_path / "c.safetensors", good_arrays(), good_description())
    )
    assert calibration.known_norms("up") is None
    np.testing.assert_array_equal(calibration.known_norms("k"), NORMS_Q)
