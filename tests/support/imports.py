"""What importing modules imports."""

import subprocess
import sys


def imported_by(*modules: str) -> set[str]:
    """Names of all modules that a fresh interpreter has loaded after importing these."""
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())
