"""The formats of others: against independent programs where there are any, else against bounds."""

import importlib.util
import math
import shutil
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import gfloat
import gguf
import numpy as np
import pytest
from gfloat.formats import format_info_mxfp4_e2m1, format_info_mxfp6_e2m3
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from golden.errors import InputError
from golden.metrics import relative_mse
from golden.notation import parse_format
from sop.baselines import others as baselines
from sop.baselines.others import BASELINES, Baseline, ggml_encoder

Float32 = NDArray[np.float32]

LLAMA_CPP = [b.name for b in BASELINES.values() if b.source == "llama.cpp"]
IK_LLAMA_CPP = [b.name for b in BASELINES.values() if b.source == "ik_llama.cpp"]
GGML = [*LLAMA_CPP, *IK_LLAMA_CPP]
PACKAGES = {"libggml": LLAMA_CPP, "ik_llama_cpp": IK_LLAMA_CPP}


def normal(rows: int, columns: int, seed: int = 1) -> Float32:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 0.02, (rows, columns)).astype(np.float32)


def usable(name: str) -> Baseline:
    """The baseline, or a skipped test where its package is not installed."""
    baseline = BASELINES[name]
    if "not installed" in baseline.why_not:
        pytest.skip(baseline.why_not)
    assert baseline.available, baseline.why_not
    return baseline


# ------------------------------------------------------------------------------- all baselines


@pytest.mark.parametrize("name", BASELINES)
def test_error_lies_between_shannons_bound_and_eight_bits_of_waste(name: str) -> None:
    # No code of R bits per weight gets a Gaussian source below 4**-R. That also catches bits that
    # are stored but not counted.
    baseline = usable(name)
    weights = normal(64, 768)
    error = relative_mse(weights, baseline.reconstruct(weights))
    bound = 4 ** -float(baseline.bits_per_weight)
    assert bound < error < 64 * bound


@pytest.mark.parametrize("name", BASELINES)
def test_input_stays_output_is_float32_and_repeats(name: str) -> None:
    baseline = usable(name)
    weights = normal(4, 256)
    before = weights.copy()
    first, second = baseline.reconstruct(weights), baseline.reconstruct(weights)
    assert first.dtype == np.float32
    assert first.shape == weights.shape
    np.testing.assert_array_equal(weights, before)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", BASELINES)
def test_memory_order_of_the_weights_does_not_matter(name: str) -> None:
    baseline = usable(name)
    weights = normal(256, 512)
    np.testing.assert_array_equal(
        baseline.reconstruct(np.asfortranarray(weights)), baseline.reconstruct(weights)
    )


@pytest.mark.parametrize("name", BASELINES)
def test_zeros_stay_zeros(name: str) -> None:
    weights = normal(4, 256)
    weights[1] = 0
    reconstruction = usable(name).reconstruct(weights)
    assert not reconstruction[1].any()
    assert np.isfinite(reconstruction).all()


@pytest.mark.parametrize("name", BASELINES)
def test_channel_norms_lower_the_weighted_error_or_do_nothing(name: str) -> None:
    baseline = usable(name)
    weights = normal(32, 256)
    norms = np.where(np.arange(256) % 4 == 0, 10.0, 1.0)

    plain, weighted = baseline.reconstruct(weights), baseline.reconstruct(weights, norms)

    if baseline.uses_channel_norms:
        errors = [float(np.sum(norms**2 * (weights - y) ** 2)) for y in (plain, weighted)]
        assert errors[1] < errors[0]
    else:
        np.testing.assert_array_equal(plain, weighted)


@pytest.mark.parametrize("name", ["Q4_K", "IQ4_NL", "IQ4_K", "NF4"])
@pytest.mark.parametrize(
    ("weights", "norms", "message"),
    [
        (np.zeros((4, 256)), None, "float32"),
        (np.zeros(256, np.float32), None, "matrix"),
        (np.full((1, 256), np.nan, np.float32), None, "row 0, column 0"),
        (normal(4, 256), np.ones(255), "channel_norms has shape"),
        (normal(4, 256), np.full(256, -1.0), "channel 0 is -1"),
    ],
)
def test_bad_input_is_refused(
    name: str, weights: Float32, norms: NDArray[np.float64] | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        usable(name).reconstruct(weights, norms)


# ------------------------------------------------------------------------------ llama.cpp and ik


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_types_are_those_of_the_gguf_package(name: str) -> None:
    number = gguf.GGMLQuantizationType[name]
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[number]
    assert BASELINES[name].bits_per_weight == Fraction(8 * block_bytes, block_size)
    ours = {ggml_type.name: ggml_type for ggml_type in baselines._GGML_TYPES}
    assert (ours[name].number, ours[name].block_size) == (number, block_size)


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_reconstruction_is_what_the_gguf_package_decodes(name: str) -> None:
    baseline = usable(name)
    weights = normal(16, 512)
    blocks = ggml_encoder(name)(weights).reshape(16, -1)
    decoded = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(baseline.reconstruct(weights), decoded)


def test_q8_0_is_what_the_gguf_package_encodes() -> None:
    usable("Q8_0")
    weights = normal(64, 512)
    expected = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(ggml_encoder("Q8_0")(weights), expected.reshape(-1))


@pytest.mark.parametrize(
    ("better", "worse"), [("IQ6_K", "Q6_K"), ("IQ5_K", "Q5_K"), ("IQ4_K", "Q4_K")]
)
def test_ik_types_beat_the_k_quants_of_their_size(better: str, worse: str) -> None:
    # Published by the author of both; a wrong pairing of encoder and decoder would show here.
    weights = normal(64, 1024)
    errors = [relative_mse(weights, usable(name).reconstruct(weights)) for name in (better, worse)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("name", GGML)
@pytest.mark.parametrize("with_norms", [False, True])
def test_short_rows_are_joined_to_whole_blocks(name: str, with_norms: bool) -> None:
    baseline = usable(name)
    short = normal(8, 384)
    norms = np.linspace(1, 5, 384) if with_norms else None
    joined = short.reshape(4, 768)
    joined_norms = None if norms is None else np.concatenate([norms, norms])
    np.testing.assert_array_equal(
        baseline.reconstruct(short, norms).reshape(4, 768),
        baseline.reconstruct(joined, joined_norms),
    )


@pytest.mark.parametrize("name", GGML)
def test_what_does_not_fill_blocks_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: 3 x 7 weights are not whole blocks"):
        usable(name).reconstruct(normal(3, 7))


@pytest.mark.parametrize("name", GGML)
def test_weights_that_would_overflow_a_float16_scale_are_refused(name: str) -> None:
    # ik_llama.cpp aborts the whole process on some of these.
    weights = np.full((1, 256), 1e20, np.float32)
    with pytest.raises(InputError, match="float16"):
        usable(name).reconstruct(weights)


@pytest.mark.parametrize("name", GGML)
@pytest.mark.parametrize("size", [1e-40, 1e-8, 1.0, 65504.0])
def test_extreme_weights_and_norms_give_finite_values(name: str, size: float) -> None:
    weights = np.clip(normal(4, 512) / 0.02, -1, 1) * np.float32(size)
    weights[2, 3:300] = 0
    norms = np.where(np.arange(512) < 256, 1e-60, 1e60)
    for channel_norms in (None, norms, np.zeros(512)):
        assert np.isfinite(usable(name).reconstruct(weights, channel_norms)).all()


@pytest.mark.parametrize("name", GGML)
def test_channels_of_next_to_no_activation_are_not_given_up(name: str) -> None:
    baseline = usable(name)
    weights = normal(16, 512)
    norms = np.where(np.arange(512) < 256, 1e-30, 1.0)
    quiet = baseline.reconstruct(weights, norms)[:, :256]
    assert relative_mse(weights[:, :256], quiet) < 2 * relative_mse(
        weights[:, :256], baseline.reconstruct(weights)[:, :256]
    )


def test_ggml_encoder_refuses_other_names() -> None:
    with pytest.raises(InputError, match=r"'NF4' is none of Q8_0, .*IQ4_NL"):
        ggml_encoder("NF4")


# ---------------------------------------------------------------------------- missing packages


@pytest.fixture
def _fresh_libraries() -> Iterator[None]:
    """Libraries are loaded anew in the test, and once more after it."""
    baselines._load.cache_clear()
    yield
    baselines._load.cache_clear()


def _check_unusable(name: str, reason: str) -> None:
    baseline = BASELINES[name]
    assert not baseline.available
    assert baseline.why_not.startswith(f"{name}: ")
    assert reason in baseline.why_not
    assert "\n" not in baseline.why_not
    with pytest.raises(InputError, match=baseline.needs):
        baseline.reconstruct(normal(4, 256))
    with pytest.raises(InputError, match=baseline.needs):
        ggml_encoder(name)


@pytest.mark.usefixtures("_fresh_libraries")
@pytest.mark.parametrize("module", PACKAGES)
def test_a_package_that_is_not_installed_is_named(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in PACKAGES[module]:
        _check_unusable(name, f"pip install {BASELINES[name].needs}")


@pytest.mark.usefixtures("_fresh_libraries")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "has no libggml-base"),
        ("text", "cannot be used"),
        ("other", "cannot be used"),
    ],
)
def test_a_broken_package_is_named(
    kind: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / ("libggml-base" + (".dylib" if sys.platform == "darwin" else ".so"))
    if kind == "text":
        library.write_text("not a library")
    elif kind == "other":
        # Some shared library that has none of the functions.
        shutil.copy(sys.modules["safetensors._safetensors_rust"].__file__ or "", library)
    monkeypatch.setattr(baselines, "_package_folder", lambda module: tmp_path)
    _check_unusable("Q4_K", reason)


@pytest.mark.usefixtures("_fresh_libraries")
def test_a_library_that_the_cpu_cannot_run_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    usable("IQ4_K")
    baselines._load.cache_clear()
    monkeypatch.setattr(baselines, "_cpu_lacks", lambda flag: flag == "avx2")
    _check_unusable("IQ4_K", "needs a CPU with avx2")
    assert BASELINES["Q4_K"].available


@pytest.mark.usefixtures("_fresh_libraries")
def test_a_type_with_another_number_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    usable("Q4_K")
    wrong = baselines._GgmlType("Q4_K", 14, 256, 144, baselines._GGML)
    with pytest.raises(InputError, match="does not have type Q4_K"):
        baselines._library_with(wrong)


# ------------------------------------------------------------------------- NF4, MX, golden ones


@pytest.mark.parametrize("scale", [1e-42, 1e-39, 0.02, 1e30])
def test_nf4_equals_bitsandbytes_bit_for_bit(scale: float) -> None:
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    weights = normal(64, 1024).reshape(-1, 64)
    # Neighbours of the midpoints, where an ulp in the scaling decides.
    midpoints = baselines._NF4_BOUNDS * np.abs(weights).max(axis=1, keepdims=True)
    weights[:, :15] = midpoints
    weights[:, 15:30] = np.nextafter(midpoints, np.float32(np.inf))
    weights[:, 30:45] = np.nextafter(midpoints, np.float32(-np.inf))
    weights *= np.float32(scale / 0.02)
    weights[3] = 0
    weights = weights.reshape(64, 1024)
    codes, state = functional.quantize_4bit(
        torch.from_numpy(weights.copy()), blocksize=64, quant_type="nf4"
    )
    expected = functional.dequantize_4bit(codes, state).numpy()
    np.testing.assert_array_equal(usable("NF4").reconstruct(weights), expected)


@given(st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=1, max_size=150))
@settings(max_examples=60, deadline=None)
def test_nf4_takes_the_nearest_level_times_the_largest_magnitude(values: list[float]) -> None:
    levels = [float(level) for level in baselines._NF4_LEVELS]
    result = BASELINES["NF4"].reconstruct(np.array([values], np.float32))[0]
    for start in range(0, len(values), 64):
        block = values[start : start + 64]
        absmax = max(map(abs, block))
        for value, got in zip(block, result[start : start + 64], strict=True):
            least = min(abs(value - level * absmax) for level in levels)
            assert abs(value - got) <= least + 2**-22 * absmax


def test_nf4_levels_are_those_of_the_paper() -> None:
    # QLoRA's rule: quantiles of a normal distribution at probabilities from 1/2 to 0.9677083, 8 on
    # the positive and 7 on the negative side, scaled to end at 1.
    from statistics import NormalDist

    end = 0.9677083
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(end, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(end, 0.5, 8)[:-1]]
    expected = np.array(sorted([*positive, 0.0, *negative])) / positive[0]
    np.testing.assert_allclose(baselines._NF4_LEVELS, expected, atol=1e-6)


MX_FORMATS = {"MXFP4": format_info_mxfp4_e2m1, "MXFP6": format_info_mxfp6_e2m3}


@pytest.mark.parametrize("name", MX_FORMATS)
@pytest.mark.parametrize("columns", [32, 96, 40])
def test_mx_equals_gfloat(name: str, columns: int) -> None:
    exponents = np.array([[-146], [-123], [0], [3], [120]], np.float32)
    weights = normal(5, columns) * np.float32(2) ** exponents
    weights[2, :5] = [1.0, 0.25, -0.75, 1.75, -1.875]  # ties and a saturating element
    result = BASELINES[name].reconstruct(weights)
    for row, got in zip(weights, result, strict=True):
        for start in range(0, columns, 32):
            block = np.pad(row[start : start + 32], (0, max(0, start + 32 - columns)))
            expected = gfloat.quantize_block(
                MX_FORMATS[name], block.astype(np.float64), gfloat.compute_scale_amax
            )
            np.testing.assert_array_equal(got[start : start + 32], expected[: columns - start])


@pytest.mark.parametrize("name", ["FP8", "E2M3sUE4M4", "NVFP4", "MXFP6", "MXFP4"])
def test_formats_of_the_notation_count_the_bits_that_their_name_says(name: str) -> None:
    baseline = BASELINES[name]
    assert baseline.bits_per_weight == parse_format(baseline.source).bits_per_weight
    assert (
        baseline.bits_per_weight
        == {
            "FP8": 8,
            "E2M3sUE4M4": Fraction(13, 2),
            "NVFP4": Fraction(9, 2),
            "MXFP6": Fraction(25, 4),
            "MXFP4": Fraction(17, 4),
        }[name]
    )


def test_fp8_has_one_power_of_two_for_the_tensor() -> None:
    # Scaled so that the largest weight fits E4M3, whose values ml_dtypes knows.
    import ml_dtypes

    weights = normal(8, 128)
    scale = 2.0 ** math.ceil(math.log2(np.abs(weights).max() / 448))
    expected = (weights / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    np.testing.assert_array_equal(BASELINES["FP8"].reconstruct(weights), expected)
