"""Quantization against a scalar reference that follows the specification block by block."""

import zlib
from fractions import Fraction

import numpy as np
import pytest

import golden.blocks
from golden.codebooks import Lut, fixed_lut
from golden.errors import InputError
from golden.formats import BF16, HIF7, HIF8, HIF8T
from golden.notation import QuantFormat, parse_format
from golden.quantize import quantize, resolve_luts
from golden.scaling import ScaleMode
from golden.tensor import QuantizedTensor, decode
from golden.tests.quantize_reference import (
    OVERFLOW,
    SHIFTED,
    SMALLEST_NORMAL,
    STEPS,
    Float32,
    Float64,
    Mask,
    Reference,
    exact_errors,
    gaussian,
    luts_of,
    matrix,
    one_lut,
    one_pass_modes,
    random_lut,
    shifted_luts,
    some_excluded,
    uneven_norms,
)

MATRICES = (
    "normal", "one_column", "narrow", "zeros", "zero_blocks", "one_nonzero", "equal_magnitudes",
    "midpoints", "small_integers", "tiny", "huge", "subnormal", "only_subnormal", "wide_range",
)  # fmt: skip

FORMATS = {
    name: parse_format(name)
    for name in (
        "E2M1sUE4M4", "E2M3sUE4M4", "E2M3^32sUE8M0", "E3M2^8sS1E2M4", "E4M3^0sUE8M0",
        "E2M3^0sS1E5M5", "E3M4^8sUE5M3",
        "E4M5sUE5M7", "E5M6^8sUE4M4", "INT4sS1E4M3", "INT8^64sBF16", "HIF7sUE4M4", "HIF8^8sS1E5M5",
        "HIF8T^64sUE5M5", "NF4sUE4M4", "NF4sS1E5M5", "NF4^32sUE8M0", "BOF4^32sS1E4M3",
        "Split87^8sUE4M3", "SH4^64sS1E5M5", "DD4sS1E5M5", "DD6sS1E4M3", "BOF4-NF4sS1E5M5",
        "SH4-Split87sUE4M3", "NF4-DD4sS1E2M4", "DD4-DD4^8sS1E4M3", "DD5-DD5sUE4M4",
        "BOF4-NF4sRS1E2M4", "NF4^8sRUE4M4", "DD5-DD5sRS1E5M5",
    )
} | {"NF4-DD4sS1E5M5/HIF8": parse_format("NF4-DD4sS1E5M5", HIF8),
     "DD6-DD6sS1E4M3/HIF8T": parse_format("DD6-DD6sS1E4M3", HIF8T)}  # fmt: skip


def seed_of(*parts: str) -> int:
    return zlib.crc32("/".join(parts).encode()) % 10_000


def refusal(exponent: int, dense: list[Fraction]) -> str | None:
    """What the message says of a result that cannot be stored, None if it can be."""
    if not -128 <= exponent < 128:
        return f"need a layer exponent of {exponent}"
    if any(0 < abs(value) < SMALLEST_NORMAL for value in dense):
        return "would be subnormal in float32"
    if any(abs(value) >= OVERFLOW for value in dense):
        return "would overflow float32"
    return None


def compare(
    fmt: QuantFormat,
    weights: Float32,
    seed: int,
    norms: Float64 | None = None,
    excluded: Mask | None = None,
) -> None:
    luts = luts_of(fmt, seed)
    reference = Reference(weights, fmt, luts, norms, excluded)
    for mode in one_pass_modes(fmt):
        words = reference.words(mode)
        elements, dense = reference.elements(words)
        message = refusal(reference.exponent, dense)
        if message:
            with pytest.raises(InputError, match=message):
                quantize(weights, fmt, mode=mode, luts=luts, channel_norms=norms, excluded=excluded)
            continue
        tensor = quantize(
            weights, fmt, mode=mode, luts=luts, channel_norms=norms, excluded=excluded
        )
        where = f"{fmt.name} {mode.value}, seed {seed}"
        assert tensor.layer_exponent == reference.exponent, where
        row_scales = None if tensor.row_scales is None else tensor.row_scales.tolist()
        assert row_scales == reference.row_scales, where
        assert tensor.scale_words.ravel().tolist() == words, where
        assert tensor.indices.reshape(len(words), -1).tolist() == elements, where
        assert decode(tensor, padded=True).ravel().tolist() == [float(x) for x in dense], where


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("name", FORMATS)
def test_quantize_equals_the_scalar_reference(name: str, kind: str) -> None:
    seed = seed_of(name, kind)
    compare(FORMATS[name], matrix(kind, seed), seed)


@pytest.mark.parametrize("kind", ["normal", "narrow", "small_integers", "zero_blocks"])
@pytest.mark.parametrize("name", FORMATS)
def test_quantize_with_channel_norms_equals_the_scalar_reference(name: str, kind: str) -> None:
    seed = seed_of("weighted", name, kind)
    weights = matrix(kind, seed)
    compare(FORMATS[name], weights, seed, uneven_norms(seed, weights.shape[1]))


@pytest.mark.parametrize("kind", ["normal", "wide_range"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", FORMATS)
def test_quantize_without_excluded_weights_equals_the_scalar_reference(
    name: str, weighted: bool, kind: str
) -> None:
    """They are replaced by the largest of all weights, which must not count."""
    seed = seed_of("excluded", name, kind)
    weights = matrix(kind, seed)
    excluded = some_excluded(seed, weights.shape)
    weights[excluded] = np.float32(1e4) * np.abs(weights).max()
    norms = uneven_norms(seed, weights.shape[1]) if weighted else None
    compare(FORMATS[name], weights, seed, norms, excluded)


# -------------------------------------------------------------------------------- excluded weights


@pytest.mark.parametrize("name", ["BOF4-NF4sS1E5M5", "NF4sRS1E2M4", "NF4sUE2M3", "E2M3^0sUE4M4"])
@pytest.mark.parametrize("seed", [73])
def test_the_search_never_looks_at_excluded_weights(name: str, seed: int) -> None:
    weights, fmt = gaussian(seed, 6, 40), parse_format(name)
    excluded = some_excluded(seed, weights.shape)
    wild = np.where(excluded, 1e4, weights).astype(np.float32)
    first, second = (quantize(values, fmt, excluded=excluded) for values in (weights, wild))
    assert_same_bytes(first, second)
    # Zeros that count pull the scale another way than weights that do not.
    zeros = np.where(excluded, 0.0, weights).astype(np.float32)
    if fmt.atom is None:
        counted = quantize(zeros, fmt, luts=shifted_luts(fmt))
        left_out = quantize(zeros, fmt, luts=shifted_luts(fmt), excluded=excluded)
        assert not np.array_equal(counted.scale_words, left_out.scale_words)


def test_excluded_must_have_the_shape_of_the_weights() -> None:
    with pytest.raises(InputError, match=r"excluded has shape \(16, 2\), weights \(2, 16\)"):
        quantize(
            np.ones((2, 16), dtype=np.float32),
            parse_format("NF4sUE4M4"),
            excluded=np.zeros((16, 2), dtype=bool),
        )


# ---------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize("seed", [31])
def test_equal_errors_take_the_first_lut(seed: int) -> None:
    lut = one_lut(STEPS)
    weights = gaussian(seed, 5, 64)
    fmt = parse_format("DD4-DD4sS1E5M5")
    for mode in ScaleMode:
        assert not quantize(weights, fmt, mode=mode, luts=(lut, lut)).metabits.any()


def test_each_block_takes_the_lut_that_fits_it() -> None:
    fmt = parse_format("DD4-DD4sS1E5M5")
    weights = np.array([[*STEPS], [*SHIFTED], [*STEPS]], dtype=np.float32)
    tensor = quantize(weights, fmt, luts=(one_lut(STEPS), one_lut(SHIFTED)))
    assert tensor.metabits.tolist() == [[0], [1], [0]]
    swapped = quantize(weights, fmt, luts=(one_lut(SHIFTED), one_lut(STEPS)))
    assert swapped.metabits.tolist() == [[1], [0], [1]]
    assert np.array_equal(decode(tensor), weights)
    assert np.array_equal(decode(swapped), weights)


@pytest.mark.parametrize("mode", ScaleMode)
def test_a_block_of_zeros_has_code_0_metabit_0_and_the_level_nearest_zero(mode: ScaleMode) -> None:
    fmt = parse_format("DD4-DD4sS1E5M5")
    weights = np.zeros((2, 40), dtype=np.float32)
    weights[0, 20] = 1.0
    tensor = quantize(weights, fmt, mode=mode, luts=(one_lut(SHIFTED), one_lut(STEPS)))
    zero = np.array([[True, False, True], [True, True, True]])
    assert not tensor.scale_words[zero].any()
    assert (tensor.scale_codes[~zero] != 0).all()
    # -4 and 4 are equally near zero: the lower index, 7.
    assert (tensor.indices[zero] == 7).all()
    assert not decode(tensor, padded=True)[:, :16].any()


@pytest.mark.parametrize("name", ["NF4sS1E5M5", "BOF4-NF4sS1E5M5", "E2M3sUE4M4", "NF4sUE4M4"])
@pytest.mark.parametrize("seed", [35])
def test_channel_norms_lower_the_weighted_error(name: str, seed: int) -> None:
    fmt, weights = parse_format(name), gaussian(seed, 40, 64)
    norms = 10.0 ** np.random.default_rng(seed + 1).uniform(-1, 1, 64)
    plain = sum(exact_errors(weights, quantize(weights, fmt), norms))
    aware = sum(exact_errors(weights, quantize(weights, fmt, channel_norms=norms), norms))
    # Measured at this seed: 0.38 (the pair) to 0.56 (E2M3sUE4M4).
    assert aware < 0.6 * plain, f"seed {seed}: {float(aware / plain)}"


def test_channels_without_a_norm_count_with_norm_one() -> None:
    weights, norms = gaussian(74, 6, 32), uneven_norms(75, 32)
    norms[[3, 17]] = 0.0, np.nan
    usable = np.where(np.arange(32) % 14 == 3, 1.0, norms)
    fmt = parse_format("BOF4-NF4sS1E5M5")
    assert_same_bytes(
        quantize(weights, fmt, channel_norms=norms), quantize(weights, fmt, channel_norms=usable)
    )


@pytest.mark.parametrize("seed", [36])
def test_equal_channel_norms_change_nothing(seed: int) -> None:
    weights = gaussian(seed, 10, 40)
    fmt = parse_format("BOF4-NF4sS1E5M5")
    assert_same_bytes(
        quantize(weights, fmt), quantize(weights, fmt, channel_norms=np.full(40, 4.0))
    )


@pytest.mark.parametrize(
    ("name", "mode", "published"),
    [
        ("E2M3sUE4M4", ScaleMode.ABSMAX, 0.774),
        ("HIF7sUE4M4", ScaleMode.ABSMAX, 0.774 / 1.0395),
    ],
)
@pytest.mark.parametrize("seed", [37])
def test_fidelity_against_the_papers_baseline(
    name: str, mode: ScaleMode, published: float, seed: int
) -> None:
    """The paper's ratio of MSE to E4M3^0sUE8M0 on three language models is 0.770 to 0.778 for E2M3.

    E2M3 over HIF7 is 1.038 to 1.041 there.

    Gaussian weights are not a language model, so within 10 %; measured here: 0.786 and 0.760.
    """
    weights = gaussian(seed, 256, 256)

    def error(fmt: str) -> float:
        dense = decode(quantize(weights, parse_format(fmt), mode=mode))
        return float(np.mean((weights - dense) ** 2.0))

    ratio = error(name) / error("E4M3^0sUE8M0")
    assert ratio == pytest.approx(published, rel=0.1), f"seed {seed}"


# ---------------------------------------------------------------------------------- determinism


def assert_same_bytes(first: QuantizedTensor, second: QuantizedTensor) -> None:
    assert first.indices.tobytes() == second.indices.tobytes()
    assert first.scale_words.tobytes() == second.scale_words.tobytes()
    assert first.layer_exponent == second.layer_exponent
    assert first.indices.dtype == second.indices.dtype
    assert (first.row_scales is None) == (second.row_scales is None)
    if first.row_scales is not None and second.row_scales is not None:
        assert np.array_equal(first.row_scales, second.row_scales)


DETERMINISM = (
    "BOF4-NF4sS1E5M5", "E2M3^32sUE8M0", "E5M6^8sUE4M4", "E4M3^0sUE8M0", "BOF4-NF4sRS1E2M4",
    "NF4sUE2M3",
)  # fmt: skip


@pytest.mark.parametrize("name", DETERMINISM)
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "norms_and_excluded"])
@pytest.mark.parametrize("chunk", [1, 48, 64, 200])
@pytest.mark.parametrize("seed", [38])
def test_chunking_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, name: str, everything: bool, chunk: int, seed: int
) -> None:
    weights, fmt = gaussian(seed, 7, 70), parse_format(name)
    norms = uneven_norms(seed, 70) if everything else None
    excluded = some_excluded(seed, weights.shape) if everything else None
    whole = quantize(weights, fmt, channel_norms=norms, excluded=excluded)
    monkeypatch.setattr(golden.blocks, "_CHUNK_WEIGHTS", chunk)
    pieces = quantize(weights, fmt, channel_norms=norms, excluded=excluded)
    assert_same_bytes(whole, pieces)


@pytest.mark.parametrize("name", DETERMINISM)
@pytest.mark.parametrize("mode", [ScaleMode.ABSMAX, ScaleMode.SEARCH])
@pytest.mark.parametrize("seed", [39])
def test_memory_layout_changes_nothing_and_inputs_stay_as_they_are(
    name: str, mode: ScaleMode, seed: int
) -> None:
    fmt, weights, norms = parse_format(name), gaussian(seed, 6, 64), uneven_norms(seed, 64)
    norms[5] = 0.0  # counts as one, but stays what it is
    excluded = some_excluded(seed, weights.shape)
    wide = np.zeros((12, 128), dtype=np.float32)
    wide[::2, ::2] = weights
    kept = weights.copy(), norms.copy(), excluded.copy()
    whole = quantize(weights, fmt, mode=mode, channel_norms=norms, excluded=excluded)
    for other, mask in (
        (np.asfortranarray(weights), np.asfortranarray(excluded)),
        (wide[::2, ::2], excluded),
        (weights[::-1][::-1], excluded[::-1][::-1]),
    ):
        found = quantize(other, fmt, mode=mode, channel_norms=norms, excluded=mask)
        assert_same_bytes(whole, found)
    assert np.array_equal(weights, kept[0])
    assert np.array_equal(norms, kept[1])
    assert np.array_equal(excluded, kept[2])


@pytest.mark.parametrize("seed", [40])
def test_rows_do_not_affect_each_other(seed: int) -> None:
    """Given the same f, a row comes out alike wherever it stands."""
    weights = gaussian(seed, 6, 40)
    weights[:, 0] = 4.0  # the same absmax, hence f, in every row
    fmt = parse_format("BOF4-NF4sS1E5M5")
    whole = quantize(weights, fmt)
    for row in range(6):
        alone = quantize(weights[row : row + 1], fmt)
        assert np.array_equal(alone.indices[0], whole.indices[row])
        assert np.array_equal(alone.scale_words[0], whole.scale_words[row])


@pytest.mark.parametrize("seed", [41])
def test_padding_is_not_counted(seed: int) -> None:
    """With a LUT that has no zero, counted padding would pull the scale down."""
    weights = gaussian(seed, 30, 9)
    fmt, luts = parse_format("DD4sS1E5M5"), (one_lut(SHIFTED),)
    tensor = quantize(weights, fmt, luts=luts)
    norms = np.ones(9)
    assert_same_bytes(tensor, quantize(weights, fmt, luts=luts, channel_norms=norms))
    counted = np.zeros((30, 16), dtype=np.float32)
    counted[:, :9] = weights
    other = quantize(counted, fmt, luts=luts)
    assert not np.array_equal(tensor.scale_words, other.scale_words)
    own = float(((decode(tensor) - weights) ** 2).sum())
    assert own < float(((decode(other)[:, :9] - weights) ** 2).sum())


# --------------------------------------------------------------------------------------- results


@pytest.mark.parametrize("seed", [42])
def test_shapes_dtypes_and_parts(seed: int) -> None:
    weights = gaussian(seed, 3, 40)
    for name, shape, dtype in (
        ("NF4sUE4M4", (3, 3, 16), np.uint8),
        ("E5M6^8sUE4M4", (3, 5, 8), np.uint16),
        ("E4M3^0sUE8M0", (1, 1, 120), np.uint8),
    ):
        tensor = quantize(weights, parse_format(name))
        assert tensor.indices.shape == shape
        assert tensor.indices.dtype == dtype
        assert tensor.scale_words.shape == shape[:2]
        assert tensor.scale_words.dtype == np.uint16
        assert tensor.shape == (3, 40)
        assert tensor.format == parse_format(name)
        assert tensor.row_scales is None
        assert decode(tensor).shape == (3, 40)


@pytest.mark.parametrize("seed", [43])
def test_the_default_mode_is_search(seed: int) -> None:
    weights = gaussian(seed, 3, 40)
    fmt = parse_format("NF4sS1E5M5")
    assert_same_bytes(quantize(weights, fmt), quantize(weights, fmt, mode=ScaleMode.SEARCH))


@pytest.mark.parametrize("seed", [44])
def test_a_given_lut_replaces_the_fixed_one_and_none_takes_it(seed: int) -> None:
    weights = gaussian(seed, 3, 40)
    fmt, lut = parse_format("NF4-DD4sS1E5M5"), one_lut(SHIFTED)
    tensor = quantize(weights, fmt, luts=(None, lut))
    assert tensor.luts == (fixed_lut("NF4", 16, HIF7), lut)
    replaced = quantize(weights, fmt, luts=(one_lut(STEPS), lut))
    assert replaced.luts == (one_lut(STEPS), lut)


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_a_fixed_codebook_is_that_of_the_block_size_and_the_entry_format(size: int) -> None:
    for hif in (HIF7, HIF8):
        luts = resolve_luts(parse_format(f"BOF4-NF4^{size}sS1E5M5", hif))
        assert luts == (fixed_lut("BOF4", size, hif), fixed_lut("NF4", size, hif))


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("bad", ["weights", "channel norms", "argmax"])
def test_bad_inputs_of_every_part_are_refused(bad: str) -> None:
    """What exactly is refused, and how, is shown for each part on its own."""
    weights, norms, mode = np.ones((2, 16), dtype=np.float32), np.ones(16), ScaleMode.SEARCH
    if bad == "weights":
        weights[1, 7], message = np.nan, "weight at row 1, column 7 is nan"
    elif bad == "channel norms":
        norms[3], message = -1.0, "channel_norms: channel 3 is -1"
    else:
        mode, message = ScaleMode.ARGMAX, "argmax needs a signed scale, UE4M4 has no sign"
    with pytest.raises(InputError, match=message):
        quantize(weights, parse_format("NF4sUE4M4"), mode=mode, channel_norms=norms)


def test_a_trained_codebook_needs_its_lut() -> None:
    for luts in ((), (None, None), (one_lut(STEPS), None)):
        with pytest.raises(InputError, match="codebook DD4 is trained per layer; give its LUT"):
            resolve_luts(parse_format("NF4-DD4sS1E5M5"), luts)


def test_number_of_luts_must_be_that_of_the_format() -> None:
    lut = one_lut(STEPS)
    for name, count in (("NF4-DD4sS1E5M5", 2), ("E2M3sUE4M4", 0)):
        with pytest.raises(InputError, match=f"{name} has {count} LUTs, 1 were given"):
            resolve_luts(parse_format(name), (lut,))


@pytest.mark.parametrize(
    ("lut", "shown"),
    [
        (random_lut(32, HIF7, 46), "32 of HIF7"),
        (random_lut(8, HIF7, 46), "8 of HIF7"),
        (random_lut(16, HIF8, 46), "16 of HIF8"),
    ],
    ids=["entries32", "entries8", "hif8"],
)
def test_a_lut_of_the_wrong_kind_is_named(lut: Lut, shown: str) -> None:
    message = rf"luts\[1\]: NF4-DD4sS1E5M5 has 16 entries of HIF7, not {shown}"
    with pytest.raises(InputError, match=message):
        resolve_luts(parse_format("NF4-DD4sS1E5M5"), (None, lut))


def test_results_that_float32_would_flush_are_refused() -> None:
    """1e-38 is below float32's smallest normal number, 1.18e-38."""
    weights = np.zeros((1, 32), dtype=np.float32)
    weights[0, 0], weights[0, 16] = 1e-32, 1e-38
    with pytest.raises(InputError, match=r"would be subnormal in float32"):
        quantize(weights, parse_format("E3M4sUE5M5"))
    weights[0, 16] = 1e-37
    assert decode(quantize(weights, parse_format("E3M4sUE5M5")))[0, 16] == pytest.approx(
        1e-37, rel=0.1
    )


@pytest.mark.parametrize("row", [0, 1, 2])
def test_results_out_of_range_are_found_in_any_chunk(
    monkeypatch: pytest.MonkeyPatch, row: int
) -> None:
    monkeypatch.setattr(golden.blocks, "_CHUNK_WEIGHTS", 16)
    weights = np.ones((3, 16), dtype=np.float32)
    weights[row] = 1e-39
    with pytest.raises(InputError, match="subnormal in float32"):
        quantize(weights, parse_format("NF4sBF16"))
    weights[row] = -np.finfo(np.float32).max  # the nearest level is -128 * 2**121
    with pytest.raises(InputError, match="overflow float32"):
        quantize(weights, parse_format("NF4sUE8M0"))


@pytest.mark.parametrize("name", ["E2M3sUE4M4", "NF4sUE2M3", "NF4sRS1E2M4", "E2M3^0sS1E2M4"])
def test_all_zeros_have_layer_exponent_zero_and_decode_to_zero(name: str) -> None:
    tensor = quantize(np.zeros((2, 20), dtype=np.float32), parse_format(name))
    assert tensor.layer_exponent == 0
    assert not tensor.scale_words.any()
    if tensor.row_scales is not None:
        assert tensor.row_scales.tolist() == [BF16.encode(Fraction(1))] * 2
    dense = decode(tensor)
    assert not dense.any()
    assert not np.signbit(dense).any()
