"""``sop sim`` as users see it: what it refuses, what it reports, and the faults that it finds."""

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from golden.formats import HIF8T
from golden.notation import parse_format
from golden.quantize import quantize
from golden.tensor import QuantizedTensor, decode
from sim.installed import quickest_simulator
from tests.support.commands import Sop, assert_refused

LANES = 16


NAMES = ("model.layers.0.a.weight", "model.layers.0.b.weight")
NORM = "model.layers.0.norm.weight"


def weights() -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Two matrices, one whose rows are no whole blocks, and a vector."""
    rng = np.random.default_rng(5)
    return {
        NAMES[0]: rng.standard_normal((32, 64)).astype(np.float32),
        NAMES[1]: rng.standard_normal((16, 40)).astype(np.float32),
        NORM: np.ones(64, np.float32),
    }


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model file."""
    path = tmp_path / "model" / "tiny.safetensors"
    path.parent.mkdir()
    save_file(weights(), path)
    return path


def sim_arguments(
    model: Path, build: Path, *more: object, format_name: str = "NF4sUE4M4"
) -> list[object]:
    given = ["--sim", quickest_simulator(), "-f", format_name, "--lanes", LANES, "--build", build]
    return ["sim", model, *given, *more]


BAD_SIM = {
    "simulator": (["--sim", "vcs"], "unknown simulator 'vcs': expected verilator or icarus"),
    "hif": (["--hif", "hif7"], "--hif must be one of HIF7, HIF8, HIF8T, not 'hif7'"),
    "output": (["--output", "float16"], "--output must be one of float32, bfloat16, not 'float16'"),
    "stalls": (["--stalls", "all"], "--stalls must be one of none, in, out, both, not 'all'"),
    "scale-mode": (["--scale-mode", "best"], "--scale-mode must be one of absmax, argmax, search"),
    "lanes": (
        ["--lanes", "40"],
        "lanes must be a multiple or a divisor of the block size 16, 8 to 512, not 40",
    ),
    "fault-short": (
        ["--inject-fault", "index:1"],
        "'index:1' is not of the form KIND:POSITION:BIT",
    ),
    "fault-long": (["--inject-fault", "index:1:2:3"], "is not of the form KIND:POSITION:BIT"),
    "fault-empty": (["--inject-fault", ""], "is not of the form KIND:POSITION:BIT"),
    "fault-sign": (["--inject-fault", "index:1:-1"], "is not of the form KIND:POSITION:BIT"),
    "fault-word": (["--inject-fault", "index:one:1"], "is not of the form KIND:POSITION:BIT"),
    "missing-pattern": (["-t", "*zz*"], "tiny.safetensors: pattern '*zz*': matches no tensor"),
    "one-bad-pattern": (["-t", "*", "-t", "zz"], "pattern 'zz': matches no tensor"),
    "atom": (["-f", "E2M3^0sUE4M4"], "E2M3^0sUE4M4 has no blocks"),
    "impossible": (["-f", "NF4-NF4sUE4M4"], "holds nothing new"),
}


@pytest.mark.parametrize(("arguments", "part"), BAD_SIM.values(), ids=BAD_SIM)
def test_bad_input_of_sim(
    arguments: list[str], part: str, model: Path, tmp_path: Path, sop_run: Sop
) -> None:
    first = sim_arguments(model, tmp_path / "build")  # the last of two equal options counts
    assert_refused(sop_run(*first, *arguments), part)
    assert not (tmp_path / "build").exists()


BAD_FAULTS = {
    "kind": ("weight:0:0", "unknown kind of fault 'weight': expected index, scale, lut"),
    # 32 x 64 weights of 4 bits in 128 blocks with 8-bit words; 16 entries of 8 bits.
    "index": ("index:2048:0", "fault index:2048:0 does not exist: 2048 elements of 4 bits"),
    "index-bit": ("index:0:4", "fault index:0:4 does not exist"),
    "scale": ("scale:128:0", "fault scale:128:0 does not exist: 128 elements of 8 bits"),
    "scale-bit": ("scale:0:8", "fault scale:0:8 does not exist"),
    "lut": ("lut:16:0", "fault lut:16:0 does not exist: 16 elements of 8 bits"),
    "lut-bit": ("lut:0:8", "fault lut:0:8 does not exist"),
}


@pytest.mark.parametrize(("fault", "part"), BAD_FAULTS.values(), ids=BAD_FAULTS)
def test_fault_that_does_not_exist(
    fault: str, part: str, model: Path, tmp_path: Path, sop_run: Sop
) -> None:
    arguments = sim_arguments(model, tmp_path / "build", "--inject-fault", fault)
    assert_refused(sop_run(*arguments), part, progress=True)
    assert not (tmp_path / "build").exists()


def write_nothing(path: Path) -> None:
    assert not path.exists()


def write_truncated(path: Path) -> None:
    complete = path.with_name("complete.safetensors")
    save_file(weights(), complete)
    path.write_bytes(complete.read_bytes()[:2000])


def write_truncated_gguf(path: Path) -> None:
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(3))


def write_text(path: Path) -> None:
    path.write_text("not a model")


BAD_FILES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "missing": ("none.safetensors", write_nothing, "no such file"),
    "truncated": ("cut.safetensors", write_truncated, "not a valid safetensors file"),
    "truncated-gguf": ("cut.gguf", write_truncated_gguf, "field 'tensor_count'"),
    "text": ("text.safetensors", write_text, "not a valid safetensors file"),
    "suffix": ("model.txt", write_text, "suffix '.txt', expected .gguf or .safetensors"),
    "pickle": ("model.bin", write_text, "pickled files are never opened"),
}


@pytest.mark.parametrize(("name", "write", "part"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_model_file(
    name: str, write: Callable[[Path], None], part: str, tmp_path: Path, sop_run: Sop
) -> None:
    write(tmp_path / name)
    result = sop_run(*sim_arguments(tmp_path / name, tmp_path / "build"))
    assert_refused(result, str(tmp_path / name), part)
    assert not (tmp_path / "build").exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=["nan", "inf", "minus-inf"])
def test_weight_that_is_not_finite(value: float, tmp_path: Path, sop_run: Sop) -> None:
    tensors = weights()
    tensors[NAMES[1]][3, 17] = value
    tensors[NAMES[1]][9, 1] = value
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path)
    result = sop_run(*sim_arguments(path, tmp_path / "build"))
    parts = (str(path), repr(NAMES[1]), "row 3, column 17", str(value), "2 weights are not finite")
    assert_refused(result, *parts, progress=True)
    assert not (tmp_path / "build").exists()


def test_vector_is_refused_by_name(model: Path, tmp_path: Path, sop_run: Sop) -> None:
    result = sop_run(*sim_arguments(model, tmp_path / "build", "-t", NORM))
    assert_refused(result, str(model), repr(NORM), "matrix", "[64]", progress=True)
    assert not (tmp_path / "build").exists()


def test_trained_codebook_is_refused(model: Path, tmp_path: Path, sop_run: Sop) -> None:
    arguments = sim_arguments(model, tmp_path / "build", format_name="NF4-DD4sS1E5M5")
    parts = ("NF4-DD4sS1E5M5", "codebook DD4 is trained per layer")
    assert_refused(sop_run(*arguments), *parts, progress=True)
    assert not (tmp_path / "build").exists()


def test_simulation_passes(simulator: str, model: Path, build_root: Path, sop_run: Sop) -> None:
    result = sop_run(*sim_arguments(model, build_root, "--sim", simulator, "--json"))
    assert result.code == 0
    report = result.json
    assert report["passed"] is True
    assert (report["format"], report["bits_per_weight"]) == ("NF4sUE4M4", 4.5)
    assert (report["lanes"], report["output"], report["simulator"]) == (LANES, "float32", simulator)
    assert (report["weights"], report["mismatches"]) == (32 * 64 + 16 * 40, 0)
    assert (report["model"], report["waveform"]) == (str(model), None)
    first, second = report["tensors"]
    assert [first["name"], second["name"]] == list(NAMES)
    assert [first["shape"], second["shape"]] == [[32, 64], [16, 40]]
    assert [first["weights"], second["weights"]] == [2048, 640]
    for tensor in (first, second):
        assert (tensor["mismatches"], tensor["misplaced_last"], tensor["flags"]) == (0, 0, [])
        assert tensor["first_mismatch"] is None
        assert tensor["lut_shares"] == [1, 0]
    # One beat a clock. The first tensor waits for its 16 LUT entries and one clock for the swap of
    # banks; the LUTs of the second, whose rows are padded to 48, load while the first one streams.
    assert first["clocks"] == 32 * 64 // LANES + 16 + 1
    assert second["clocks"] == 16 * 48 // LANES
    assert report["clocks"] == first["clocks"] + second["clocks"]


def test_report_in_text(model: Path, build_root: Path, sop_run: Sop) -> None:
    result = sop_run(*sim_arguments(model, build_root))
    assert result.code == 0
    assert result.out.splitlines()[-1] == "PASS: every bit equals the golden model"
    assert "2,688 weights in 193 clocks, 0 mismatched" in result.out
    for name, shape in zip(NAMES, ("32x64", "16x40"), strict=True):
        assert re.search(rf"{re.escape(name)} +{shape} ", result.out)
        assert f"quantizing {name}" in result.err
    used = f"LUT entries HIF8T), {LANES} lanes, float32, {quickest_simulator()}"
    assert f"NF4sUE4M4 (4.5 bits per weight, {used}" in result.out


@pytest.mark.parametrize(
    ("more", "format_name"),
    [
        (["--stalls", "both", "--seed", "9"], "NF4sUE4M4"),
        (["--output", "bfloat16", "--scale-mode", "absmax"], "NF4sUE4M4"),
        (["--hif", "HIF8"], "BOF4-NF4sS1E5M5"),
    ],
    ids=["stalls", "bfloat16", "pair-hif8"],
)
def test_simulation_options(
    more: list[str], format_name: str, model: Path, build_root: Path, sop_run: Sop
) -> None:
    arguments = sim_arguments(model, build_root, "--json", format_name=format_name)
    result = sop_run(*arguments, *more)
    assert result.code == 0
    report = result.json
    assert (report["passed"], report["mismatches"], report["weights"]) == (True, 0, 2688)
    if "--stalls" in more:
        assert report["clocks"] > 193
    if format_name != "NF4sUE4M4":
        assert all(0 < tensor["lut_shares"][1] < 1 for tensor in report["tensors"])


def test_padding_bits_of_a_plane_are_no_beat(
    tmp_path: Path, build_root: Path, sop_run: Sop
) -> None:
    # Four 9-bit scale words fill 36 of 40 bits; the 4 bits that remain hold no scale word.
    path = tmp_path / "pad.safetensors"
    save_file({"w": np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)}, path)
    arguments = sim_arguments(path, build_root, "--json", format_name="BOF4-NF4^32sUE8M0")
    result = sop_run(*arguments, "-t", "w", "--lanes", 64)
    assert result.code == 0
    (tensor,) = result.json["tensors"]
    assert (tensor["misplaced_last"], tensor["mismatches"]) == (0, 0)
    assert tensor["clocks"] == 2 + 32 + 1


def golden_tensor() -> QuantizedTensor:
    return quantize(weights()[NAMES[0]], parse_format("NF4sUE4M4", HIF8T))  # the default of sim


def index_fault() -> tuple[str, QuantizedTensor]:
    tensor = golden_tensor()
    # Levels ascend strictly, so any other index under a scale that is not 0 is another value.
    position, bit = 5 * 64 + 19, 2
    indices = tensor.indices.copy()
    indices.reshape(-1)[position] ^= 1 << bit
    return f"index:{position}:{bit}", replace(tensor, indices=indices)


def scale_fault() -> tuple[str, QuantizedTensor]:
    tensor = golden_tensor()
    # Any bit of a scale code changes the scale, and with it the largest weight of the block.
    position, bit = 77, 1
    words = tensor.scale_words.copy()
    words.reshape(-1)[position] ^= 1 << bit
    return f"scale:{position}:{bit}", replace(tensor, scale_words=words)


def lut_fault() -> tuple[str, QuantizedTensor]:
    tensor = golden_tensor()
    (lut,) = tensor.luts
    # The change must keep the table ascending, or the golden model would not take it either.
    for position, bit in itertools.product(range(16), range(8)):
        codes = list(lut.codes)
        codes[position] ^= 1 << bit
        try:
            changed = replace(tensor, luts=(replace(lut, codes=tuple(codes)),))
        except ValueError:
            continue
        if (tensor.indices == position).any():
            return f"lut:{position}:{bit}", changed
    raise AssertionError("no entry can be changed by one bit")


FAULTS = {"index": index_fault, "scale": scale_fault, "lut": lut_fault}


@pytest.mark.parametrize("kind", FAULTS)
def test_injected_fault_is_found(kind: str, model: Path, build_root: Path, sop_run: Sop) -> None:
    fault, changed = FAULTS[kind]()
    before = decode(golden_tensor(), padded=True).view(np.uint32).reshape(-1)
    after = decode(changed, padded=True).view(np.uint32).reshape(-1)
    wrong = np.flatnonzero(before != after)
    assert len(wrong), "this fault must change a value"
    position = int(wrong[0])
    row, column = divmod(position, 64)
    block, element = divmod(column, 16)

    result = sop_run(*sim_arguments(model, build_root, "--inject-fault", fault))
    assert result.code == 1
    (line,) = (line for line in result.out.splitlines() if line.startswith("MISMATCH"))
    values = [
        f"0x{bits[position]:08x} ({bits.view(np.float32)[position]:.9g})"
        for bits in (after, before)
    ]
    assert line == (
        f"MISMATCH {NAMES[0]}: row {row}, block {block}, element {element} "
        f"(beat {position // LANES}, lane {position % LANES}): RTL {values[0]}, golden {values[1]}"
    )
    assert f" {len(wrong)} mismatched;" in result.out
    assert result.out.splitlines()[-1] == "FAIL"
    (waveform,) = re.findall(r"^Waveform: (.+)$", result.out, flags=re.MULTILINE)
    assert Path(waveform).is_relative_to(build_root)
    assert Path(waveform).stat().st_size > 100


def test_injected_fault_in_json(
    simulator: str, model: Path, build_root: Path, sop_run: Sop
) -> None:
    fault, changed = index_fault()
    position = 5 * 64 + 19
    options = ["--sim", simulator, "--inject-fault", fault, "--json"]
    result = sop_run(*sim_arguments(model, build_root, *options))
    assert result.code == 1
    report = result.json
    assert (report["passed"], report["mismatches"]) == (False, 1)
    assert [tensor["mismatches"] for tensor in report["tensors"]] == [1, 0]
    assert report["tensors"][0]["first_mismatch"] == {
        "tensor": 0, "row": 5, "column": 19, "block": 1, "element": 3,
        "beat": position // LANES, "lane": 3,
        "expected": int(decode(golden_tensor()).view(np.uint32)[5, 19]),
        "actual": int(decode(changed).view(np.uint32)[5, 19]),
    }  # fmt: skip
    waveform = Path(report["waveform"])
    assert waveform.suffix in (".fst", ".vcd")
    assert waveform.stat().st_size > 100
