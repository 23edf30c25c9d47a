"""The ``sop`` command.

Exit codes: 0 success; 1 the hardware differs from the golden model, or two checkpoints differ;
2 bad input or usage, or a file or standard output that cannot be written; 3 a tool or a worker
failed, or there is a bug in this program; 141 whoever read standard output went away; 128 + n ended
by signal n.
"""

import signal
import sys
import traceback
import warnings
from typing import Annotated

import typer
from amaranth.hdl import UnusedElaboratable

from golden.errors import InputError
from sim.simulator import SimulationError
from sop import __version__
from sop.commands.calibrate import calibrate
from sop.commands.compare import compare
from sop.commands.datasheet import datasheet
from sop.commands.decode import decode
from sop.commands.diff import diff
from sop.commands.eval import eval_command
from sop.commands.export import export
from sop.commands.formats import formats
from sop.commands.inspect import inspect
from sop.commands.paper import paper
from sop.commands.quantize import quantize
from sop.commands.report import report
from sop.commands.sim import sim
from sop.commands.sim_matmul import sim_matmul
from sop.commands.sim_model import sim_model
from sop.commands.synth import synth
from sop.commands.vectors import vectors
from sop.commands.verilog import verilog
from sop.hdl.synthesis import SynthesisError
from sop.quantizing.workers import WorkerError
from sop.shared.console import EXIT_BAD_INPUT, EXIT_INTERNAL, EXIT_READER_GONE
from sop.shared.ending import Ended, end_by_signal, raise_on_signals
from sop.shared.streams import StreamError, drop_output, prepare_streams

__all__ = ["main"]

app = typer.Typer(
    help="Scaled outer product: LLM quantization for lookup-table hardware, proven bit by bit.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for command in (
    formats,
    calibrate,
    quantize,
    paper,
    verilog,
    datasheet,
    synth,
    vectors,
    sim,
    sim_model,
    sim_matmul,
    report,
    inspect,
    compare,
    diff,
    decode,
    export,
):
    app.command()(command)
app.command("eval")(eval_command)  # a function called `eval` would hide that of Python


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"scaled-outer-product {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Scaled outer product: LLM quantization for lookup-table hardware, proven bit by bit."""


def _run() -> None:
    try:
        app()
    except Ended:
        raise  # at once, without what was still to be printed
    except BaseException:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def main() -> None:
    """Run the command line; entry point of ``sop``."""
    prepare_streams()
    # A component that is only looked at, for its ports, is no mistake of the user.
    warnings.simplefilter("ignore", UnusedElaboratable)
    try:
        with raise_on_signals():
            _run()
    except Ended as ended:
        print(f"sop: ended by {signal.Signals(ended.number).name}", file=sys.stderr)
        drop_output()
        end_by_signal(ended.number)
    except StreamError as error:
        drop_output()
        if error.reader_gone:
            sys.exit(EXIT_READER_GONE)
        print(f"sop: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except (InputError, OSError) as error:
        print(f"sop: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except (SimulationError, SynthesisError, WorkerError) as error:
        print(f"sop: {error}", file=sys.stderr)
        sys.exit(EXIT_INTERNAL)
    except Exception:
        traceback.print_exc()
        print("sop: this is a bug in the program; please report it", file=sys.stderr)
        sys.exit(EXIT_INTERNAL)


if __name__ == "__main__":
    main()
