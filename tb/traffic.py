"""Names by which :mod:`tb.shrink`, inside a simulation, and its caller exchange traffic."""

__all__ = [
    "EXAMPLES_VARIABLE",
    "RANDOM_TRAFFIC",
    "TRAFFIC_BENCH",
    "TRAFFIC_FILE",
    "TRAFFIC_VARIABLE",
    "UNIT_VARIABLE",
]

TRAFFIC_BENCH, RANDOM_TRAFFIC = "tb.traffic_bench", "random_traffic"
"""Bench of random traffic, and its one test."""

TRAFFIC_VARIABLE = "SOP_TRAFFIC"
"""Environment variable with traffic to play instead of random one, as JSON."""

TRAFFIC_FILE = "traffic.json"
"""Where the smallest traffic that fails is left, in the folder of the run."""

EXAMPLES_VARIABLE = "SOP_EXAMPLES"
"""Environment variable with the number of random examples."""

UNIT_VARIABLE = "SOP_UNIT"
"""Environment variable with the name of the unit that is simulated."""
