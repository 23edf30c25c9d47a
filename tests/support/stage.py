"""A register stage in Verilog, to send words through and to break."""

import json
from pathlib import Path

from sim.simulator import Design, simulate
from tb.parts_bench import VARIABLE

WIDTH = 37  # neither a whole number of bytes nor of 32-bit words

STAGE = f"""\
module stage(clk, rst, i__payload, i__valid, i__ready, o__payload, o__valid, o__ready);
  input clk, rst, i__valid, o__ready;
  input [{WIDTH - 1}:0] i__payload;
  output i__ready, o__valid;
  output [{WIDTH - 1}:0] o__payload;
  reg full;
  reg [{WIDTH - 1}:0] word;
  assign i__ready = ~full | o__ready;
  assign o__valid = full;
  assign o__payload = word;
  always @(posedge clk)
    if (rst) full <= 1'b0;
    else if (i__valid & i__ready) begin
      full <= 1'b1;
      word <= i__payload;
    end else if (o__ready) full <= 1'b0;
endmodule
"""


def broken(old: str, new: str) -> str:
    assert STAGE.count(old) == 1, "the text to break must occur once"
    return STAGE.replace(old, new)


def run_stage(
    verilog: str,
    simulator: str,
    build_root: Path,
    *,
    test: str = "hand_through",
    stalls: str = "none",
) -> Path:
    return simulate(
        Design("stage", verilog),
        module="tb.parts_bench",
        simulator=simulator,
        build_root=build_root,
        environment={VARIABLE: json.dumps({"stalls": stalls, "seed": 3})},
        testcase=test,
    )
