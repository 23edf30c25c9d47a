"""The clock of every simulation, and its reset."""

from typing import Any

from cocotb.clock import Clock
from cocotb.triggers import ClockCycles, RisingEdge

__all__ = ["CLOCK_NS", "reset", "start_clock"]

CLOCK_NS = 10


def start_clock(dut: Any) -> None:
    """Start the clock."""
    Clock(dut.clk, CLOCK_NS, unit="ns").start()


async def reset(dut: Any, cycles: int = 2) -> None:
    """Hold the synchronous reset for some clock cycles; returns with reset released."""
    await RisingEdge(dut.clk)
    dut.rst.value = 1
    await ClockCycles(dut.clk, cycles)
    dut.rst.value = 0
