"""Reading weights from safetensors files, good and broken."""

import json
import pickle
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from golden.errors import InputError
from sop.files.models import open_model
from sop.files.tensor_info import TensorInfo
from tests.support.gguf_bytes import GOOD, HUGE, text


def saved(tmp_path: Path, **arrays: np.ndarray) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(arrays, path)
    return path


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (np.float16, "F16"),
        (np.float32, "F32"),
        (np.float64, "F64"),
        (ml_dtypes.bfloat16, "BF16"),
    ],
)
@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (1, 2, 3), (0, 3)])
def test_safetensors_float_types(
    tmp_path: Path, dtype: type[np.generic], name: str, shape: tuple[int, ...]
) -> None:
    expected = np.linspace(-2, 3, int(np.prod(shape))).reshape(shape).astype(dtype)
    with open_model(saved(tmp_path, w=expected)) as model:
        assert model.tensors == {"w": TensorInfo("w", shape, name)}
        assert model.source_note == ""
        values = model.read("w")
    assert values.dtype == np.float32
    assert values.flags.c_contiguous
    assert values.shape == shape
    np.testing.assert_array_equal(values, expected.astype(np.float32))
    values += 1  # the array belongs to the caller


def test_bfloat16_is_read_in_a_fresh_interpreter(tmp_path: Path) -> None:
    path = saved(tmp_path, w=np.array([1.5, -2], ml_dtypes.bfloat16))
    code = "import sys; from sop.files.models import open_model; m = open_model(sys.argv[1])"
    command = [sys.executable, "-c", f"{code}; print(m.read('w').tolist())", str(path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    assert done.stdout == "[1.5, -2.0]\n"


def test_safetensors_names_are_in_file_order(tmp_path: Path) -> None:
    zeros = np.zeros(2, np.float32)
    header = {
        name: {"dtype": "F32", "shape": [2], "data_offsets": [8 * n, 8 * n + 8]}
        for n, name in enumerate(["z", "a", "m"])
    }
    path = tmp_path / "model.safetensors"
    path.write_bytes(text(json.dumps(header)) + zeros.tobytes() * 3)
    with open_model(path) as model:
        assert list(model.tensors) == ["z", "a", "m"]


@pytest.mark.parametrize("value", [3.5e38, -1e300])
@pytest.mark.filterwarnings("error")
def test_float64_beyond_float32_is_refused(tmp_path: Path, value: float) -> None:
    path = saved(tmp_path, w=np.array([1.0, value, value]))
    message = "model.safetensors: tensor 'w': field 'data': 2 float64 values are too large"
    with open_model(path) as model, pytest.raises(InputError, match=message):
        model.read("w")


@pytest.mark.filterwarnings("error")
def test_safetensors_nan_and_infinity_pass_through(tmp_path: Path) -> None:
    odd = np.array([np.nan, np.inf, -np.inf, np.finfo(np.float32).max], np.float64)
    with open_model(saved(tmp_path, w=odd)) as model:
        np.testing.assert_array_equal(model.read("w"), odd.astype(np.float32))


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (np.int8, "I8"),
        (np.uint8, "U8"),
        (np.int64, "I64"),
        (np.bool_, "BOOL"),
        (np.complex64, "C64"),
    ],
)
def test_safetensors_other_types_are_listed_but_not_read(
    tmp_path: Path, dtype: type[np.generic], name: str
) -> None:
    with open_model(saved(tmp_path, w=np.zeros(3, dtype))) as model:
        assert model.tensors["w"].source_type == name
        message = f"tensor 'w': field 'dtype': {name}, expected one of F64, F32, F16, BF16"
        with pytest.raises(InputError, match=message):
            model.read("w")


def safetensors_bytes(shape: Sequence[int], end: int, data: int, dtype: str = "F32") -> bytes:
    header = {"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}
    return text(json.dumps(header)) + bytes(data)


BROKEN_SAFETENSORS = {
    "empty file": b"",
    "three bytes": b"abc",
    "header of 2^63 bytes": text("{}", HUGE),
    "header past the end": text("{}", 100),
    "all ones": b"\xff" * 100,
    "not JSON": text("hello, world"),
    "not UTF-8": text(b"\xff\xfe{}"),
    "nested JSON": text("[" * 100_000),
    "data cut": safetensors_bytes([2], 8, 7),
    "data too long": safetensors_bytes([2], 8, 9),
    "shape and data differ": safetensors_bytes([3], 8, 8),
    "shape overflows": safetensors_bytes([HUGE, 4], 8, 8),
    "negative shape": safetensors_bytes([-1], 4, 4),
    "endless dtype": safetensors_bytes([2], 8, 8, "Q" * 100_000),
    "unknown dtype": safetensors_bytes([2], 8, 8, "Q4"),
    "pickle": pickle.dumps({"w": [1, 2]}),
    "GGUF inside": GOOD,
}


@pytest.mark.parametrize("content", BROKEN_SAFETENSORS.values(), ids=BROKEN_SAFETENSORS.keys())
def test_broken_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    started = time.perf_counter()
    with pytest.raises(InputError, match="not a valid safetensors file") as caught:
        open_model(path)
    assert time.perf_counter() - started < 1
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 400


def test_safetensors_shape_beyond_numpy_is_refused_on_reading(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes([1 << 62, 0], 0, 0))
    with open_model(path) as model, pytest.raises(InputError, match="tensor 'w': field 'shape'"):
        model.read("w")


def test_safetensors_of_absurd_rank_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes([1] * 80, 4, 4))
    with pytest.raises(InputError, match=r"tensor 'w': field 'shape': .* is no shape of an array"):
        open_model(path)


def test_closed_safetensors_refuses_and_arrays_stay(tmp_path: Path) -> None:
    with open_model(saved(tmp_path, w=np.ones(3, np.float32))) as model:
        values = model.read("w")
        with pytest.raises(InputError, match=r"tensor 'v': not in this file; .* such as 'w'"):
            model.read("v")
    assert values.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="this model is closed"):
        model.read("w")
