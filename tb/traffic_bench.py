"""Cocotb bench of random traffic for every unit whose bench has a player of it."""

import importlib
import os
from typing import Any

import cocotb

from tb.benches import BENCHES
from tb.shrink import search
from tb.traffic import UNIT_VARIABLE

__all__ = ["random_traffic"]


@cocotb.test()
async def random_traffic(dut: Any) -> None:
    """Tensors, stalls and resets that Hypothesis chooses, and shrinks if something is wrong."""
    bench = BENCHES[os.environ[UNIT_VARIABLE]]
    config = bench.config.from_environment()
    player = getattr(importlib.import_module(bench.module), bench.player)
    await search(player(dut, config), config.seed)
