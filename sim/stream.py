"""Cocotb driver, sink and monitor for Amaranth streams (payload, valid, ready).

All three work on the rising clock edge: what they read right after it are the values from before
the edge, that is, what the registers saw.
"""

from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

import cocotb
from cocotb.task import Task
from cocotb.triggers import RisingEdge
from cocotb.types import LogicArray

from sim.stalls import no_stalls

__all__ = ["StreamDriver", "StreamMonitor", "StreamPins", "StreamSink", "defined"]


def defined(value: Any) -> bool:
    """Whether every bit of what a pin shows is 0 or 1.

    cocotb's own answer makes an object of each bit, in every clock of every monitor.
    """
    return not str(value).strip("01")


class StreamPins:
    """The three signals of one stream port.

    Parameters
    ----------
    dut : simulation handle
        The top module.
    name : str
        Name of the stream port, such as ``"i"`` or ``"i_lut"``.
    clock : simulation handle
        Clock of the stream.
    """

    def __init__(self, dut: Any, name: str, clock: Any) -> None:
        self.name = name
        self.edge = RisingEdge(clock)
        self.payload = getattr(dut, f"{name}__payload")
        self.valid = getattr(dut, f"{name}__valid")
        self.ready = getattr(dut, f"{name}__ready")


class StreamDriver:
    """Sends words; once offered, a word stays until it is taken (stream rule 2).

    With ``undefined`` the payload is undefined whenever no word is offered (Icarus only).
    """

    def __init__(
        self, pins: StreamPins, stalls: Iterator[int] | None = None, *, undefined: bool = False
    ) -> None:
        self.pins = pins
        self.stalls = stalls or no_stalls()
        self.undefined = undefined
        self.rest()

    def rest(self) -> None:
        """Offer no word."""
        self.pins.valid.value = 0
        if self.undefined:
            self.pins.payload.value = LogicArray("X" * len(self.pins.payload))

    async def send(self, words: Iterable[int]) -> None:
        """Send every word; returns at the edge that takes the last one."""
        pins = self.pins
        for word in words:
            idle = next(self.stalls)
            if idle:
                self.rest()
                for _ in range(idle):
                    await pins.edge
            pins.payload.value = word
            pins.valid.value = 1
            await pins.edge
            while not pins.ready.value:
                await pins.edge
        self.rest()


class StreamSink:
    """Takes words and keeps them as integers in ``words``.

    Raises an error out of :meth:`run` if a payload holds an undefined bit.
    """

    def __init__(self, pins: StreamPins, stalls: Iterator[int] | None = None) -> None:
        self.pins = pins
        self.stalls = stalls or no_stalls()
        self.words: list[int] = []
        pins.ready.value = 0

    async def run(self, count: int) -> None:
        """Take ``count`` words, then stop being ready."""
        pins = self.pins
        wanted = len(self.words) + count
        while len(self.words) < wanted:
            idle = next(self.stalls)
            if idle:
                pins.ready.value = 0
                for _ in range(idle):
                    await pins.edge
            pins.ready.value = 1
            await pins.edge
            while not pins.valid.value:
                await pins.edge
            self.words.append(pins.payload.value.to_unsigned())
        pins.ready.value = 0


class StreamMonitor:
    """Watches a stream, reports every transfer, and checks what must always hold.

    An offered word does not change, it has no undefined bit, and neither ``valid`` nor ``ready`` is
    ever undefined.

    Parameters
    ----------
    pins : StreamPins
    on_transfer : callable, optional
        Called with each transferred word.

    Attributes
    ----------
    on_clock : callable, optional
        Called with ``valid`` and ``ready`` of every clock edge, before ``on_transfer``.
    """

    def __init__(self, pins: StreamPins, on_transfer: Callable[[int], None] | None = None) -> None:
        self.pins = pins
        self.on_transfer = on_transfer
        self.on_clock: Callable[[bool, bool], None] | None = None
        self.transfers: list[int] = []
        """Clock edge, counted from the start, of every transfer."""
        self.task: Task[None] | None = None

    def start(self, guard: Callable[[Awaitable[None]], Any] | None = None) -> None:
        """Watch from the next clock edge on; ``guard`` may wrap the coroutine that does."""
        watch = self._watch()
        self.task = cocotb.start_soon(guard(watch) if guard else watch)

    def stop(self) -> None:
        """Stop watching; a word that waits is forgotten."""
        if self.task is not None:
            self.task.cancel()
            self.task = None

    async def _watch(self) -> None:
        pins, edge = self.pins, 0
        waiting: int | None = None
        while True:
            await pins.edge
            edge += 1
            valid, ready = pins.valid.value, pins.ready.value
            assert defined(valid), f"{pins.name}: valid is {valid} at edge {edge}"
            assert defined(ready), f"{pins.name}: ready is {ready} at edge {edge}"
            if self.on_clock is not None:
                self.on_clock(bool(valid), bool(ready))
            if not valid:
                assert waiting is None, (
                    f"{pins.name}: word withdrawn at edge {edge} before transfer"
                )
                continue
            payload = pins.payload.value
            assert defined(payload), f"{pins.name}: payload is {payload} at edge {edge}"
            word = payload.to_unsigned()
            assert waiting is None or waiting == word, (
                f"{pins.name}: word changed from {waiting:#x} to {word:#x} at edge {edge} "
                "before transfer"
            )
            waiting = word
            if ready:
                waiting = None
                self.transfers.append(edge)
                if self.on_transfer is not None:
                    self.on_transfer(word)
