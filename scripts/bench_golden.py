"""Speed and memory of the golden quantizer, as ratios to programs in use, on one thread.

* one pass: NF4 with one scale per block, against bitsandbytes' NF4 on the CPU;
* pair search: the paper's four codebooks, every block under each of them with the best scale found,
  then the best pair for the layer; against llama.cpp's IQ4_NL, which searches the scales of one
  codebook. With the 8-bit word of a pair (metabit and UE4M3) and with the 12-bit one;
* time for n, 2 n and 4 n weights: the exponent p of ``time ~ n**p``;
* peak memory of a run, besides the tensor itself, over that of the tensor.

The two contestants take turns, each on the same weights in the same process, and the figure is the
median of the ratios of neighbouring runs: a ratio survives a busy machine, seconds do not. A
contestant that is not installed is left out, and the output says which package it is.

Usage: ``make bench-golden``, or ``python scripts/bench_golden.py [--json] [--weights N]
[--repetitions N]`` where the extra ``bench`` is installed.
"""

import os

# Read when NumPy and torch are imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

import importlib.util
import logging
import multiprocessing
import resource
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from golden.codebooks import PAPER_CODEBOOKS, fixed_lut
from golden.convert import level_table
from golden.errors import InputError
from golden.extras import missing_package
from golden.notation import parse_format
from golden.pair_search import Candidate, search_codebooks
from golden.quantize import quantize
from golden.scaling import ScaleMode
from golden.search import ScaleSearch, cells_for
from sop.baselines.others import ggml_encoder
from sop.shared.console import print_json

Float32 = NDArray[np.float32]
Run = Callable[[Float32], object]

ONE_PASS_FORMAT = "NF4sUE4M4"
# Their codebooks only say that a pair is sought. A word of 8 bits holds metabit and UE4M3.
PAIR_FORMATS = {"8-bit words": "BOF4-NF4sUE4M3", "12-bit words": "BOF4-NF4sS1E5M5"}
PEER_BLOCK = 64  # bitsandbytes' default
COLUMNS = 1024
SEED = 1

SEARCH_SHARE = 8  # a search is slower than one pass by more than that, so it gets fewer weights


def golden_one_pass(weights: Float32) -> object:
    """NF4 with one 8-bit scale per 16 weights."""
    return quantize(weights, parse_format(ONE_PASS_FORMAT), mode=ScaleMode.ABSMAX)


def paper_candidates(format_name: str) -> list[Candidate]:
    """The paper's four fixed codebooks for a format."""
    fmt = parse_format(format_name)
    luts = {name: fixed_lut(name, fmt.block_size, fmt.hif) for name in PAPER_CODEBOOKS}
    return [Candidate(name, lut) for name, lut in luts.items()]


def golden_pair_search(weights: Float32, format_name: str = PAIR_FORMATS["8-bit words"]) -> object:
    """The best pair of the four codebooks, each block with the better one and the best scale."""
    candidates = paper_candidates(format_name)
    return search_codebooks(weights, parse_format(format_name), candidates=candidates)


def codes_tried(format_name: str) -> tuple[int, int]:
    """Least and most scale codes that the pair search tries per block and codebook."""
    scale = parse_format(format_name).word.scale
    tables = [level_table(candidate.lut.values) for candidate in paper_candidates(format_name)]
    counts = [
        ScaleSearch(table, scale, cells_for(len(table.values))).codes_tried for table in tables
    ]
    return min(least for least, _ in counts), max(most for _, most in counts)


def bitsandbytes_nf4() -> Run:
    """The NF4 quantizer of bitsandbytes for the CPU.

    Raises
    ------
    InputError
        If it is not installed.
    """
    for package in ("torch", "bitsandbytes"):
        if importlib.util.find_spec(package) is None:
            raise missing_package("this measurement", package, "bench")
    # It warns about a kernel for matrix products, which is not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import torch
    from bitsandbytes.functional import quantize_4bit

    torch.set_num_threads(1)
    return lambda weights: quantize_4bit(
        torch.from_numpy(weights), blocksize=PEER_BLOCK, quant_type="nf4"
    )


def make_weights(count: int) -> Float32:
    """Normal weights as a matrix; no large temporaries, which would spoil the peak."""
    rng = np.random.default_rng(SEED)
    weights = rng.standard_normal((count // COLUMNS, COLUMNS), dtype=np.float32)
    weights *= np.float32(0.02)
    return weights


def cpu_seconds(run: Run, weights: Float32) -> float:
    """Processor time of one run, all threads added up: two threads gain nothing here."""
    start = time.process_time()
    run(weights)
    return time.process_time() - start


def compare(ours: Run, peer: Run, weights: Float32, repetitions: int) -> dict[str, Any]:
    """Let the two take turns; ratios are our speed over the peer's."""
    for run in (ours, peer):
        run(weights[:64])  # tables are built and kernels loaded at the first call
    times = [(cpu_seconds(ours, weights), cpu_seconds(peer, weights)) for _ in range(repetitions)]
    ratios = sorted(theirs / mine for mine, theirs in times)
    mweights = weights.size / 1e6
    return {
        "speed_ratio": statistics.median(ratios),
        "speed_ratio_range": [ratios[0], ratios[-1]],
        "our_mweights_per_second": mweights / statistics.median(mine for mine, _ in times),
        "peer_mweights_per_second": mweights / statistics.median(theirs for _, theirs in times),
        "weights": weights.size,
        "repetitions": repetitions,
    }


def compare_if_installed(
    ours: Run, load_peer: Callable[[], Run], weights: Float32, repetitions: int
) -> dict[str, Any]:
    """The comparison, or the reason why there is none."""
    try:
        peer = load_peer()
    except InputError as error:
        return {"skipped": str(error)}
    return compare(ours, peer, weights, repetitions)


def growth(run: Run, count: int, repetitions: int) -> dict[str, Any]:
    """Times for count, 2 count and 4 count weights, and the exponent that fits them."""
    sizes = [count, 2 * count, 4 * count]
    weights = make_weights(sizes[-1])
    parts = [weights[: size // COLUMNS] for size in sizes]
    rounds = [[cpu_seconds(run, part) for part in parts] for _ in range(repetitions)]
    seconds = [min(column) for column in zip(*rounds, strict=True)]
    # Least-squares slope of log(time) over log(size), whose three points are equally spaced.
    exponent = float(np.log2(seconds[2] / seconds[0])) / 2
    return {"exponent": exponent, "weights": sizes, "seconds": seconds}


def resident_peak() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory(run: Run, count: int) -> dict[str, Any]:
    """Peak memory of one run, without its weights, over the bytes of the weights, measured twice.

    What the process needed before would hide what a run needs: see :func:`memory_of_new_process`.
    """
    run(make_weights(64 * COLUMNS))
    weights = make_weights(count)
    before = resident_peak()
    run(weights)
    resident = resident_peak() - before
    tracemalloc.start()
    run(weights)
    _, traced = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {
        "traced_over_tensor": traced / weights.nbytes,
        "resident_over_tensor": resident / weights.nbytes,
        "weights": weights.size,
    }


def memory_of_new_process(run: Run, count: int) -> dict[str, Any]:
    """Memory measured in a process of its own.

    To be called before anything else, because on Linux a new process starts with the peak of its
    parent.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(memory, run, count).result()


def print_text(report: dict[str, Any]) -> None:
    """Print a report, one line per figure."""
    for name, facts in report.items():
        if "skipped" in facts:
            print(f"{name}: {facts['skipped']}")
        elif "speed_ratio" in facts:
            low, high = facts["speed_ratio_range"]
            print(
                f"{name}: {facts['speed_ratio']:.2f} times its speed ({low:.2f} to {high:.2f} in "
                f"{facts['repetitions']} runs; {facts['our_mweights_per_second']:.2f} against "
                f"{facts['peer_mweights_per_second']:.2f} million weights a second)"
            )
        elif "exponent" in facts:
            print(f"{name}: time ~ weights**{facts['exponent']:.2f}")
        elif "most" in facts:
            print(f"{name}: {facts['least']} to {facts['most']}")
        else:
            print(
                f"{name}: peak {facts['traced_over_tensor']:.2f} times the tensor (tracemalloc), "
                f"{facts['resident_over_tensor']:.2f} times (resident)"
            )


def bench(weights: int, repetitions: int) -> dict[str, Any]:
    """All measurements; ``weights`` is the size of the one-pass run."""
    searched = weights // SEARCH_SHARE
    report: dict[str, Any] = {
        "one pass, memory": memory_of_new_process(golden_one_pass, weights),
        "pair search, memory": memory_of_new_process(golden_pair_search, weights),
        "one pass against bitsandbytes NF4": compare_if_installed(
            golden_one_pass, bitsandbytes_nf4, make_weights(weights), repetitions
        ),
    }
    for words, format_name in PAIR_FORMATS.items():
        least, most = codes_tried(format_name)
        report[f"pair search, {words}, scale codes per block and codebook"] = {
            "least": least,
            "most": most,
        }
        report[f"pair search, {words}, against llama.cpp IQ4_NL"] = compare_if_installed(
            partial(golden_pair_search, format_name=format_name),
            lambda: ggml_encoder("IQ4_NL"),
            make_weights(searched),
            repetitions,
        )
    report["one pass, growth"] = growth(golden_one_pass, weights // 4, repetitions)
    report["pair search, growth"] = growth(golden_pair_search, searched, repetitions)
    return report


def main(
    weights: Annotated[
        int, typer.Option(min=1 << 20, help="Weights of a one-pass run; a search takes 1/8.")
    ] = 1 << 22,
    repetitions: Annotated[int, typer.Option(min=1, help="Runs of each contestant.")] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Compare the golden quantizer with bitsandbytes and llama.cpp."""
    report = bench(weights, repetitions)
    if as_json:
        print_json(report)
    else:
        print_text(report)


if __name__ == "__main__":
    typer.run(main)
