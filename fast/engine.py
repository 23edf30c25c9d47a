"""The compiled engine."""

import golden.block_rounding
import golden.exact_products
import golden.factors
import golden.feedback
import golden.quantize
import golden.scaling
import golden.search
import golden.training
from fast import feedback, levels, search, training
from golden.engine import Engine

__all__ = ["FAST"]

FAST = Engine(
    "fast",
    {
        golden.search.lowest_sums: search.lowest_sums,
        golden.scaling.encode_with_codes: search.encode_with_codes,
        golden.quantize.nearest_levels: levels.nearest_levels,
        golden.training.cell_sums: training.cell_sums,
        golden.training.best_predecessors: training.best_predecessors,
        golden.exact_products.split: feedback.split,
        golden.exact_products.add_joined: feedback.add_joined,
        golden.exact_products.add_product: feedback.add_product,
        golden.feedback.weighted_sum: feedback.weighted_sum,
        golden.factors.eliminate: feedback.eliminate,
        golden.factors.solve: feedback.solve,
        golden.block_rounding.missed_by: feedback.missed_by,
        golden.block_rounding.round_in_turn: feedback.round_in_turn,
    },
)
"""Compiled loops in place of those of the golden quantizer."""
