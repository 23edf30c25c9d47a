"""One unit under its own bench; what fails names the command that repeats it and its waveform.

``python -m tb.unit_run --help`` says how to repeat a failing case by hand.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from rtl.units import options_of, record_verilog
from sim.bench_config import Config
from sim.installed import SIMULATORS
from sim.simulator import Design, SimulationError, simulate
from tb.benches import BENCHES
from tb.traffic import (
    RANDOM_TRAFFIC,
    TRAFFIC_BENCH,
    TRAFFIC_FILE,
    TRAFFIC_VARIABLE,
    UNIT_VARIABLE,
)

__all__ = ["bench_of", "main", "run_unit"]


def bench_of(unit: str) -> str:
    """Module with the bench of a unit; several are separated by commas, as cocotb wants them."""
    return BENCHES[unit].module


def _verilog(unit: str, config: Config) -> tuple[str, str]:
    """Name and text of the top module."""
    return record_verilog(BENCHES[unit].unit, options_of(config.formats, **config.options))


def _simulate(
    unit: str, config: Config, simulator: str, build_root: Path, testcase: str,
    more: Mapping[str, str], *, waves: bool,
) -> Path:  # fmt: skip
    name, text = _verilog(unit, config)
    return simulate(
        Design(name, text, waves=waves, randomize=True),
        module=TRAFFIC_BENCH if testcase == RANDOM_TRAFFIC else bench_of(unit),
        simulator=simulator,
        build_root=build_root,
        environment={**config.as_environment(), UNIT_VARIABLE: unit, **more},
        testcase=testcase,
        seed=config.seed,
    )


def run_unit(
    unit: str,
    config: Config,
    simulator: str,
    build_root: Path,
    testcase: str = ".*",
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run the tests of a unit's bench.

    Parameters
    ----------
    unit : str
        One of :data:`tb.benches.BENCHES`.
    config : Config
        Of the class that its record names.
    simulator : str
        One of :data:`sim.installed.SIMULATORS`.
    build_root : Path
        Folder of all builds.
    testcase : str
        Regular expression of the tests to run, or :data:`tb.traffic.RANDOM_TRAFFIC`.
    environment : mapping of str to str, optional
        More variables for the bench.

    Raises
    ------
    SimulationError
        If a test fails. It is run once more then, recording; the message ends with the waveform and
        the command that repeats it. Of random traffic only the smallest that fails is repeated.
    """
    more = dict(environment or {})
    try:
        _simulate(unit, config, simulator, build_root, testcase, more, waves=False)
    except SimulationError as error:
        smallest = error.folder / TRAFFIC_FILE
        if smallest.exists():
            more[TRAFFIC_VARIABLE] = smallest.read_text()
            testcase = RANDOM_TRAFFIC
        command = ["python", "-m", "tb.unit_run", unit, f"'{config.as_json()}'"]
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


def main(arguments: list[str] | None = None) -> int:
    """Repeat one case from the command line; 1 if it fails."""
    parser = argparse.ArgumentParser(prog="python -m tb.unit_run", description=main.__doc__)
    parser.add_argument("unit", choices=BENCHES)
    parser.add_argument("config", help="fields of the bench's configuration, as JSON")
    parser.add_argument("--sim", choices=SIMULATORS, default=SIMULATORS[0])
    parser.add_argument("--testcase", default=".*", help="regular expression of the tests to run")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--build", type=Path, default=Path("build/sim"))
    options = parser.parse_args(arguments)
    config = BENCHES[options.unit].config(**json.loads(options.config))
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
