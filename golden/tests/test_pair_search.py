"""The codebooks chosen for a layer are the best of all that were judged."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from golden.codebooks import FIXED_CODEBOOKS, fixed_lut
from golden.errors import InputError
from golden.formats import HIF7, HIF8, HIF8T
from golden.notation import parse_format
from golden.pair_search import Candidate, PairSearch, fixed_candidates, search_codebooks
from golden.quantize import quantize
from golden.tensor import decode
from golden.training import Training

QUICK = Training(blocks=128, rounds=1, sweeps=0)


def gaussian(seed: int, rows: int = 24, columns: int = 70) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def norms_of(seed: int, columns: int = 70) -> NDArray[np.float64]:
    norms: NDArray[np.float64] = 3.0 ** np.random.default_rng(seed).standard_normal(columns)
    return norms


def error_of(
    weights: NDArray[np.float32],
    reconstruction: NDArray[np.float32],
    norms: NDArray[np.float64] | None,
) -> float:
    errors = weights.astype(np.float64) - reconstruction
    return float(((errors * (1.0 if norms is None else norms)) ** 2).sum())


def same(first: PairSearch, second: PairSearch) -> bool:
    tensors = first.tensor, second.tensor
    return (
        tensors[0].luts == tensors[1].luts
        and np.array_equal(tensors[0].indices, tensors[1].indices)
        and np.array_equal(tensors[0].scale_words, tensors[1].scale_words)
    )


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize(
    ("template", "training"),
    [
        ("DD4-DD4sS1E5M5", None),
        ("DD4sS1E4M3", None),
        ("DD4-DD4sRS1E2M4", QUICK),
        ("DD4sUE4M4", QUICK),
    ],
)
def test_the_result_has_the_least_error_of_all_that_were_judged(
    template: str, training: Training | None, weighted: bool
) -> None:
    weights, norms = gaussian(1), norms_of(2) if weighted else None
    candidates = fixed_candidates(16, HIF7)
    found = search_codebooks(
        weights,
        parse_format(template),
        candidates=candidates,
        training=training,
        channel_norms=norms,
    )
    luts = len(found.tensor.format.codebooks)
    pool = len(candidates) + (luts if training else 0)
    assert len(found.errors) == len(list(itertools.combinations(range(pool), luts)))
    least, winners = min((error, names) for names, error in found.errors)
    names = "-".join(found.tensor.format.codebooks)
    assert names == winners
    if "R" not in template:  # row scales were fitted to the winners afterwards
        assert found.error == least
    assert found.error == pytest.approx(least, rel=0.05)
    actual = error_of(weights, decode(found.tensor), norms)
    assert actual == pytest.approx(found.error, rel=1e-12)


@pytest.mark.parametrize("seed", [3])
def test_no_fixed_pair_alone_does_better(seed: int) -> None:
    """Row scales that do not depend on the pair: all formats then have the same multipliers."""
    weights = gaussian(seed)
    template = parse_format("DD4-DD4sUE8M0")  # f is 0 whatever the codebooks
    books = ("NF4", "BOF4", "SH4T", "Split87")
    candidates = [Candidate(name, fixed_lut(name, 16, HIF7)) for name in books]
    found = search_codebooks(weights, template, candidates=candidates)
    judged = dict(found.errors)
    for pair in itertools.combinations(books, 2):
        alone = quantize(weights, template.with_codebooks(pair))
        error = error_of(weights, decode(alone), None)
        assert judged["-".join(pair)] == pytest.approx(error, rel=1e-12)
        assert found.error <= error * (1 + 1e-12)


def test_the_first_of_equals_wins() -> None:
    weights = gaussian(4)
    lut = fixed_lut("NF4", 16, HIF7)
    candidates = [Candidate(name, lut) for name in ("first", "second", "third")]
    single = search_codebooks(weights, parse_format("DD4sS1E5M5"), candidates=candidates)
    assert single.tensor.format.codebooks == ("first",)
    pair = search_codebooks(weights, parse_format("DD4-DD4sS1E5M5"), candidates=candidates)
    assert pair.tensor.format.codebooks == ("first", "second")
    assert not pair.tensor.metabits.any()


@pytest.mark.parametrize("name", ["DD5-DD5sRS1E2M4", "DD6sS1E4M3", "DD4-DD4^32sS1E5M5"])
def test_trained_codebooks_alone_are_enough(name: str) -> None:
    fmt = parse_format(name, HIF8T)
    found = search_codebooks(gaussian(5), fmt, training=QUICK)
    assert found.tensor.format == fmt
    assert len(found.errors) == 1
    assert all(lut.hif is HIF8T for lut in found.tensor.luts)


def test_partners_are_trained_for_the_best_fixed_codebooks() -> None:
    weights, fmt = gaussian(6), parse_format("DD4-DD4sS1E5M5")
    candidates = fixed_candidates(16, HIF7)
    tried = []
    for partners in (0, 2):
        effort = Training(blocks=128, rounds=2, sweeps=1, partners=partners)
        found = search_codebooks(weights, fmt, candidates=candidates, training=effort)
        tried.append([names for names, _ in found.errors])
    assert tried[0].count("DD4-DD4") == 1
    assert tried[1].count("NF4-DD4") > tried[0].count("NF4-DD4") == 2
    assert set(tried[1]) >= set(tried[0])


def test_channel_norms_decide_the_choice() -> None:
    """Even columns hold Split87's levels, odd ones SH4's; the norms say which ones count."""
    rng = np.random.default_rng(7)
    books = {name: fixed_lut(name, 16, HIF7) for name in ("Split87", "SH4")}
    weights = np.empty((12, 64), dtype=np.float32)
    weights[:, ::2] = rng.choice(books["Split87"].values, (12, 32))
    weights[:, 1::2] = rng.choice(books["SH4"].values, (12, 32))
    weights[:, ::16] = weights[:, 1::16] = -128
    candidates = [Candidate(name, lut) for name, lut in books.items()]
    chosen = []
    for even, odd in ((10.0, 0.1), (0.1, 10.0)):
        norms = np.tile([even, odd], 32)
        found = search_codebooks(
            weights, parse_format("DD4sS1E5M5"), candidates=candidates, channel_norms=norms
        )
        chosen.append(found.tensor.format.codebooks)
    assert chosen == [("Split87",), ("SH4",)]


def test_excluded_weights_do_not_count() -> None:
    weights = gaussian(8)
    excluded = np.random.default_rng(9).random(weights.shape) < 0.1
    wild = np.where(excluded, 50.0, weights).astype(np.float32)
    fmt, candidates = parse_format("DD4-DD4sS1E5M5"), fixed_candidates(16, HIF7)
    first, second = (
        search_codebooks(values, fmt, candidates=candidates, training=QUICK, excluded=excluded)
        for values in (weights, wild)
    )
    assert first.error == second.error
    assert first.tensor.luts == second.tensor.luts


def test_judging_a_sample_encodes_with_its_winners() -> None:
    weights = gaussian(10, 40, 64)
    fmt, candidates = parse_format("DD4-DD4sS1E5M5"), fixed_candidates(16, HIF7)
    sampled = search_codebooks(weights, fmt, candidates=candidates, judged_blocks=32)
    _, names = min((error, names) for names, error in sampled.errors)
    assert "-".join(sampled.tensor.format.codebooks) == names
    luts = sampled.tensor.luts
    pair = [Candidate(name, lut) for name, lut in zip(names.split("-"), luts, strict=True)]
    alone = search_codebooks(weights, fmt, candidates=pair)
    assert sampled.error == pytest.approx(
        error_of(weights, decode(sampled.tensor), None), rel=1e-12
    )
    assert sampled.error == alone.error
    assert same(sampled, alone)
    whole = search_codebooks(weights, fmt, candidates=candidates, judged_blocks=160)
    assert same(whole, search_codebooks(weights, fmt, candidates=candidates))


@pytest.mark.parametrize(
    ("template", "candidates", "message"),
    [
        ("DD4sS1E5M5", [], "0 candidates, it needs at least 1"),
        ("DD4-DD4sS1E5M5", ["NF4"], "1 candidates, it needs at least 2"),
        ("DD5sS1E5M5", ["NF4"], "codebook NF4 has 16 entries of HIF7, .* needs 32 of HIF7"),
    ],
)
def test_unsuitable_candidates_are_named(
    template: str, candidates: list[str], message: str
) -> None:
    pool = [Candidate(name, fixed_lut(name, 16, HIF7)) for name in candidates]
    with pytest.raises(InputError, match=message):
        search_codebooks(gaussian(11), parse_format(template), candidates=pool)


def test_candidates_of_another_hif_format_are_named() -> None:
    pool = [Candidate("NF4", fixed_lut("NF4", 16, HIF8))]
    with pytest.raises(InputError, match=r"NF4 has 16 entries of HIF8, .* needs 16 of HIF7"):
        search_codebooks(gaussian(12), parse_format("DD4sS1E5M5"), candidates=pool)


def test_fixed_candidates_are_all_fixed_codebooks() -> None:
    candidates = fixed_candidates(32, HIF8T)
    assert [candidate.name for candidate in candidates] == list(FIXED_CODEBOOKS)
    assert all(c.lut == fixed_lut(c.name, 32, HIF8T) for c in candidates)
