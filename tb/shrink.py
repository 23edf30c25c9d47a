"""Random traffic as data: generated and shrunk by Hypothesis inside one running simulation.

Traffic is a list of rounds, as JSON. A round has ``tensors`` (what they are made of is up to the
unit's bench), ``stalls`` (for each stream the idle clocks before its transfers; none after the end
of the list) and ``reset_after``: the number of clocks after which a reset ends the round, or null
if everything has to come out. The unit is reset before every example, so an example takes
milliseconds; only the smallest one that fails is reported.
"""

import itertools
import json
import os
from collections.abc import Awaitable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import cocotb
from cocotb.task import Task, bridge, resume
from cocotb.triggers import ClockCycles, Event, First

from sim.clock import start_clock
from sim.stream import StreamDriver, StreamSink
from tb.scoreboard import InOrderScoreboard
from tb.traffic import EXAMPLES_VARIABLE, TRAFFIC_FILE, TRAFFIC_VARIABLE

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["Player", "beats_of_bits", "search"]

_DEFAULT_EXAMPLES = 100

Round = dict[str, Any]


class Player(Protocol):
    """What a bench has to offer: :class:`tb.unit_bench.UnitBench` and how its tensors are made."""

    dut: Any
    drivers: dict[str, StreamDriver]
    sink: StreamSink
    scoreboard: InOrderScoreboard
    latency: int

    def watch(self, guard: Any = None) -> None:
        """Start the monitors."""

    def unwatch(self) -> None:
        """Stop the monitors."""

    async def interrupt(self, tasks: list[Task[Any]], latency: int) -> None:
        """End tasks and reset the unit."""

    def tensors(self) -> "SearchStrategy[Any]":
        """Strategy of one tensor, as JSON."""

    def play(self, tensors: list[Any]) -> tuple[list[Task[Any]], int, int]:
        """Start sending tensors: tasks, words that go in, words that must come out."""


def beats_of_bits(size: int) -> "SearchStrategy[list[int]]":
    """Strategy of a tensor that is nothing but beats, each ``size`` bits, the lowest the first."""
    from hypothesis import strategies as st

    return st.lists(st.integers(0, (1 << size) - 1), min_size=1, max_size=6)


async def play(bench: Player, traffic: list[Round]) -> None:
    """Reset the unit, play all rounds, reset the unit.

    Raises
    ------
    AssertionError
        If a monitor or the scoreboard objects, or a round takes too long.
    """
    await bench.interrupt([], bench.latency)
    for one_round in traffic:
        errors: list[Exception] = []
        failed = Event()

        async def guard(
            work: Awaitable[None], errors: list[Exception] = errors, failed: Event = failed
        ) -> None:
            # An error in a task of its own would end the whole test, not this example.
            try:
                await work
            except Exception as error:
                errors.append(error)
                failed.set()

        stalls: dict[str, list[int]] = one_round["stalls"]
        for name, driver in bench.drivers.items():
            driver.stalls = itertools.chain(stalls[name], itertools.repeat(0))
        bench.sink.stalls = itertools.chain(stalls["o"], itertools.repeat(0))
        bench.watch(guard)
        checked = bench.scoreboard.checked
        tasks, words_in, words_out = bench.play(one_round["tensors"])
        taking = cocotb.start_soon(guard(bench.sink.run(words_out)))
        limit = 40 + sum(map(sum, stalls.values())) + 2 * words_in + words_out
        clocks = one_round["reset_after"]
        try:
            if clocks is not None:
                await First(failed.wait(), ClockCycles(bench.dut.clk, clocks))
            else:
                await First(failed.wait(), taking, ClockCycles(bench.dut.clk, limit))
                if not errors:
                    came = bench.scoreboard.checked - checked
                    assert taking.done(), f"{came} of {words_out} words came out in {limit} clocks"
                    await First(failed.wait(), ClockCycles(bench.dut.clk, bench.latency + 1))
                    assert not bench.dut.o__valid.value, "more comes out than went in"
                    bench.scoreboard.finish(checked + words_out)
            if errors:
                raise errors[0]
        except BaseException:
            clocks = 0
            raise
        finally:
            if clocks is None:
                bench.unwatch()
            else:
                await bench.interrupt([*tasks, taking], bench.latency)
    await bench.interrupt([], bench.latency)


def _strategy(bench: Player) -> "SearchStrategy[list[Round]]":
    from hypothesis import strategies as st

    pauses = st.lists(st.integers(0, 9), max_size=12)
    one_round = st.fixed_dictionaries(
        {
            "tensors": st.lists(bench.tensors(), max_size=4),
            "stalls": st.fixed_dictionaries({name: pauses for name in (*bench.drivers, "o")}),
            "reset_after": st.none() | st.integers(1, 80),
        }
    )
    return st.lists(one_round, min_size=1, max_size=3)


async def search(bench: Player, seed: int) -> None:
    """Play examples until one fails, and shrink that; or play what the environment has.

    Raises
    ------
    AssertionError
        With the smallest traffic that fails, which is also left in :data:`tb.traffic.TRAFFIC_FILE`.
    """
    start_clock(bench.dut)
    bench.dut.rst.value = 0
    given_traffic = os.environ.get(TRAFFIC_VARIABLE)
    if given_traffic:
        await play(bench, json.loads(given_traffic))
        return
    failure: tuple[list[Round], Exception] | None = None

    def generate() -> None:
        # Only here: a bench that plays given traffic, as a user may, does not need Hypothesis.
        import hypothesis

        def example(traffic: list[Round]) -> None:
            nonlocal failure
            try:
                resume(play)(bench, traffic)
            except Exception as error:
                failure = traffic, error
                raise

        settings = hypothesis.settings(
            max_examples=int(os.environ.get(EXAMPLES_VARIABLE, _DEFAULT_EXAMPLES)),
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
            verbosity=hypothesis.Verbosity.quiet,
        )
        hypothesis.seed(seed)(settings(hypothesis.given(_strategy(bench))(example)))()

    try:
        await bridge(generate)()
    except Exception as error:
        if failure is None:
            raise
        # Hypothesis ends with the smallest one.
        text = json.dumps(failure[0])
        Path(TRAFFIC_FILE).write_text(text)
        # Of an error that does not repeat it says so itself.
        reason = failure[1] if error is failure[1] else f"{failure[1]} ({error})"
        raise AssertionError(f"{reason}\nSmallest traffic: {text}") from error
