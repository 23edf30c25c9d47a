"""Proofs without bound that an AXI decoder keeps the rules that are bound to it.

Yosys turns Verilog and rules into an and-inverter graph, and the ABC that comes with it searches
for an inductive invariant (property directed reachability). Both are in the package ``pyosys``.

What is inside the submodule ``core`` is cut out and its outputs may be anything in any clock: the
rules hold whatever the core does, and the proof does not grow with the number of lanes. Registers
start with any value; rules count from the first reset on.
"""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["YOSYS", "Proof", "prove", "with_rules"]

YOSYS = """\
import sys
from pyosys import libyosys
design = libyosys.Design()
for command in sys.argv[1:]:
    libyosys.run_pass(command, design)
"""

_TO_GATES = (
    "flatten", "async2sync", "chformal -lower", "setundef -anyseq -undriven", "delete -output",
    "opt_clean -purge", "opt -fast -nodffe -nosdff", "techmap", "dffunmap",
    "opt -fast -nodffe -nosdff", "aigmap",
)  # fmt: skip

_TIMEOUT_S = 600


@dataclass(frozen=True)
class Proof:
    """Result: whether no rule can be broken, how many there were, and what ABC printed."""

    proved: bool
    assertions: int
    log: str


def with_rules(verilog: str, module: str, rules: str, instance: str) -> str:
    """Verilog with the rules inside its top module, as ``bind`` puts them there.

    Yosys reads ``bind`` and does nothing.
    """
    end = verilog.index("endmodule", verilog.index(f"module {module}("))
    unbound, bind, _ = rules.partition("\nbind ")
    assert bind, "the rules are not bound to anything"
    return f"{verilog[:end]}{instance}{verilog[end:]}\n{unbound}"


def prove(design: str, module: str, folder: Path, rules: Sequence[str] = ()) -> Proof:
    """Prove the rules about what a decoder drives, or refute them.

    Parameters
    ----------
    design : str
        As :func:`with_rules` gives it.
    module : str
        The decoder, its top module.
    folder : Path
        For files in between.
    rules : sequence of str
        Names of the rules that count; none, all.

    Raises
    ------
    RuntimeError
        If a tool fails, or comes to no result.
    """
    (folder / "design.sv").write_text(design)
    kept = " ".join(f"c:*.{rule}" for rule in rules)
    printed = _run(
        [sys.executable, "-c", YOSYS,
         "read_verilog -formal -sv design.sv",
         f"hierarchy -check -top {module}", "proc -noopt", f"cutpoint {module}__core",
         "flatten",
         *([f"delete t:$check {kept} %d"] if rules else []),
         *_TO_GATES,
         "tee -o count.txt select -count t:$assert",
         "write_aiger -zinit design.aig"],
        folder,
    )  # fmt: skip
    counted = re.search(r"^(\d+) objects", (folder / "count.txt").read_text())
    if counted is None:
        raise RuntimeError(f"assertions were not counted: {printed[-2000:]}")
    log = _run([str(_abc()), "-c", "read_aiger design.aig; scorr; pdr"], folder)
    if not ("Property proved" in log) ^ ("was asserted in frame" in log):
        raise RuntimeError(f"no result: {log[-2000:]}")
    return Proof("Property proved" in log, int(counted[1]), log)


def _abc() -> Path:
    """ABC in the package of Yosys."""
    spec = importlib.util.find_spec("pyosys")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "yosys-abc"


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
    )
    printed = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {printed[-2000:]}")
    return printed
