"""``sop verilog``: the files that describe one hardware unit, and writing them."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from golden.hashing import file_sha256, text_sha256
from golden.notation import QuantFormat
from rtl.units import options_of
from rtl.verilog import to_verilog
from sop.hdl.description import GENERATOR, describe
from sop.hdl.packaging import (
    fusesoc_core,
    librelane_config,
    lint_waivers,
    litex_module,
    timing_constraints,
    verilog_header,
)
from sop.hdl.register_map import c_header, register_markdown, register_table
from sop.hdl.rules import rules_file
from sop.hdl.testbench import require_testbench, testbench_files
from sop.shared.output import Kind, locked_folder, output_folder, write_files

__all__ = ["verilog_files", "write_verilog_files"]


def verilog_files(
    unit: str,
    formats: QuantFormat | Sequence[QuantFormat],
    *,
    testbench: bool = False,
    **options: Any,
) -> dict[str, str]:
    """Verilog and everything that comes with it, by file name.

    ``.v`` Verilog-2005; ``.vlt`` lint waivers; ``.core`` for FuseSoC; ``_litex.py`` for LiteX;
    ``.librelane.yaml`` for LibreLane; ``.sdc`` timing constraints; of a unit with registers
    ``_rules.sv``, its handshake rules as assertions, ``.h`` and ``_registers.md``, the
    register map for C and for people; with ``testbench`` ``_tb.v`` and the ``_tb_*.hex`` that it
    reads; ``.json``, last, the description of ports, parameters and
    timing with the SHA-256 of every other file.

    Parameters
    ----------
    unit, formats, **options
        As :func:`rtl.units.build_unit`.
    testbench : bool
        Whether to add a testbench in Verilog.

    Raises
    ------
    InputError
        If the unit cannot be built, or there is no testbench for it.
    """
    if testbench:
        require_testbench(unit)
    component, description = describe(unit, formats, **options)
    bench: dict[str, str] = {}
    if testbench:
        chosen = options_of(formats, **options)
        bench = testbench_files(component, description, chosen.formats, chosen.output)
    name = description["module"]
    body = to_verilog(component, name)
    files = {
        f"{name}.v": verilog_header(description, text_sha256(body)) + body,
        f"{name}.vlt": lint_waivers(name),
        f"{name}.core": fusesoc_core(description, list(bench)),
        f"{name}_litex.py": litex_module(description),
        f"{name}.librelane.yaml": librelane_config(description),
        f"{name}.sdc": timing_constraints(description),
    }
    if "lut_window" in description:
        files[f"{name}_rules.sv"] = rules_file(description)
        files[f"{name}.h"] = c_header(description)
        files[f"{name}_registers.md"] = register_markdown(description)
        description["registers"] = register_table()
    files |= bench
    description["files"] = {file: text_sha256(text) for file, text in files.items()}
    return {**files, f"{name}.json": json.dumps(description, indent=2) + "\n"}


def write_verilog_files(
    folder: Path,
    files: dict[str, str],
    inputs: Iterable[Path | None] = (),
    *,
    force: bool = False,
) -> list[Path]:
    """Write the files of one or more units, unless that would lose somebody's work.

    Parameters
    ----------
    folder : Path
        Created if missing.
    files : dict of str to str
        As :func:`verilog_files` gives them.
    inputs : iterable of Path or None
        Files that are read, which are never replaced.
    force : bool
        Replace files that the generator did not write, too.

    Returns
    -------
    paths : list of Path
        In the order given.

    Raises
    ------
    InputError
        If a file is there that the generator did not write or that was edited since; nothing is
        written then.
    """
    given = list(inputs)
    with locked_folder(folder):
        known = _written_before(folder, files)
        for name, text in files.items():
            kind = _own(text_sha256(text), known.get(name))
            output_folder(folder, [name], kind, given, force=force)
        return write_files(folder, files)


def _own(*digests: str | None) -> Kind:
    """Files whose SHA-256 is one of these."""

    def made_here(path: Path) -> bool:
        return file_sha256(path) in digests

    return Kind("a file of `sop verilog`, or has been changed since", made_here)


def _written_before(folder: Path, files: dict[str, str]) -> dict[str, str]:
    """SHA-256 of the files that descriptions in the folder say the generator wrote."""
    known: dict[str, str] = {}
    for name in files:
        if not name.endswith(".json"):
            continue
        raw = _read(folder / name)
        description = _as_description(raw)
        if description is not None:
            known |= description["files"]
            known[name] = hashlib.sha256(raw).hexdigest()
    return known


def _read(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _as_description(raw: bytes) -> dict[str, Any] | None:
    """The description that the bytes hold, if a version of this generator wrote them."""
    try:
        value = json.loads(raw)
    except ValueError:
        return None
    product = GENERATOR.split()[0]
    if not isinstance(value, dict) or not str(value.get("generator")).startswith(f"{product} "):
        return None
    return value if isinstance(value.get("files"), dict) else None
