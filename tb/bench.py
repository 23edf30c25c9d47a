"""What every bench needs: its configuration from the environment, the clock, and reset."""

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any

from cocotb.clock import Clock
from cocotb.triggers import ClockCycles, RisingEdge

from golden.formats import HIF_FORMATS
from golden.notation import QuantFormat, parse_format
from rtl.lookup import DEFAULT_LOOKUP
from rtl.modes import Modes

__all__ = ["CLOCK_NS", "BenchConfig", "reset", "start_clock"]

CLOCK_NS = 10

_VARIABLE = "SOP_BENCH"


@dataclass(frozen=True)
class BenchConfig:
    """One configuration of a unit and of its traffic, passed to the bench as JSON.

    Parameters
    ----------
    format_name, hif_name : str
        Quantization formats, separated by spaces, and format of LUT entries.
    lanes : int
    output : str
        ``"float32"`` or ``"bfloat16"``.
    stalls : str
        One of :data:`tb.stalls.STALL_MODES`.
    seed : int
        Seed of the traffic and of the stalls.
    lookup : str
        One of :data:`rtl.lookup.LOOKUPS`.
    """

    format_name: str
    hif_name: str = "HIF7"
    lanes: int = 16
    output: str = "float32"
    stalls: str = "none"
    seed: int = 1
    lookup: str = DEFAULT_LOOKUP

    @property
    def formats(self) -> tuple[QuantFormat, ...]:
        """The parsed formats."""
        hif = HIF_FORMATS[self.hif_name]
        return tuple(parse_format(name, hif) for name in self.format_name.split())

    @property
    def modes(self) -> Modes:
        """The formats as the hardware sees them."""
        return Modes(self.formats)

    def as_environment(self) -> dict[str, str]:
        """Environment of the simulation."""
        return {_VARIABLE: json.dumps(dataclasses.asdict(self))}

    @staticmethod
    def from_environment() -> "BenchConfig":
        """Configuration of the running simulation."""
        return BenchConfig(**json.loads(os.environ[_VARIABLE]))


def start_clock(dut: Any) -> None:
    """Start the clock."""
    Clock(dut.clk, CLOCK_NS, unit="ns").start()


async def reset(dut: Any, cycles: int = 2) -> None:
    """Hold the synchronous reset for some clock cycles; returns with reset released."""
    await RisingEdge(dut.clk)
    dut.rst.value = 1
    await ClockCycles(dut.clk, cycles)
    dut.rst.value = 0
