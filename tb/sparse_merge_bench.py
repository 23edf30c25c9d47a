"""Cocotb bench of :class:`rtl.sparse_merge.SparseMerge`.

The reference is NumPy's float32 addition.
"""

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cocotb
import numpy as np
from cocotb.task import Task
from cocotb.triggers import ClockCycles, with_timeout
from numpy.typing import NDArray

from golden.convert import round_bfloat16
from golden.formats import BF16, FP32
from rtl.layouts import FLOAT32, correction_layout, float_beat_layout, merged_beat_layout
from rtl.units import FLOAT_LAYOUTS, SPARSE_MERGE
from sim.bench_config import BenchConfig
from sim.clock import CLOCK_NS
from tb import shrink
from tb.scoreboard import InOrderScoreboard
from tb.unit_bench import UnitBench
from tb.unit_coverage import MergeCoverage

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

LATENCY = {output: SPARSE_MERGE.clocks(output) for output in FLOAT_LAYOUTS}
TENSORS = 40
RESETS = 8
PAIRS = 6000  # random additions
TIMEOUT_CLOCKS = 200_000

DENSITIES = (0.0, 0.01, 0.1, 1.0)


@dataclass(frozen=True, eq=False)
class Tensor:
    """One tensor of the traffic: dense bits, and the lane positions and bits of its corrections."""

    dense: NDArray[np.uint32]
    positions: NDArray[np.int64]
    values: NDArray[np.uint16]

    @property
    def merged(self) -> NDArray[np.uint32]:
        """Bits of the sums."""
        result = self.dense.copy().view(np.float32)
        widened = (self.values.astype(np.uint32) << np.uint32(16)).view(np.float32)
        with np.errstate(over="ignore"):
            result[self.positions] += widened
        return result.view(np.uint32)


def random_dense(rng: np.random.Generator, count: int) -> NDArray[np.uint32]:
    """Floats that a decoder gives: normal, +0, infinite; mostly of similar size, some extreme."""
    bits = rng.integers(1 << 32, size=count, dtype=np.uint32)
    exponent = np.where(
        rng.random(count) < 0.7, rng.integers(110, 130, size=count), rng.integers(1, 255, count)
    ).astype(np.uint32)
    large = rng.random(count) < 0.03  # whose sums may be infinities
    exponent[large] = 254
    bits = bits & np.uint32(0x807FFFFF) | exponent << np.uint32(23)
    bits = np.where(rng.random(count) < 0.1, np.uint32(0), bits)
    # Right below a power of two, so that rounding up reaches it.
    below = rng.random(count) < np.where(large, 0.5, 0.1)
    bits = np.where(below, bits | np.uint32(0x7FFFFF), bits)
    infinite = bits & np.uint32(0x80000000) | np.uint32(FP32.exponent_mask)
    bits = np.where(rng.random(count) < 0.02, infinite, bits)
    # Some are bfloat16 themselves, so that a correction can cancel them to zero.
    return np.where(rng.random(count) < 0.3, bits & np.uint32(0xFFFF0000), bits)


def random_values(rng: np.random.Generator, dense: NDArray[np.uint32]) -> NDArray[np.uint16]:
    """bfloat16 of every kind: near the dense value in size, its negation, subnormal, zero.

    Also half of the dense value's last place, so that rounding alone can change it.
    """
    count = len(dense)
    bits = rng.integers(1 << 16, size=count, dtype=np.uint16)
    base = FP32.exponent_field(dense).astype(np.int64)
    near = np.clip(base + rng.integers(-27, 28, size=count), 0, 254).astype(np.uint16)
    kind = rng.integers(8, size=count)
    half = np.clip(base - 24, 0, 254).astype(np.uint16)
    near = np.where(kind == 4, half, near)
    bits = np.where(kind < 5, bits & np.uint16(0x807F) | near << np.uint16(7), bits)
    opposite = (dense >> np.uint32(16)).astype(np.uint16) ^ np.uint16(0x8000)
    bits = np.where(kind == 5, opposite, bits)
    bits = np.where(kind == 6, bits & np.uint16(0x807F), bits)  # subnormals and zeros
    finite = ~BF16.has_top_exponent(bits)
    return np.where(finite, bits, np.uint16(0)).astype(np.uint16)


class SparseMergeBench(UnitBench):
    """Drivers, sink, monitors and scoreboard around one unit."""

    def __init__(self, dut: Any, config: BenchConfig) -> None:
        self.config = config
        self.rng = np.random.default_rng(config.seed)
        self.lanes = config.lanes
        self.latency = LATENCY[config.output]
        self.unchecked = 0
        self.layout_in = float_beat_layout(lanes=config.lanes, float_layout=FLOAT32)
        self.layout_entry = correction_layout()
        self.layout_out = merged_beat_layout(
            lanes=config.lanes, float_layout=FLOAT_LAYOUTS[config.output]
        )
        super().__init__(
            dut, config.stalls, config.seed, InOrderScoreboard("SparseMerge", self._explain),
            # The sums are expected when a tensor is sent: entries alone do not say which they are.
            {"i_entry": lambda word: None, "i": lambda word: None},
            lambda counts: MergeCoverage(counts, config.lanes, config.output),
        )  # fmt: skip

    def check(self, word: int) -> None:
        """Compare a word that came out, without flags that are not checked now."""
        self.scoreboard.actual(word & ~self.unchecked)

    def _explain(self, expected: int, actual: int) -> str:
        wanted, got = self.layout_out.from_bits(expected), self.layout_out.from_bits(actual)
        lines = [
            f"lane {lane}: got {got.values[lane].as_bits():#x}, expected {value.as_bits():#x}"
            for lane, value in enumerate(wanted.values)
            if got.values[lane].as_bits() != value.as_bits()
        ]
        for flag in set(self.layout_out.members) - {"values"}:
            if getattr(got, flag) != getattr(wanted, flag):
                lines.append(f"{flag}: got {getattr(got, flag)}")
        return "; ".join(lines)

    def random_tensor(self, beats: int, density: float) -> Tensor:
        """Corrections at random places."""
        dense = random_dense(self.rng, beats * self.lanes)
        positions = np.flatnonzero(self.rng.random(len(dense)) < density)
        return Tensor(dense, positions, random_values(self.rng, dense)[positions])

    def entries(self, tensor: Tensor) -> list[int]:
        """Payloads of the corrections, or of the one entry that says there are none."""
        value_at = self.layout_entry["value"].offset
        words = [
            position | value << value_at
            for position, value in zip(
                tensor.positions.tolist(), tensor.values.tolist(), strict=True
            )
        ]
        if not words:
            words = [1 << self.layout_entry["empty"].offset]
        words[-1] |= 1 << self.layout_entry["last"].offset
        return words

    def beats(self, tensor: Tensor) -> list[int]:
        """Payloads of the dense beats."""
        rows = tensor.dense.reshape(-1, self.lanes)
        last = self.layout_in["last"].offset
        return [
            int.from_bytes(row.tobytes(), "little") | int(number == len(rows) - 1) << last
            for number, row in enumerate(rows)
        ]

    def expect(self, tensor: Tensor) -> None:
        """Put the sums on the scoreboard."""
        merged, out = tensor.merged, self.layout_out
        corrected = np.zeros(len(merged), dtype=bool)
        corrected[tensor.positions] = True
        infinite = FP32.has_top_exponent(merged) & corrected
        if self.config.output == "bfloat16":
            finite = np.where(infinite, np.uint32(0), merged).astype(np.uint32)
            rounded = round_any(finite)
            infinite |= BF16.has_top_exponent(rounded)
            merged = np.where(infinite & (rounded == 0), merged >> np.uint32(16), rounded)
        width = 8 * FLOAT_LAYOUTS[self.config.output].size // 8
        values = merged.astype(np.uint32 if width == 32 else np.uint16).reshape(-1, self.lanes)
        overflow = infinite.reshape(-1, self.lanes).any(axis=1)
        for number, row in enumerate(values):
            word = int.from_bytes(row.tobytes(), "little")
            word |= int(overflow[number]) << out["overflow"].offset
            word |= int(number == len(values) - 1) << out["last"].offset
            self.scoreboard.expect(word, f"beat {number} of {len(values)}")

    def send(self, tensors: list[Tensor]) -> list[Task[None]]:
        """Start sending tensors, and expect their sums."""

        async def entries() -> None:
            for tensor in tensors:
                await self.drivers["i_entry"].send(self.entries(tensor))

        async def beats() -> None:
            for tensor in tensors:
                await self.driver.send(self.beats(tensor))

        for tensor in tensors:
            self.expect(tensor)
        return [cocotb.start_soon(entries()), cocotb.start_soon(beats())]

    def tensors(self) -> "SearchStrategy[Any]":
        """Tensors as data: bits of dense beats, and pairs of position and value.

        Positions beyond the tensor are left out, and what a decoder or a file cannot have is made
        zero.
        """
        from hypothesis import strategies as st

        position = st.integers(0, 6 * self.lanes - 1)
        return st.fixed_dictionaries(
            {
                "beats": shrink.beats_of_bits(32 * self.lanes),
                "corrections": st.lists(
                    st.tuples(position, st.integers(0, 0xFFFF)),
                    max_size=12,
                    unique_by=lambda pair: pair[0],
                ),
            }
        )

    def play(self, tensors: list[Any]) -> tuple[list[Task[Any]], int, int]:
        """Start sending tensors that :meth:`tensors` describes."""
        made, beats, entries = [], 0, 0
        for tensor in tensors:
            raw = b"".join(word.to_bytes(4 * self.lanes, "little") for word in tensor["beats"])
            dense = np.frombuffer(raw, np.uint32)
            exponent = FP32.exponent_field(dense)
            dense = np.where((exponent == 0) | (exponent == 255), np.uint32(0), dense)
            pairs = sorted(pair for pair in tensor["corrections"] if pair[0] < len(dense))
            values = np.array([value for _, value in pairs], np.uint16)
            values = np.where(BF16.has_top_exponent(values), 0, values)
            positions = np.array([position for position, _ in pairs], np.int64)
            made.append(Tensor(dense.astype(np.uint32), positions, values.astype(np.uint16)))
            beats += len(tensor["beats"])
            entries += max(1, len(pairs))
        return self.send(made), beats + entries, beats

    async def run(self, tensors: list[Tensor]) -> None:
        """Send tensors and check every beat that comes out."""
        count = sum(len(tensor.dense) for tensor in tensors) // self.lanes
        checked = self.scoreboard.checked
        self.send(tensors)
        await with_timeout(self.sink.run(count), TIMEOUT_CLOCKS * CLOCK_NS, "ns")
        self.scoreboard.finish(checked + count)


def round_any(bits: NDArray[np.uint32]) -> NDArray[np.uint16]:
    """float32 to bfloat16, nearest even; what would become infinite does."""
    low = bits.view(np.float32)
    limit = np.abs(low) > np.uint32(0x7F7F7FFF).view(np.float32)
    rounded = round_bfloat16(np.where(limit, np.float32(0), low).astype(np.float32))
    infinity = (bits >> np.uint32(16) & np.uint32(0x8000) | np.uint32(BF16.exponent_mask)).astype(
        np.uint16
    )
    return np.where(limit, infinity, rounded)


@cocotb.test()
async def random_tensors(dut: Any) -> None:
    """Tensors of one beat and more, without, with few and with only corrections."""
    bench = SparseMergeBench(dut, BenchConfig.from_environment())
    await bench.start()
    tensors = [
        bench.random_tensor(int(bench.rng.choice([1, 2, 7, 20])), float(density))
        for density in bench.rng.choice(DENSITIES, size=TENSORS)
    ]
    await bench.run(tensors)


@cocotb.test()
async def random_additions(dut: Any) -> None:
    """Every lane of every beat corrected: many pairs of every kind."""
    bench = SparseMergeBench(dut, BenchConfig.from_environment())
    await bench.start()
    tensor = bench.random_tensor(PAIRS // bench.lanes, 1.0)
    merged = tensor.merged
    exponents = FP32.exponent_field(merged)
    # The traffic must hold the hard cases: subnormal sums, cancellation to zero, overflow, and
    # all ones that are rounded up.
    ones = tensor.dense & np.uint32(0x7FFFFF) == 0x7FFFFF
    assert (ones & (merged - tensor.dense == 1)).any()
    assert ((exponents == 0) & (merged << np.uint32(1) != 0)).any()
    assert ((merged == 0) & (tensor.dense >> np.uint32(31) == 1)).any()
    assert (exponents == 255).any()
    small = BF16.exponent_field(tensor.values) < 254 - 23
    finite = FP32.exponent_field(tensor.dense) == 254
    assert (finite & small & (exponents == 255)).any(), "no sum is rounded into infinity"
    await bench.run([tensor])


@cocotb.test()
async def full_rate(dut: Any) -> None:
    """A clock a beat with up to one correction each, as many as there are if there are more."""
    config = BenchConfig.from_environment()
    bench = SparseMergeBench(dut, config)
    if config.stalls != "none":
        dut._log.info("timing is checked where nothing stalls")
        return
    await bench.start()
    counts = [0, 1, 1, 3, 1, 0, bench.lanes, 1, 2]
    tensors = []
    for _ in range(3):
        dense = random_dense(bench.rng, len(counts) * bench.lanes)
        positions = np.concatenate(
            [
                number * bench.lanes + np.sort(bench.rng.permutation(bench.lanes)[:count])
                for number, count in enumerate(counts)
            ]
        )
        tensors.append(Tensor(dense, positions, random_values(bench.rng, dense)[positions]))
    # The entries are there in time: the first beat comes some clocks after them.
    bench.driver.stalls = iter([20] + [0] * 10_000)
    await bench.run(tensors)
    taken = bench.input_monitor.transfers
    clocks = np.diff([taken[0] - 1, *taken]).tolist()
    expected = [max(1, count) for count in counts]
    expected_all = [*expected, *expected, *expected]
    assert clocks[1:] == expected_all[1:], clocks
    latencies = {
        out - into for into, out in zip(taken, bench.output_monitor.transfers, strict=True)
    }
    assert latencies == {LATENCY[config.output]}, latencies


@cocotb.test()
async def misplaced_entries(dut: Any) -> None:
    """Entries that descend, repeat or lie beyond the tensor are dropped and flagged."""
    bench = SparseMergeBench(dut, BenchConfig.from_environment())
    await bench.start()
    lanes = bench.lanes
    good = np.array([1, 5, lanes + 2])
    dense = random_dense(bench.rng, 2 * lanes)
    tensor = Tensor(dense, good, np.full(3, 0x3F80, np.uint16))
    clean = bench.entries(tensor)
    value = 0x4000 << bench.layout_entry["value"].offset
    infinity = BF16.exponent_mask << bench.layout_entry["value"].offset
    cases = {
        "repeated": (2, [5 | value], {"misplaced"}),
        "descending": (2, [3 | value], {"misplaced"}),
        "of the beat before": (3, [7 | value], {"misplaced"}),
        "beyond the tensor": (3, [2 * lanes | value], {"misplaced"}),
        "far beyond the tensor": (3, [(1 << 32) - 1 | value], {"misplaced"}),
        "infinite": (1, [3 | infinity], {"reserved"}),
        "of the beat before, after an infinite one": (
            2, [lanes | infinity, 7 | value], {"misplaced", "reserved"}
        ),
    }  # fmt: skip
    for name, (place, words, raised) in cases.items():
        last = 1 << bench.layout_entry["last"].offset
        faulty = [entry & ~last for entry in (*clean[:place], *words, *clean[place:])]
        faulty[-1] |= last
        taken = len(bench.sink.words)
        places = {flag: bench.layout_out[flag].offset for flag in raised}
        # With which beat a flag comes is not specified.
        bench.unchecked = sum(1 << place for place in places.values())
        bench.expect(tensor)
        cocotb.start_soon(bench.drivers["i_entry"].send(faulty))
        cocotb.start_soon(bench.driver.send(bench.beats(tensor)))
        await with_timeout(bench.sink.run(2), TIMEOUT_CLOCKS * CLOCK_NS, "ns")
        bench.scoreboard.finish(len(bench.sink.words))
        for flag, offset in places.items():
            flags = [word >> offset & 1 for word in bench.sink.words[taken:]]
            assert sum(flags) == 1, f"{name}: {flag} raised {flags}"
        bench.unchecked = 0
    await bench.run([bench.random_tensor(5, 0.2)])


@cocotb.test()
async def reset_in_mid_traffic(dut: Any) -> None:
    """A reset at any moment drops what is under way and leaves nothing behind."""
    bench = SparseMergeBench(dut, BenchConfig.from_environment())
    await bench.start()
    rng = random.Random(bench.config.seed)
    for number in range(RESETS):
        lengths = [rng.choice([1, rng.randint(1, 20)]) for _ in range(3)]
        # The first time nothing is under way; in every third round nothing is taken.
        tensors = [bench.random_tensor(length, 0.1) for length in lengths[: 3 * bool(number)]]
        tasks = bench.send(tensors)
        if number % 3:
            tasks.append(cocotb.start_soon(bench.sink.run(sum(lengths))))
        await ClockCycles(dut.clk, rng.randint(1, 80))
        await bench.interrupt(tasks, LATENCY[bench.config.output])
        bench.watch()
    await bench.run([bench.random_tensor(20, 0.1), bench.random_tensor(3, 1.0)])
