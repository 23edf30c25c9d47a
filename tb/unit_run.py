"""One unit under its own bench; what fails names the command that repeats it and its waveform.

``python -m tb.unit_run --help`` says how to repeat a failing case by hand.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from rtl.units import unit_verilog
from tb.bench import BenchConfig
from tb.simulator import SIMULATORS, Design, SimulationError, simulate

__all__ = ["main", "run_unit"]

# Units whose bench has another name.
_BENCHES = {"sop_decoder_axi": "tb.axi_bench"}


def _simulate(
    unit: str, config: BenchConfig, simulator: str, build_root: Path, testcase: str,
    more: Mapping[str, str], *, waves: bool,
) -> Path:  # fmt: skip
    name, text = unit_verilog(
        unit, config.formats, lanes=config.lanes, output=config.output, lookup=config.lookup
    )
    return simulate(
        Design(name, text, waves=waves, randomize=True),
        module=_BENCHES.get(unit, f"tb.{unit}_bench"),
        simulator=simulator,
        build_root=build_root,
        environment={**config.as_environment(), **more},
        testcase=testcase,
        seed=config.seed,
    )


def run_unit(
    unit: str,
    config: BenchConfig,
    simulator: str,
    build_root: Path,
    testcase: str = ".*",
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run the tests of a unit's bench.

    Parameters
    ----------
    unit : str
        One of :data:`rtl.units.UNITS` that has a bench.
    config : BenchConfig
    simulator : str
        One of :data:`tb.simulator.SIMULATORS`.
    build_root : Path
        Folder of all builds.
    testcase : str
        Regular expression of the tests to run.
    environment : mapping of str to str, optional
        More variables for the bench.

    Raises
    ------
    SimulationError
        If a test fails. It is run once more then, recording; the message ends with the waveform and
        the command that repeats it.
    """
    more = dict(environment or {})
    try:
        _simulate(unit, config, simulator, build_root, testcase, more, waves=False)
    except SimulationError as error:
        command = ["python", "-m", "tb.unit_run", unit, f"'{_as_json(config)}'"]
        command += ["--sim", simulator, "--testcase", f"'{testcase}'"]
        command += [f"--set '{name}={value}'" for name, value in more.items()]
        waveform = "none"
        try:
            _simulate(unit, config, simulator, build_root, testcase, more, waves=True)
        except SimulationError as again:
            found = [path for path in again.folder.glob("*.*") if path.suffix in (".fst", ".vcd")]
            waveform = str(found[0]) if found else "none"
        raise SimulationError(
            f"{error}\nWaveform: {waveform}\nRepeat with: {' '.join(command)}"
        ) from None


def _as_json(config: BenchConfig) -> str:
    return json.dumps(dataclasses.asdict(config))


def main(arguments: list[str] | None = None) -> int:
    """Repeat one case from the command line; 1 if it fails."""
    parser = argparse.ArgumentParser(prog="python -m tb.unit_run", description=main.__doc__)
    parser.add_argument("unit")
    parser.add_argument("config", help="fields of tb.bench.BenchConfig, as JSON")
    parser.add_argument("--sim", choices=SIMULATORS, default=SIMULATORS[0])
    parser.add_argument("--testcase", default=".*", help="regular expression of the tests to run")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--build", type=Path, default=Path("build/sim"))
    options = parser.parse_args(arguments)
    config = BenchConfig(**json.loads(options.config))
    more = dict(item.split("=", 1) for item in options.set)
    try:
        run_unit(options.unit, config, options.sim, options.build, options.testcase, more)
    except SimulationError as error:
        print(error, file=sys.stderr)
        return 1
    print("PASS")
    return 0


if __name__ == "__main__":
    sys.exit(main())
