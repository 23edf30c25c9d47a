"""Wrong versions of the RTL, to show that a bench can fail.

A fault replaces one piece of source text, which must occur exactly once, so that a fault cannot
silently stop being one.
"""

import importlib
import importlib.abc
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from sim.bench_config import Config
from sim.installed import quickest_simulator
from sim.simulator import Design, simulate
from tb.unit_run import bench_of

__all__ = [
    "FIRST_FAILURE",
    "NOTICED",
    "Fault",
    "changed_module",
    "faulty_verilog",
    "run_with_fault",
]

FIRST_FAILURE = {"COCOTB_MAX_FAILURES": "1"}
"""Environment of a simulation that need not go on after a test has failed."""

NOTICED = "AssertionError|SimTimeoutError|FAILED"
"""What a log says where a bench has noticed a fault; other errors are those of a broken build."""


@dataclass(frozen=True)
class Fault:
    """One wrong version, and the traffic that has to show it.

    Parameters
    ----------
    name : str
        What is wrong.
    unit : str
        One of :data:`tb.benches.BENCHES`.
    module : str
        Module of :mod:`rtl` whose text is changed.
    old, new : str
        Text and what it becomes.
    config : Config
    testcase : str
        Regular expression of the tests of the bench to run.
    environment : mapping of str to str
        More variables for the bench.
    """

    name: str
    unit: str
    module: str
    old: str
    new: str
    config: Config
    testcase: str = ".*"
    environment: Mapping[str, str] = field(default_factory=dict, hash=False)


class _Replaced(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one module and gives it another source text."""

    def __init__(self, module: str, source: str, origin: str) -> None:
        self.module, self.source, self.origin = module, source, origin

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Claim that module only."""
        return ModuleSpec(name, self, origin=self.origin) if name == self.module else None

    def create_module(self, spec: ModuleSpec) -> None:
        """As usual."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the other text."""
        exec(compile(self.source, self.origin, "exec"), vars(module))


@contextmanager
def _fresh_rtl(module: str, source: str, origin: str) -> Iterator[None]:
    """Import :mod:`rtl` anew inside, with one module replaced; nothing is left of it outside."""

    def known() -> dict[str, ModuleType]:
        return {name: part for name, part in sys.modules.items() if name.split(".")[0] == "rtl"}

    before = known()
    finder = _Replaced(module, source, origin)
    for name in before:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in known():
            del sys.modules[name]
        sys.modules.update(before)


def _changed(source: str, old: str, new: str) -> str:
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
    return source.replace(old, new)


def changed_module(
    module: ModuleType, old: str, new: str, *, part: ModuleType | None = None
) -> ModuleType:
    """A copy of a module with one piece of source text replaced.

    Parameters
    ----------
    module : module
    old, new : str
        Text and what it becomes.
    part : module, optional
        Where the text is, if not in ``module`` itself: what that imports from it is replaced too.

    Raises
    ------
    AssertionError
        If the text does not occur exactly once.
    """
    changed, source = ModuleType("rtl.faulty"), inspect.getsource(module)
    if part is None:
        source = _changed(source, old, new)
    exec(compile(source, module.__file__ or "", "exec"), vars(changed))
    if part is not None:
        faulty = vars(changed_module(part, old, new))
        names = vars(changed).keys() & set(part.__all__)
        assert names, f"{module.__name__} imports nothing from {part.__name__}"
        vars(changed).update({name: faulty[name] for name in names})
    return changed


def faulty_verilog(fault: Fault, *, broken: bool) -> str:
    """Verilog of the unit, made from the source text with or without the fault."""
    module = f"rtl.{fault.module}"
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    if broken:
        source = _changed(source, fault.old, fault.new)
    config = fault.config
    with _fresh_rtl(module, source, spec.origin):
        units = importlib.import_module("rtl.units")
        record = getattr(units, fault.unit.upper())
        unit = record.build(units.options_of(config.formats, **config.options))
        text: str = importlib.import_module("rtl.verilog").to_verilog(unit, _top(fault))
    return text


def _top(fault: Fault) -> str:
    return f"{fault.unit}_under_test"


def run_with_fault(fault: Fault, build_root: Path, *, broken: bool) -> None:
    """Run the bench on the unit with or without the fault.

    Raises
    ------
    SimulationError
        If a test fails.
    """
    simulate(
        Design(_top(fault), faulty_verilog(fault, broken=broken), randomize=True),
        module=bench_of(fault.unit),
        simulator=quickest_simulator(),
        build_root=build_root,
        environment={**fault.config.as_environment(), **fault.environment, **FIRST_FAILURE},
        testcase=fault.testcase,
        seed=fault.config.seed,
    )
