"""The compiled engine writes the bytes that golden writes.

Whole quantizations on weights that are hard to treat alike, and the loops by themselves on numbers
at the edge of what they may get. Golden is the definition; its own tests say that it is right.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("numba")

from fast.compiling import compiled_loops
from fast.engine import FAST
from golden import exact_products
from golden.engine import GOLDEN, Engine, definition_of, running_on
from golden.errors import InputError
from golden.exact_products import SplitMatrix
from golden.factors import factor_second_moment
from golden.formats import HIF7, HIF8T
from golden.layer import QuantizedLayer, parse_recipe, quantize_layer
from golden.scaling import BlockEncoding, ScaleMode
from golden.training import Training

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

ROOT = Path(__file__).parents[2]


# ------------------------------------------------------------------------------------ weights


def gaussian(rows: int, columns: int, seed: int) -> Float32:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def with_zeros(rows: int, columns: int, seed: int) -> Float32:
    """Blocks and rows of zeros of both signs, single weights that are not zero."""
    weights = gaussian(rows, columns, seed)
    weights[0], weights[1] = 0.0, -0.0
    weights[2:, :16] = 0.0
    weights[3, 16:] = 0.0
    weights[3, -1] = 1.0
    return weights


def ties(rows: int, columns: int, seed: int) -> Float32:
    """Small integers: quotients fall on midpoints, blocks have several extremes."""
    rng = np.random.default_rng(seed)
    return rng.integers(-8, 9, (rows, columns)).astype(np.float32)


def equal(rows: int, columns: int, seed: int) -> Float32:
    """One magnitude: every candidate scale of a block ties with others."""
    rng = np.random.default_rng(seed)
    return rng.choice(np.array([-0.75, 0.75], dtype=np.float32), (rows, columns))


def exact(rows: int, columns: int, seed: int) -> Float32:
    """Powers of two times a number of each block: several scales rank alike under E2M3."""
    rng = np.random.default_rng(seed)
    factors = rng.choice([1.0, 1.25, 1.5, 1.75], (rows, -(-columns // 16)))
    values = np.exp2(rng.integers(-2, 2, (rows, columns))) * rng.choice([-1, 1], (rows, columns))
    return (values * np.repeat(factors, 16, axis=1)[:, :columns]).astype(np.float32)


def uneven(rows: int, columns: int, seed: int) -> Float32:
    """Rows and weights over many powers of two, as far as formats with an exponent hold them."""
    rng = np.random.default_rng(seed)
    weights = gaussian(rows, columns, seed)
    weights *= np.exp2(rng.integers(-12, 4, (rows, 1))).astype(np.float32)
    return weights * np.exp2(rng.integers(-6, 1, (rows, columns))).astype(np.float32)


def subnormal(rows: int, columns: int, seed: int) -> Float32:
    """Subnormal float32 numbers among others: what is decoded from them may be refused."""
    weights = gaussian(rows, columns, seed) * np.float32(1e-36)
    weights[::2, ::3] = np.float32(1e-44)
    return weights


def huge(rows: int, columns: int, seed: int) -> Float32:
    return gaussian(rows, columns, seed) * np.float32(6e37)


WEIGHTS: dict[str, Callable[[int, int, int], Float32]] = {
    function.__name__: function
    for function in (gaussian, with_zeros, ties, equal, exact, uneven, subnormal, huge)
}

SHORT = Training(blocks=48, rounds=1, sweeps=1)
ROWS, COLUMNS = 6, 84  # the last block of a row is short under every block size

FORMATS = (
    "NF4sUE4M4", "BOF4-NF4sS1E5M5", "BOF4-NF4T^32sRUE4M4", "SH4sUE2M3", "NF4^8sUE8M0",
    "SH4-SH4TsRS1E2M4", "Split87-NF4^64sS1E4M3", "NF4^8sBF16", "E2M3sUE4M4", "E4M5sUE4M4",
    "E2M1^32sUE8M0", "E4M3^0sUE8M0", "HIF8T^0sUE8M0", "INT4sUE4M4",
)  # fmt: skip
TRAINED = ("DD4sS1E5M5", "DD4-DD4sRS1E2M4", "NF4-DD4sUE4M3", "DD5-DD5^32sRS1E2M4", "DD6sS1E4M3")


def moment_of(columns: int, seed: int) -> Float64:
    """Second moment of inputs some of which are far weaker, and one never excited."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((2 * columns, columns))
    inputs[:, 1:] += 0.7 * inputs[:, :-1]
    inputs *= 10.0 ** rng.uniform(-2, 1, columns)
    inputs[:, 5] = 0.0
    moment = inputs.T @ inputs
    return np.maximum(moment, moment.T)


def digest(layer: QuantizedLayer) -> str:
    """SHA-256 of everything that comes out."""
    tensor, sparse = layer.tensor, layer.corrections
    parts = [
        tensor.format.name.encode(), tensor.indices.tobytes(), tensor.scale_words.tobytes(),
        repr([lut.codes for lut in tensor.luts]).encode(), repr(tensor.layer_exponent).encode(),
        b"" if tensor.row_scales is None else tensor.row_scales.tobytes(),
    ]  # fmt: skip
    if sparse is not None:
        parts += [sparse.indptr.tobytes(), sparse.columns.tobytes(), sparse.values.tobytes()]
    if layer.feedback is not None:
        numbers = layer.feedback.plain_error, layer.feedback.feedback_error
        parts.append(repr((layer.feedback.used, *numbers)).encode())
    return hashlib.sha256(b"|".join(parts)).hexdigest()


def outcome(
    engine: Engine, weights: Float32, name: str, inputs: str, seed: int, **options: Any
) -> str:
    """Digest of a layer quantized on an engine, or why it is refused.

    ``inputs`` is what is known of them: nothing, channel norms, or the second moment as well.
    """
    recipe = parse_recipe(name, HIF8T if "^32" in name or "6" in name else HIF7, **options)
    moment = None if inputs == "nothing" else moment_of(weights.shape[1], seed)
    norms = None if moment is None else np.sqrt(np.diag(moment))
    with running_on(engine):
        try:
            layer = quantize_layer(weights, recipe, norms, moment if inputs == "moment" else None)
        except InputError as error:
            return str(error)
    return digest(layer)


def check(weights: Float32, name: str, inputs: str, seed: int, **options: Any) -> str:
    made = [outcome(engine, weights, name, inputs, seed, **options) for engine in (GOLDEN, FAST)]
    assert made[0] == made[1], (name, inputs, options)
    return made[0]


# -------------------------------------------------------------------------------- whole layers


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_on_every_kind_of_weights(name: str, kind: str) -> None:
    """Searched scales, with and without channel norms; codebooks with error feedback as well."""
    weights = WEIGHTS[kind](ROWS, COLUMNS, len(name))
    codebooks = parse_recipe(name).format.codebooks
    for inputs in ("nothing", "norms", "moment") if codebooks else ("nothing", "norms"):
        if inputs != "moment" or not name.endswith("BF16"):
            check(weights, name, inputs, seed=3)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", TRAINED)
def test_trained_codebooks(name: str, kind: str) -> None:
    weights = WEIGHTS[kind](ROWS, COLUMNS, len(name))
    check(weights, name, "norms", seed=4, training=SHORT)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_searched_codebooks_and_feedback(kind: str) -> None:
    weights = WEIGHTS[kind](ROWS, COLUMNS, 9)
    options = {"training": SHORT, "judged_blocks": 30, "feedback_passes": 1}
    check(weights, "Any4-Any4sRS1E2M4", "moment", seed=5, **options)


@pytest.mark.parametrize("mode", [ScaleMode.ABSMAX, ScaleMode.ARGMAX])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_one_pass_modes(kind: str, mode: ScaleMode) -> None:
    weights = WEIGHTS[kind](ROWS, COLUMNS, 2)
    for name in ("NF4sS1E5M5", "BOF4-NF4^32sRS1E2M4", "E2M3sS1E4M3"):
        check(weights, name, "norms", seed=6, mode=mode)


@pytest.mark.parametrize("kind", ["gaussian", "ties", "with_zeros", "uneven"])
def test_sparse_corrections(kind: str) -> None:
    weights = WEIGHTS[kind](ROWS, COLUMNS, 8)
    for name in ("NF4sS1E5M5", "DD4-DD4sRS1E2M4", "E4M3^0sUE8M0"):
        options = {"outliers": 0.03, "residuals": 0.02, "training": SHORT}
        check(weights, name, "norms", seed=7, **options)


def test_enough_cases_are_compared() -> None:
    """Those of the tests above, counted as they are made."""
    kinds = len(WEIGHTS)
    codebooks = sum(bool(parse_recipe(name).format.codebooks) for name in FORMATS)
    whole = kinds * (2 * len(FORMATS) + codebooks - 1)
    assert whole + kinds * (len(TRAINED) + 1 + 2 * 3) + 4 * 3 >= 300


def test_most_cases_give_a_layer_and_some_are_refused() -> None:
    outcomes = [
        outcome(FAST, make(ROWS, COLUMNS, 1), name, "nothing", 1)
        for make, name in product(WEIGHTS.values(), FORMATS[:4])
    ]
    refused = [text for text in outcomes if " " in text]
    assert 0 < len(refused) < len(outcomes) / 3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_alike(bad: float) -> None:
    weights = gaussian(ROWS, COLUMNS, 1)
    weights[2, 5] = bad
    assert "not finite" in check(weights, "NF4sS1E5M5", "norms", seed=1)


def test_a_moment_that_is_not_positive_definite_is_refused_alike() -> None:
    moment = moment_of(200, 1)
    moment[150, 20] = moment[20, 150] = 1e6
    messages = set()
    for engine in (GOLDEN, FAST):
        with running_on(engine), pytest.raises(InputError) as refused:
            factor_second_moment(moment, 16)
        messages.add(str(refused.value))
    assert len(messages) == 1
    assert "not positive definite at channel" in messages.pop()


@given(
    seed=st.integers(0, 2**32 - 1),
    columns=st.integers(1, 150),
    rows=st.integers(1, 9),
    name=st.sampled_from(["NF4sS1E5M5", "BOF4-NF4^8sRUE3M4", "DD4-DD4^64sRS1E2M4"]),
    power=st.integers(-90, 60),
)
@settings(deadline=None, max_examples=15)
def test_any_shape_and_power(seed: int, columns: int, rows: int, name: str, power: int) -> None:
    weights = np.ldexp(gaussian(rows, columns, seed), power).astype(np.float32)
    inputs = "moment" if columns > 5 else "nothing"
    check(weights, name, inputs, seed, training=SHORT, feedback_passes=1)


# ------------------------------------------------------------------------------------ the loops


def bits(value: Any) -> Any:
    """What must be equal: numbers as their bytes, in whatever holds them."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, tuple | list):
        return [bits(item) for item in value]
    if isinstance(value, BlockEncoding | SplitMatrix):
        return [bits(item) for item in vars(value).values()]
    return value


def checked(calls: Counter[str]) -> Engine:
    """Runs every loop as golden defines it and compiled, and compares all that they write."""

    def both(loop: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            calls[loop.__name__] += 1
            copies = [one.copy() if isinstance(one, np.ndarray) else one for one in arguments]
            # Products may be overwritten, and are told apart from what is returned.
            copies = [deepcopy(one) if isinstance(one, tuple) else one for one in copies]
            wanted, made = definition_of(loop)(*copies), replacement(*arguments)
            assert bits(made) == bits(wanted), loop.__name__
            for mine, theirs in zip(arguments, copies, strict=True):
                if isinstance(mine, np.ndarray):
                    assert bits(mine) == bits(theirs), loop.__name__
            return made

        return run

    return Engine("checked", {loop: both(loop, made) for loop, made in FAST.loops.items()})


@pytest.mark.parametrize("kind", WEIGHTS)
def test_every_call_of_every_loop_gives_the_same_bits(kind: str) -> None:
    """Numbers that seldom decide anything too: sums in the last place, moments of cells."""
    calls: Counter[str] = Counter()
    weights = WEIGHTS[kind](ROWS, COLUMNS, 11)
    for name, inputs in (
        ("DD4-DD4sRS1E2M4", "moment"),
        ("E4M5sUE4M4", "norms"),
        ("E2M3sUE4M4", "nothing"),
        ("DD5sUE4M3", "nothing"),
    ):
        outcome(checked(calls), weights, name, inputs, 12, training=SHORT)
    assert kind in ("subnormal", "huge") or len(calls) == len(FAST.loops)


@pytest.mark.parametrize("bits", [3, 20, 26])
@pytest.mark.parametrize("power", [-1070, -1000, -300, 0, 300, 990])
def test_matrices_are_split_alike(power: int, bits: int) -> None:
    rng = np.random.default_rng(bits)
    values = np.ldexp(rng.standard_normal((7, 9)), power)
    values[2], values[3, 3] = 0.0, -0.0
    made = FAST.loops[exact_products.split](values, bits)
    wanted = definition_of(exact_products.split)(values, bits)
    assert (made.high_exponent, made.low_exponent) == (wanted.high_exponent, wanted.low_exponent)
    np.testing.assert_array_equal(made.high, wanted.high)
    np.testing.assert_array_equal(made.low, wanted.low)


@given(
    seed=st.integers(0, 2**32 - 1),
    # Up to where a sum of products of 52 bits is still finite.
    exponents=st.lists(st.integers(-600, 450), min_size=4, max_size=4),
)
@settings(deadline=None, max_examples=30)
def test_products_are_joined_alike(seed: int, exponents: list[int]) -> None:
    rng = np.random.default_rng(seed)
    parts = tuple(rng.integers(-(2**52), 2**52, (5, 4)).astype(np.float64) for _ in range(3))
    left = exact_products.SplitMatrix(parts[0], parts[0], exponents[0], exponents[1])
    right = exact_products.SplitMatrix(parts[0], parts[0], exponents[2], exponents[3])
    for sign in (1, -1):
        totals = [rng.standard_normal((5, 4))] * 2
        totals[1] = totals[0].copy()
        copies = tuple(part.copy() for part in parts), tuple(part.copy() for part in parts)
        FAST.loops[exact_products.add_joined](totals[0], copies[0], left, right, sign)
        definition_of(exact_products.add_joined)(totals[1], copies[1], left, right, sign)
        np.testing.assert_array_equal(totals[0], totals[1])


def test_every_loop_is_one_of_golden_and_takes_what_it_takes() -> None:
    for loop, replacement in FAST.loops.items():
        definition = definition_of(loop)
        code = vars(replacement).get("py_func", replacement).__code__
        names = definition.__code__.co_varnames[: definition.__code__.co_argcount]
        assert code.co_varnames[: code.co_argcount] == names, loop.__qualname__


# ----------------------------------------------------------------------------- other processors


def digests() -> dict[str, str]:
    """What the compiled engine makes of a few layers, for the test below."""
    return {
        f"{kind} {name} {inputs}": outcome(
            FAST, WEIGHTS[kind](ROWS, COLUMNS, 1), name, inputs, 1, training=SHORT
        )
        for kind in ("gaussian", "ties", "uneven")
        for name in ("DD4-DD4sRS1E2M4", "BOF4-NF4sS1E5M5", "E2M3sUE4M4")
        for inputs in ("norms", "moment")
    }


def fused_operations() -> list[str]:
    """Compiled loops in whose machine code products and sums are fused."""
    # x86 has vfmadd, vfmsub, vfnmadd and their like, AArch64 fmadd, fmla and theirs.
    fused = ("fmadd", "fmsub", "fmla", "fmls")
    return [
        loop.__name__
        for loop in compiled_loops
        if any(name in text for text in loop.inspect_asm().values() for name in fused)
    ]


ENVIRONMENTS = {
    "this processor, two threads": {
        "OPENBLAS_NUM_THREADS": "2",
        "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 AVX512F AVX512_SKX",
    },
    "a plain one": {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
    "no vectors in the loops": {"NUMBA_LOOP_VECTORIZE": "0", "NUMBA_OPT": "1"},
}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_other_processors_and_thread_counts_give_the_same(
    environment: str, tmp_path: Path, thorough: bool
) -> None:
    """Compiled anew; golden in this process is the measure. Nothing is fused or reassociated."""
    if environment != "this processor, two threads" and not thorough:
        pytest.skip("only with --all-simulations")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__], capture_output=True, text=True, check=False,
        timeout=500, cwd=ROOT,
        env=os.environ | ENVIRONMENTS[environment]
        | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made.pop("fused") == []
    assert made.pop("fastmath") == []
    assert made.pop("compiled") == len(compiled_loops)
    for key, text in made.items():
        kind, name, inputs = key.split()
        weights = WEIGHTS[kind](ROWS, COLUMNS, 1)
        assert text == outcome(GOLDEN, weights, name, inputs, 1, training=SHORT), key


if __name__ == "__main__":
    made: dict[str, Any] = {**digests(), "fused": fused_operations()}
    made["fastmath"] = [one.__name__ for one in compiled_loops if one.targetoptions.get("fastmath")]
    made["compiled"] = sum(bool(one.signatures) for one in compiled_loops)
    print(json.dumps(made))
