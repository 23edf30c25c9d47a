"""The components: arguments that they refuse, choices by mode, and what their docstrings say."""

import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Callable
from typing import Any

import pytest
from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value
from amaranth.lib import wiring
from amaranth.sim import Simulator

import rtl
from golden.errors import InputError
from golden.formats import E2M3, HIF7, HIF8T, INT8, UE8M0
from golden.notation import parse_format
from rtl.float_decoder import FloatDecoder
from rtl.hif_to_float import HifToFloat
from rtl.layouts import FLOAT32
from rtl.lut_decoder import LutDecoder
from rtl.matmul_tile import MatmulTile
from rtl.modes import Modes, by_mode, check_lanes
from rtl.sop_decoder_axi import SopDecoderAxi
from rtl.sparse_decoder import SparseDecoder
from rtl.units import build_unit

# --- arguments ------------------------------------------------------------------------------------

MODES = Modes((parse_format("NF4sUE4M4"),))
COMPONENTS: dict[str, type[wiring.Component]] = {
    "LutDecoder": LutDecoder, "HifToFloat": HifToFloat, "FloatDecoder": FloatDecoder,
    "SparseDecoder": SparseDecoder, "SopDecoderAxi": SopDecoderAxi,
}  # fmt: skip
# Arguments of every component; each takes those that it knows.
ARGUMENTS: dict[str, Any] = {
    "lanes": 16, "modes": MODES, "float_layout": FLOAT32, "source": E2M3, "hif": HIF7,
    "lookup": "one_hot", "shift": None, "shape": 8, "width": 32, "sizes": (12, 16), "slots": 2,
    "address_bits": 12, "rows": 4, "columns": 3, "block_size": 16, "weight": HIF7,
    "activation": INT8, "weight_scale": UE8M0, "activation_scale": UE8M0,
    "multiplier": "shift_product", "weights": MODES.formats[0], "row_scales": True,
}  # fmt: skip
ROW_SCALES = {"modes": Modes((parse_format("NF4-BOF4sRS1E2M4"),))}
"""Where ports exist with row scales only."""


def make(component: type[wiring.Component], **changes: Any) -> wiring.Component:
    known = inspect.signature(component).parameters
    unknown = set(known) - set(ARGUMENTS)
    assert not unknown, f"give {component.__name__}'s {sorted(unknown)} a value in ARGUMENTS"
    values = ARGUMENTS | changes
    return component(**{name: values[name] for name in known})


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("lanes", [0, -16, 4, 24, 520, 528])
def test_wrong_lanes(component: str, lanes: int) -> None:
    pattern = f"lanes must be a multiple or a divisor of the block size 16, 8 to 512, not {lanes}"
    with pytest.raises(ValueError, match=pattern):
        make(COMPONENTS[component], lanes=lanes)


@pytest.mark.parametrize("block_size", [0, 4, 12, 128])
def test_wrong_block_size(block_size: int) -> None:
    pattern = re.escape(f"block_size must be one of (8, 16, 32, 64), not {block_size}")
    with pytest.raises(ValueError, match=pattern):
        check_lanes(512, block_size)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("", "a decoder has 1 to 16 formats, not 0"),
        ("NF4sUE4M4 NF4sUE4M4", "a format is given twice"),
        ("NF4sUE4M4 E4M3^0sUE8M0", "E4M3^0sUE8M0 has no blocks"),
    ],
)
def test_formats_that_no_decoder_has(names: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Modes(tuple(parse_format(name) for name in names.split()))


def test_every_product_fits_float32_exactly() -> None:
    widest = [parse_format(name) for name in ("E5M6sBF16", "INT8sBF16", "NF4sRBF16")]
    assert Modes(tuple(widest)).product_bits == 23


# Two signals of one name, and what is the same expression twice only if they were one.
FIRST, SECOND = Signal(4, name="same"), Signal(4, name="same")
ALIKE: dict[str, Callable[[Value], Value]] = {
    "signal": lambda signal: signal,
    "slice": lambda signal: signal[1:3],
    "sum": lambda signal: signal + 1,
    "concatenation": lambda signal: Cat(signal, Const(1, 2)),
    "choice": lambda signal: Mux(signal[0], signal, 3),
}


def values_by_mode(result: Value, mode: Signal) -> list[int]:
    """What an expression is for mode 0 and 1, with 5 and 10 on the signals."""
    found = []

    async def bench(context: Any) -> None:
        context.set(FIRST, 5)
        context.set(SECOND, 10)
        for value in (0, 1):
            context.set(mode, value)
            found.append(context.get(result))

    simulator = Simulator(Module())
    simulator.add_testbench(bench)
    simulator.run()
    return found


@pytest.mark.parametrize("kind", ALIKE)
def test_choice_by_mode_tells_signals_of_one_name(kind: str) -> None:
    of, mode = ALIKE[kind], Signal()
    expected = [values_by_mode(of(signal), Signal())[0] for signal in (FIRST, SECOND)]
    assert expected[0] != expected[1]
    assert values_by_mode(by_mode(mode, [of(FIRST), of(SECOND)]), mode) == expected


@pytest.mark.parametrize("kind", ALIKE)
def test_choice_by_mode_costs_nothing_between_equals(kind: str) -> None:
    of, mode = ALIKE[kind], Signal()
    assert "mode" not in repr(by_mode(mode, [of(FIRST), of(FIRST)]))
    assert "mode" in repr(by_mode(mode, [of(FIRST), of(SECOND)]))


def test_one_format_of_lut_entries() -> None:
    with pytest.raises(ValueError, match="the same format of LUT entries"):
        Modes((parse_format("NF4sUE4M4", HIF7), parse_format("DD5sUE4M4", HIF8T)))


@pytest.mark.parametrize(
    "component", ["HifToFloat", "FloatDecoder", "SparseDecoder", "SopDecoderAxi"]
)
def test_wrong_float_layout(component: str) -> None:
    with pytest.raises(ValueError, match="float_layout must be FLOAT32 or BFLOAT16, not"):
        make(COMPONENTS[component], float_layout=HIF7)


@pytest.mark.parametrize(
    ("unit", "name", "lanes", "output", "message"),
    [
        ("decoder", "NF4sUE4M4", 16, "float32", "unknown unit 'decoder': units are lut_decoder, "),
        ("lut_decoder", "NF4sUE4M4", 16, "float16", "unknown output 'float16': outputs are "),
        ("lut_decoder", "E2M3^0sUE4M4", 16, "float32", "has no blocks; the hardware takes block"),
        ("lut_decoder", "NF4sUE4M4", 24, "float32", "lut_decoder for NF4sUE4M4: lanes must be"),
        ("hif_to_float", "NF4sUE4M4", 24, "float32", "hif_to_float for NF4sUE4M4: lanes must be"),
        ("float_decoder", "NF4sUE4M4", 24, "float32", "float_decoder for NF4sUE4M4: lanes must be"),
    ],
    ids=["unit", "output", "blocks", "lut-lanes", "float-lanes", "decoder-lanes"],
)
def test_unit_that_cannot_be_built(
    unit: str, name: str, lanes: int, output: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build_unit(unit, parse_format(name), lanes=lanes, output=output)


# --- documentation of the components --------------------------------------------------------------


def all_components() -> list[type[wiring.Component]]:
    """Every public component that a module of ``rtl`` defines."""
    found = []
    for info in pkgutil.walk_packages(rtl.__path__, "rtl."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if not inspect.isclass(value) or name.startswith("_"):
                continue
            if issubclass(value, wiring.Component) and value.__module__ == info.name:
                found.append(value)
    return found


def section(component: type, title: str) -> str:
    """Text of one section of a NumPy-style docstring."""
    text = inspect.cleandoc(component.__doc__ or "")
    parts = re.split(r"^(\w+)\n-+$", text, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert title in sections, f"{component.__name__} has no section {title}"
    return sections[title]


def test_walk_finds_the_components() -> None:
    assert set(all_components()) >= set(COMPONENTS.values())


@pytest.mark.parametrize("component", all_components(), ids=lambda component: component.__name__)
def test_component_is_documented(component: type[wiring.Component]) -> None:
    parameters = list(inspect.signature(component).parameters.values())
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters)
    if parameters:
        text = section(component, "Parameters")
        lines = re.findall(r"^(\w[\w, ]*)(?: : .*)?$", text, re.MULTILINE)
        documented = [name for line in lines for name in line.split(", ")]
        assert documented == [parameter.name for parameter in parameters]

    changes = ROW_SCALES if component is MatmulTile else {}
    members = make(component, **changes).signature.members
    modules = [importlib.import_module(name) for name in ("rtl.layouts", component.__module__)]
    layouts = {name for module in modules for name in vars(module)} | set(ARGUMENTS)
    claimed = set()
    for names, flow, what in re.findall(
        r"^(\w[\w, ]*) : (In|Out)\((.+)\)\n    \S", section(component, "Members"), re.MULTILINE
    ):
        for name in names.split(", "):
            if name == "i_row_scales" and name not in members:  # no format here has them
                continue
            if what.startswith("AXI4"):  # one port for each signal; some interfaces are optional
                ports = {port for port in members if re.match(rf"{name}_[a-z]+$", port)}
                sent = {port for port in ports if re.search(r"_(t|aw|w|ar)valid$", port)}
                assert {members[port].flow.name for port in sent} <= {flow}
            else:
                ports = {name}
                assert members[name].flow.name == flow
                layout = re.fullmatch(r"stream\.Signature\((\w+)\)", what)
                assert bool(layout) == members[name].is_signature
                assert layout is None or layout[1] in layouts
            claimed |= ports
    assert claimed == set(members)
