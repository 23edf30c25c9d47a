"""Run a program as on other processors: other kernels of BLAS, other vector extensions."""

import importlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import golden


def dispatched_features() -> str:
    """Vector extensions for which NumPy has code of its own and which this processor has."""
    numpy_core = importlib.import_module("numpy._core._multiarray_umath")
    present = numpy_core.__cpu_features__
    return " ".join(name for name in numpy_core.__cpu_dispatch__ if present[name])


ENVIRONMENTS = {
    "default": {},
    "Nehalem, 1 thread": {"OPENBLAS_CORETYPE": "Nehalem", "OPENBLAS_NUM_THREADS": "1"},
    "Haswell, 2 threads": {"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_NUM_THREADS": "2"},
    "Prescott, 2 threads, no vector extensions in NumPy": {
        "OPENBLAS_CORETYPE": "Prescott",
        "OPENBLAS_NUM_THREADS": "2",
        "NPY_DISABLE_CPU_FEATURES": dispatched_features(),
    },
}


def digests_by_environment(module: str) -> dict[str, dict[str, str]]:
    """The digests that a module prints as JSON in each of :data:`ENVIRONMENTS`."""

    def run(environment: dict[str, str]) -> dict[str, str]:
        done = subprocess.run(
            [sys.executable, "-m", module],
            capture_output=True, text=True, check=False, timeout=120,
            cwd=Path(golden.__file__).parent.parent, env=os.environ | environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        made: dict[str, str] = json.loads(done.stdout)
        return made

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ENVIRONMENTS, pool.map(run, ENVIRONMENTS.values()), strict=True))
