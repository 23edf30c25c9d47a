"""Seconds and bytes of the quantizer for layers of growing size, and what whole models would take.

Every layer is quantized plain and with error feedback, by the engine asked for, and by the
quantizers of ik_llama.cpp and llama.cpp, IQ4_K and IQ4_NL, on the same matrix and one thread.
Contestants take turns, and a ratio is the median of those of neighbouring runs: a ratio survives a
busy machine, seconds do not. Times are those of the processor.

The time of a layer is fitted by

    seconds = plain * weights + feedback * weights * columns + factors * columns**3

with ``plain`` from the plain runs, ``factors`` from the factoring of the second moment and
``feedback`` from the rest, all from the largest layer measured, so that a model's time is the sum
over its layers. Layers that share their input could share their factors; none is shared here, as
`sop quantize` does.

Usage: ``make bench-quantizer``, or ``python scripts/bench_quantizer.py [--json] [--sizes N]
[--repetitions N] [--engine auto|golden|fast]``.
"""

import os

# Read when NumPy is imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from golden.engine import running_on
from golden.errors import InputError
from golden.factors import factor_second_moment
from golden.feedback import quantize_with_feedback
from golden.layer import quantize_layer
from sop.baselines.others import ggml_encoder
from sop.quantizing.engines import ENGINES, engine_named
from sop.quantizing.settings import Settings
from sop.shared.console import print_json
from sop.shared.markdown import markdown_table

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

FORMAT = "Any4-Any4sRS1E2M4"
SHAPES = ((576, 576), (1024, 4096), (4096, 4096), (4096, 14336))
PEERS = ("IQ4_K", "IQ4_NL")
PEER_BLOCK = 256
SEED = 1


@dataclass(frozen=True)
class Decoder:
    """Linear layers of the decoder blocks of a model: how many of each shape.

    Attributes
    ----------
    name : str
    blocks : int
    shapes : tuple of (rows, columns)
        Of one block.
    """

    name: str
    blocks: int
    shapes: tuple[tuple[int, int], ...]

    @property
    def weights(self) -> int:
        """Of all blocks."""
        return self.blocks * sum(rows * columns for rows, columns in self.shapes)


def llama_block(width: int, keys: int, hidden: int) -> tuple[tuple[int, int], ...]:
    """Shapes of a block: queries, keys, values, output, gate, up, down."""
    attention = ((width, width), (keys, width), (keys, width), (width, width))
    return (*attention, (hidden, width), (hidden, width), (width, hidden))


# Widths of the published configurations of Llama 3.2 (3B) and Llama 3.1 (8B, 70B).
DECODERS = (
    Decoder("3B", 28, llama_block(3072, 1024, 8192)),
    Decoder("8B", 32, llama_block(4096, 1024, 14336)),
    Decoder("70B", 80, llama_block(8192, 1024, 28672)),
)


def make_weights(rows: int, columns: int) -> Float32:
    """Normal weights."""
    weights = np.random.default_rng(SEED).standard_normal((rows, columns), dtype=np.float32)
    weights *= np.float32(0.02)
    return weights


def make_moment(columns: int) -> Float64:
    """Second moment of correlated inputs of uneven power, symmetric to the last bit."""
    rng = np.random.default_rng(SEED)
    inputs = rng.standard_normal((columns, columns))
    inputs[:, 1:] += 0.7 * inputs[:, :-1]
    inputs *= np.exp(0.3 * rng.standard_normal(columns))
    moment = inputs.T @ inputs / columns
    return np.maximum(moment, moment.T)


def cpu_seconds(run: Callable[[], object]) -> float:
    """Processor time of one run."""
    start = time.process_time()
    run()
    return time.process_time() - start


def resident_peak() -> int:
    """Largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peers() -> dict[str, Callable[[Float32], object]]:
    """Quantizers of others that are installed."""
    found = {}
    for name in PEERS:
        try:
            found[name] = ggml_encoder(name)
        except InputError as error:
            print(error, file=sys.stderr)
    return found


def measure(rows: int, columns: int, engine: str, repetitions: int) -> dict[str, Any]:
    """All figures of one layer, in a process of its own."""
    weights = make_weights(rows, columns)
    joined = weights.reshape(-1, PEER_BLOCK)  # the peers' rows must be whole blocks
    norms = np.exp(0.3 * np.random.default_rng(SEED).standard_normal(columns))
    recipe = Settings(format=FORMAT, bits_per_weight=None).recipe(FORMAT)
    others = peers()
    with running_on(engine_named(engine)):
        # Compiled loops and tables are made at the first call.
        quantize_layer(weights[:64, :256], recipe, norms[:256], make_moment(256))
        plain_times: list[float] = []
        ratios: dict[str, list[float]] = {name: [] for name in others}
        for _ in range(repetitions):
            plain_times.append(cpu_seconds(lambda: quantize_layer(weights, recipe, norms)))
            for name, encode in others.items():
                ratios[name].append(cpu_seconds(lambda run=encode: run(joined)) / plain_times[-1])
        plain = quantize_layer(weights, recipe, norms).tensor
        plain_peak = resident_peak()
        moment = make_moment(columns)
        start = time.process_time()
        factors = factor_second_moment(moment, recipe.format.block_size)
        factoring = time.process_time() - start
        feedback = cpu_seconds(
            lambda: quantize_with_feedback(
                weights, plain, moment, factors, passes=recipe.feedback_passes
            )
        )
    return {
        "rows": rows,
        "columns": columns,
        "weights": weights.size,
        "bytes": weights.nbytes,
        "plain_seconds": statistics.median(plain_times),
        "speed_over": {name: statistics.median(some) for name, some in ratios.items()},
        "factor_seconds": factoring,
        "feedback_seconds": feedback,
        "plain_peak_bytes": plain_peak,
        "feedback_peak_bytes": resident_peak(),
    }


def in_new_process(*arguments: Any) -> dict[str, Any]:
    """:func:`measure`, so that each layer has a peak of memory of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def extrapolate(layer: dict[str, Any]) -> dict[str, Any]:
    """Core hours of whole models, from the rates of one layer."""
    weights, columns = layer["weights"], layer["columns"]
    rates = {
        "plain": layer["plain_seconds"] / weights,
        "feedback": layer["feedback_seconds"] / (weights * columns),
        "factors": layer["factor_seconds"] / columns**3,
    }
    models = []
    for model in DECODERS:
        products = sum(rows * columns**2 for rows, columns in model.shapes)
        cubes = sum(columns**3 for _, columns in model.shapes)
        plain = rates["plain"] * model.weights
        more = model.blocks * (rates["feedback"] * products + rates["factors"] * cubes)
        models.append(
            {
                "name": model.name,
                "weights": model.weights,
                "plain_hours": plain / 3600,
                "feedback_hours": (plain + more) / 3600,
            }
        )
    return {"rates": rates, "measured_on": [layer["rows"], columns], "models": models}


def print_text(report: dict[str, Any]) -> None:
    """Print the tables as Markdown."""
    print(f"{FORMAT}, engine {report['engine']}, one thread, {report['repetitions']} runs\n")
    heads = [
        "layer", "plain, s", *(f"speed over {name}" for name in PEERS), "factors, s", "feedback, s",
        "peak of the process, MB", "with feedback, MB",
    ]  # fmt: skip
    rows = [
        [
            f"{layer['rows']} x {layer['columns']}",
            f"{layer['plain_seconds']:.2f}",
            *(f"{layer['speed_over'].get(name, float('nan')):.2f}" for name in PEERS),
            f"{layer['factor_seconds']:.2f}",
            f"{layer['feedback_seconds']:.2f}",
            f"{layer['plain_peak_bytes'] / 1e6:.0f}",
            f"{layer['feedback_peak_bytes'] / 1e6:.0f}",
        ]
        for layer in report["layers"]
    ]
    print("\n".join(markdown_table(heads, rows)))
    whole, rates = report["extrapolation"], report["extrapolation"]["rates"]
    print(
        f"\nseconds = {rates['plain']:.3g} weights + {rates['feedback']:.3g} weights columns + "
        f"{rates['factors']:.3g} columns^3, from {whole['measured_on']}\n"
    )
    heads = ["model", "weights in its blocks", "plain, core hours", "with feedback, core hours"]
    rows = [
        [
            model["name"],
            f"{model['weights'] / 1e9:.2f} x 10^9",
            f"{model['plain_hours']:.2f}",
            f"{model['feedback_hours']:.2f}",
        ]
        for model in whole["models"]
    ]
    print("\n".join(markdown_table(heads, rows)))


def main(
    sizes: Annotated[
        int, typer.Option(min=1, max=len(SHAPES), help="How many of the layers, smallest first.")
    ] = len(SHAPES),
    repetitions: Annotated[int, typer.Option(min=1, help="Plain runs of each contestant.")] = 5,
    engine: Annotated[str, typer.Option(help=", ".join(ENGINES))] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure the quantizer, and extrapolate to whole models."""
    layers = [in_new_process(*shape, engine, repetitions) for shape in SHAPES[:sizes]]
    report = {
        "engine": engine_named(engine).name,
        "repetitions": repetitions,
        "layers": layers,
        "extrapolation": extrapolate(layers[-1]),
        "decoders": [asdict(decoder) for decoder in DECODERS],
    }
    if as_json:
        print_json(report)
    else:
        print_text(report)


if __name__ == "__main__":
    typer.run(main)
