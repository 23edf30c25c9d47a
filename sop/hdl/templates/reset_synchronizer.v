// Active low, asserted at any time, released with the clock: aresetn of AXI to rst.
module reset_synchronizer (
    input  wire clk,
    input  wire aresetn,
    output wire rst
);
  (* ASYNC_REG = "TRUE" *) reg [1:0] stages;
  always @(posedge clk or negedge aresetn)
    if (!aresetn) stages <= 2'b00;
    else stages <= {stages[0], 1'b1};
  assign rst = ~stages[1];
endmodule
