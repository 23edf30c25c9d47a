"""The timing constraints: every port, and the flow of docs/synthesis.md that reads them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from golden.notation import parse_format
from rtl.units import UNITS
from sop.hdl.verilog_files import verilog_files
from tb.axi_proof import YOSYS

LISTS = re.compile(
    r"^set_(in|out)put_delay \$outside -clock clk \[get_ports \[list((?:.|\n)*?)\]\]$", re.MULTILINE
)

# As few cells as ABC takes.
GATES = {"BUF": "A", "NOT": "!A", "NAND": "!(A&B)", "NOR": "!(A|B)", "AND": "A&B"}


def gate(name: str, function: str) -> str:
    """A cell of the library, inputs as its function names them."""
    inputs = sorted(set(re.findall(r"[AB]", function)))
    pins = "".join(
        f"    pin ({pin}) {{ direction : input; capacitance : 0.001; }}\n" for pin in inputs
    )
    arcs = " ".join(f'timing () {{ related_pin : "{pin}"; @ARC@ }}' for pin in inputs)
    return f"""\
  cell ({name}) {{
    area : 2;
{pins}\
    pin (Y) {{ direction : output; function : "{function}"; {arcs} }}
  }}
"""


LIBERTY = """\
library (cells) {
  delay_model : table_lookup;
  time_unit : "1ns";
  capacitive_load_unit (1, pf);
  voltage_unit : "1V";
  current_unit : "1mA";
  leakage_power_unit : "1nW";
  pulling_resistance_unit : "1kohm";
  input_threshold_pct_rise : 50;
  input_threshold_pct_fall : 50;
  output_threshold_pct_rise : 50;
  output_threshold_pct_fall : 50;
  slew_lower_threshold_pct_rise : 20;
  slew_lower_threshold_pct_fall : 20;
  slew_upper_threshold_pct_rise : 80;
  slew_upper_threshold_pct_fall : 80;
  lu_table_template (table) {
    variable_1 : input_net_transition;
    variable_2 : total_output_net_capacitance;
    index_1 ("0.01, 1");
    index_2 ("0.001, 1");
  }
  lu_table_template (check) {
    variable_1 : related_pin_transition;
    variable_2 : constrained_pin_transition;
    index_1 ("0.01, 1");
    index_2 ("0.01, 1");
  }
@GATES@  cell (DFF) {
    area : 6;
    ff (IQ, IQN) { clocked_on : "C"; next_state : "D"; }
    pin (C) { direction : input; clock : true; capacitance : 0.001; }
    pin (D) { direction : input; capacitance : 0.001;
      timing () { related_pin : "C"; timing_type : setup_rising;
        rise_constraint (check) { values ("0.1, 0.1", "0.1, 0.1"); }
        fall_constraint (check) { values ("0.1, 0.1", "0.1, 0.1"); }
      }
    }
    pin (Q) { direction : output; function : "IQ";
      timing () { related_pin : "C"; timing_type : rising_edge; @ARC@ }
    }
  }
}
""".replace(
    "@GATES@",
    "".join(gate(name, function) for name, function in GATES.items()),
).replace(
    "@ARC@",
    "".join(
        f'{name} (table) {{ values ("0.05, 0.06", "0.05, 0.06"); }} '
        for name in ("cell_rise", "cell_fall", "rise_transition", "fall_transition")
    ),
)


@pytest.mark.parametrize("unit", UNITS)
def test_every_port_is_constrained_once(unit: str) -> None:
    files = verilog_files(unit, parse_format("NF4sUE4M4"), lanes=8, rows=2, columns=2)
    description = json.loads(files[next(name for name in files if name.endswith(".json"))])
    text = files[f"{description['module']}.sdc"]
    assert text.count("create_clock -name clk -period $period [get_ports clk]") == 1
    listed = {
        f"{direction}put": re.findall(r"\{(\w+)(\[\*\])?\}", names)
        for direction, names in LISTS.findall(text)
    }
    assert listed == {
        direction: [
            (port["name"], "[*]" if port["width"] > 1 else "")
            for port in description["ports"]
            if port["direction"] == direction and port["name"] != "clk"
        ]
        for direction in ("input", "output")
    }


SCRIPT = """\
read_liberty cells.lib
read_verilog netlist.v
link_design {module}
read_sdc {module}.sdc
puts "clocks: [llength [all_clocks]] ports: [llength [all_inputs]] [llength [all_outputs]]"
check_setup -verbose
report_checks -path_delay max
exit
"""


@pytest.mark.parametrize("mistake", ["", "{i__valid}"], ids=["right", "input left out"])
def test_documented_flow_reads_the_constraints(mistake: str, tmp_path: Path) -> None:
    """Yosys with a cell library, then OpenSTA: every endpoint has its constraint."""
    if shutil.which("sta") is None:
        pytest.skip("CONSTRAINTS NOT READ: OpenSTA is not installed")
    files = verilog_files("float_to_hif", parse_format("NF4sUE4M4"), lanes=2, output="float32",
                          source="E2M1")  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    module = next(name for name in files if name.endswith(".v")).removesuffix(".v")
    sdc = tmp_path / f"{module}.sdc"
    if mistake:
        sdc.write_text(sdc.read_text().replace(mistake, ""))
    (tmp_path / "cells.lib").write_text(LIBERTY)
    (tmp_path / "run.tcl").write_text(SCRIPT.format(module=module))
    commands = [
        f"read_verilog {module}.v", f"synth -flatten -top {module}",
        "dfflegalize -cell $_DFF_P_ x", "dfflibmap -liberty cells.lib", "abc -liberty cells.lib",
        "opt_clean -purge", "splitnets", "insbuf -buf BUF A Y",
            "write_verilog -noattr -noexpr netlist.v",
    ]  # fmt: skip
    subprocess.run([sys.executable, "-c", YOSYS, *commands], cwd=tmp_path, check=True,
                   capture_output=True)  # fmt: skip
    run = subprocess.run(["sta", "-exit", "run.tcl"], cwd=tmp_path, capture_output=True, text=True,
                         check=True)  # fmt: skip
    printed = run.stdout + run.stderr
    assert ("missing set_input_delay" in printed) == bool(mistake), printed
    assert "Error" not in printed
    assert "slack (MET)" in printed
