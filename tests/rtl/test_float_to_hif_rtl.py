"""FloatToHif alone: every code, random traffic, other tools, and faults that must be noticed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from golden.errors import InputError
from golden.float_input import SOURCES
from golden.formats import E2M3, HIF7, HIF_FORMATS
from rtl.float_to_hif import FloatToHif
from sim.installed import available_simulators, quickest_simulator
from sim.stalls import STALL_MODES
from tb.faults import Fault
from tb.float_to_hif_bench import ConverterConfig
from tb.unit_run import run_unit


def run(config: ConverterConfig, simulator: str, build_root: Path, testcase: str) -> None:
    run_unit("float_to_hif", config, simulator, build_root, testcase)


def label(config: ConverterConfig) -> str:
    return config.name.removeprefix("float_to_hif_")


@pytest.mark.parametrize("hif_name", HIF_FORMATS)
@pytest.mark.parametrize("source_name", SOURCES)
def test_every_code(source_name: str, hif_name: str, build_root: Path) -> None:
    """One lane, so that the flags of every single code are seen; of bfloat16 in one format."""
    # Of 65,536 codes Verilator makes up for its longer build.
    simulator = available_simulators()[0 if source_name == "BF16" else -1]
    lanes = 8 if source_name == "BF16" and hif_name != "HIF7" else 1
    run(ConverterConfig(source_name, hif_name, lanes), simulator, build_root, "every_code")


@pytest.mark.parametrize(
    "config",
    [
        ConverterConfig("BF16", "HIF7", lanes=64),
        # Both ends of the shifts: everything small, or only the smallest values in range.
        ConverterConfig("BF16", "HIF8", 4, shift=-127),
        ConverterConfig("BF16", "HIF8T", 4, shift=140),
        ConverterConfig("E2M1", "HIF7", 1, shift=-2),
        ConverterConfig("E2M1", "HIF8", 1, shift=8),
        ConverterConfig("E2M3", "HIF8T", 1, shift=-2),
        ConverterConfig("E2M3", "HIF7", 1, shift=6),  # saturates in part
        ConverterConfig("E3M2", "HIF7", 1, shift=10),
        ConverterConfig("E4M3", "HIF8", 1, shift=-8),
        ConverterConfig("E4M3", "HIF7", 1, shift=15),
    ],
    ids=label,
)
def test_every_code_of_other_shapes(config: ConverterConfig, build_root: Path) -> None:
    run(config, quickest_simulator(), build_root, "every_code")


@pytest.mark.parametrize("stalls", STALL_MODES)
@pytest.mark.parametrize(
    "config",
    [
        ConverterConfig("E4M3", "HIF8", lanes=4, shift=1, seed=5),
        ConverterConfig("BF16", "HIF7", lanes=16, seed=5),
        ConverterConfig("E2M3", "HIF8T", lanes=1, shift=6, seed=5),
    ],
    ids=label,
)
def test_traffic(
    config: ConverterConfig, stalls: str, built_by_both: str, build_root: Path
) -> None:
    run(
        replace(config, stalls=stalls), built_by_both, build_root,
        "random_beats|fills_while_stalled|reset_in_mid_traffic",
    )  # fmt: skip


@pytest.mark.parametrize("lanes", [7, 128])
def test_full_rate_at_every_size(lanes: int, build_root: Path) -> None:
    config = ConverterConfig("E2M1", "HIF7", lanes, seed=6)
    run(config, quickest_simulator(), build_root, "random_beats")


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [0, -1, 513])
def test_wrong_lanes(lanes: int) -> None:
    with pytest.raises(ValueError, match=f"lanes must be 1 to 512, not {lanes}"):
        FloatToHif(lanes=lanes, source=E2M3, hif=HIF7)


def test_wrong_shift() -> None:
    with pytest.raises(InputError, match="shift from E2M3 to HIF7 must be -2 to 9, not 10"):
        FloatToHif(lanes=1, source=E2M3, hif=HIF7, shift=10)


# --- faults ---------------------------------------------------------------------------------------

SMALL = ConverterConfig("E4M3", "HIF8", lanes=4, shift=1, stalls="both", seed=3)
PARTLY = ConverterConfig("E2M3", "HIF7", lanes=4, shift=6, seed=3)
BFLOAT = ConverterConfig("BF16", "HIF7", lanes=4, stalls="both", seed=3)
# One lane: flags of neighbours hide nothing. The default shift: NaN is not beyond the end.
LONE = ConverterConfig("E4M3", "HIF8", lanes=1, seed=3)
LONE_BFLOAT = ConverterConfig("BF16", "HIF7", lanes=1, seed=3)

UNIT, PIPELINE, FIELDS = "float_to_hif", "parts.pipeline", "parts.float_fields"


def fault(name: str, old: str, new: str, config: ConverterConfig, module: str = UNIT) -> Fault:
    """A fault of the unit. Every code is sent in order, so arithmetic is met whatever the seed."""
    return Fault(name, UNIT, module, old, new, config)


FAULTS = (
    fault(
        "stage overwritten when stalled",
        "ready[-1].eq(~o.valid | o.ready)",
        "ready[-1].eq(1)",
        SMALL,
        PIPELINE,
    ),
    fault(
        "empty stage not filled",
        "ready[stage - 1].eq(~valid[stage] | ready[stage])",
        "ready[stage - 1].eq(ready[stage])",
        SMALL,
        PIPELINE,
    ),
    fault(
        "beat doubled after a stall",
        "with m.If(ready):",
        "with m.If(ready & self._valid[number]):",
        SMALL,
        PIPELINE,
    ),
    fault(
        "bubble after every beat",
        "i.ready.eq(~valid[0] | ready[0])",
        "i.ready.eq(~valid[0])",
        PARTLY,
        PIPELINE,
    ),
    fault(
        "reset keeps a beat",
        'Signal(name=f"valid_{stage}")',
        'Signal(name=f"valid_{stage}", reset_less=True)',
        SMALL,
        PIPELINE,
    ),
    fault("tie to the lower", "increment(kept, half, rest)", "half & rest", BFLOAT),
    fault("tie away from zero", "increment(kept, half, rest)", "half", BFLOAT),
    fault("truncated", "kept + up", "kept", SMALL),
    fault(
        "rest of the rounding lost", "value.halves[:step].any() | value.rest", "value.rest", BFLOAT
    ),
    fault("rest of the alignment lost", "result.rest.eq(rest.any())", "result.rest.eq(0)", BFLOAT),
    fault("far values wrap", "Mux(distance > width, width, steps)", "steps", BFLOAT),
    fault("large values wrap", "beyond |= (distance < 0) & ~nan", "pass", BFLOAT),
    fault("high end wraps", "value.beyond | (shift >= shifts)", "value.beyond", SMALL),
    fault("lowest value saturates", "value.shift - lower", "value.shift", PARTLY),
    fault(
        "ends exchanged",
        "Cat((~value.sign).replicate(bits), value.sign)",
        "Cat(value.sign.replicate(bits), ~value.sign)",
        PARTLY,
    ),
    fault("carry lost", "value.shift + carry", "value.shift", BFLOAT),
    fault(
        "code not canonical",
        "half_range & value.shift.any()",
        "half_range & (value.shift > 1)",
        BFLOAT,
    ),
    fault("zero made negative", "Mux(value.sign, negative, positive)", "negative", SMALL),
    fault(
        "subnormal taken as normal",
        "Cat(mantissa, exponent.any())",
        "Cat(mantissa, 1)",
        SMALL,
        FIELDS,
    ),
    fault(
        "exponent of subnormals one low",
        "exponent[0] | ~exponent.any()",
        "exponent[0]",
        PARTLY,
        FIELDS,
    ),
    fault(
        "NaN not zero",
        "Mux(nan, 0, float_fields.significand(code.mantissa, code.exponent))",
        "float_fields.significand(code.mantissa, code.exponent)",
        LONE,
    ),
    fault("NaN saturates", "(distance < 0) & ~nan", "(distance < 0)", BFLOAT),
    fault("infinity is a NaN", "top & code.mantissa.any(), top", "top, top", LONE_BFLOAT),
    fault(
        "nan of the first lane",
        "Cat(value.nan for value in rounded).any()",
        "rounded[0].nan",
        SMALL,
    ),
    fault("inexact without ends", "in rounded).any() | saturated", "in rounded).any()", PARTLY),
    fault(
        "inexact of the first lane",
        "Cat(value.inexact for value in rounded).any()",
        "rounded[0].inexact",
        BFLOAT,
    ),
    fault(
        "saturated of the first lane",
        "saturated = Cat(flag for _, flag in encoded).any()",
        "saturated = encoded[0][1]",
        SMALL,
    ),
    fault("last lost", "beat.last.eq(last[2])", "beat.last.eq(0)", SMALL),
    fault(
        "lanes in reverse order",
        "in enumerate(self.i.p.codes)",
        "in enumerate(list(self.i.p.codes)[::-1])",
        SMALL,
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_is_noticed(fault: Fault, noticed: Callable[[Fault], None]) -> None:
    noticed(fault)


@pytest.mark.parametrize("config", [SMALL, PARTLY, BFLOAT], ids=label)
def test_control_without_fault(config: ConverterConfig, build_root: Path) -> None:
    run(config, quickest_simulator(), build_root, ".*")
