"""Cocotb bench of random traffic for every unit that has a bench of its own."""

from typing import Any

import cocotb

from tb import (
    float_to_hif_bench,
    hif_to_float_bench,
    lut_decoder_bench,
    sop_tile_bench,
    sparse_merge_bench,
)
from tb.bench import BenchConfig
from tb.float_to_hif_bench import ConverterConfig
from tb.shrink import Player, search
from tb.tile_config import TileConfig

__all__ = ["random_traffic"]


def _bench(dut: Any) -> tuple[Player, int, int]:
    """Bench of a unit, told by the name of its module, with seed and latency."""
    name = dut._name
    if name.startswith("float_to_hif"):
        converter = ConverterConfig.from_environment()
        bench: Player = float_to_hif_bench.FloatToHifBench(dut, converter)
        return bench, converter.seed, float_to_hif_bench.FloatToHifBench.latency
    if name.startswith("sop_tile"):
        tile = TileConfig.from_environment()
        return sop_tile_bench.SopTileBench(dut, tile), tile.seed, sop_tile_bench.DRAINED
    config = BenchConfig.from_environment()
    if name.startswith("lut_decoder"):
        bench = lut_decoder_bench.LutDecoderBench(dut, config)
        return bench, config.seed, lut_decoder_bench.LATENCY
    if name.startswith("hif_to_float"):
        bench = hif_to_float_bench.HifToFloatBench(dut, config)
        return bench, config.seed, hif_to_float_bench.HifToFloatBench.latency
    assert name.startswith("sparse_merge"), name
    bench = sparse_merge_bench.SparseMergeBench(dut, config)
    return bench, config.seed, sparse_merge_bench.LATENCY[config.output]


@cocotb.test()
async def random_traffic(dut: Any) -> None:
    """Tensors, stalls and resets that Hypothesis chooses, and shrinks if something is wrong."""
    await search(*_bench(dut))
