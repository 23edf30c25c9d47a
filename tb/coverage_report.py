"""The report on functional coverage, and the simulations that fill it.

``python -m tb.coverage_report FOLDER`` merges the counts that simulations left in a folder and
fails if a declared bin is empty; with ``--run`` it makes those of
:data:`tb.coverage_runs.RUNS` first.
"""

import argparse
import json
import sys
from pathlib import Path

from golden.new_file import new_file
from tb.coverage import BINS, declared_table, empty_bins, markdown, merge
from tb.coverage_runs import run_all

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Merge counts and print the table; 1 if a declared bin is empty, which is named."""
    parser = argparse.ArgumentParser(prog="python -m tb.coverage_report", description=main.__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/coverage"))
    parser.add_argument("--bins", action="store_true", help="print the declared bins, nothing else")
    parser.add_argument("--run", action="store_true", help="first run the simulations")
    parser.add_argument("--build", type=Path, default=Path("build/sim"), help="folder of builds")
    parser.add_argument("--json", type=Path, help="also write all counts into this file")
    options = parser.parse_args(arguments)
    if options.bins:
        print(declared_table(), end="")
        return 0
    if options.run:
        for path in options.folder.glob("counts_*.json"):
            path.unlink()
        run_all(options.folder, options.build)
    total = merge(options.folder)
    print(markdown(total))
    if options.json:
        table = {group: {name: total[group, name] for name in bins} for group, bins in BINS.items()}
        with new_file(options.json) as file:
            file.write((json.dumps(table, indent=1) + "\n").encode())
    empty = empty_bins(total)
    for name in empty:
        print(f"empty bin: {name}", file=sys.stderr)
    return int(bool(empty))


if __name__ == "__main__":
    sys.exit(main())
