"""Where jobs run: in this process, in worker processes, or on a Dask cluster."""

import importlib
import os
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import joblib
from joblib.externals.loky import get_reusable_executor

from golden.engine import running_on
from golden.errors import InputError
from golden.extras import install_command
from sop.quantizing.engines import engine_named
from sop.shared.ending import end_with_parent

__all__ = ["ClusterError", "Job", "WorkerError", "Workers"]

_GROUP_SECONDS = 0.2


class ClusterError(InputError):
    """The cluster cannot be used; it says nothing about the jobs."""


class WorkerError(RuntimeError):
    """A worker process ended before its job did."""


@dataclass(frozen=True)
class Job:
    """A function of a module and its arguments, both picklable; the result is bytes."""

    function: Callable[..., bytes]
    arguments: tuple[Any, ...]

    def __call__(self) -> bytes:
        """Run it."""
        return self.function(*self.arguments)


Results = Generator[tuple[int, bytes], None, None]
"""Positions and results of jobs, in the order in which they end; to be closed when no more is
wanted, which ends the workers."""


def _numbered(position: int, job: Job, engine: str) -> tuple[int, bytes]:
    with running_on(engine_named(engine)):
        return position, job()


@dataclass(frozen=True)
class Workers:
    """Workers for independent jobs.

    Attributes
    ----------
    processes : int
        Processes on this machine; 1 is this process itself.
    dask : str or None
        Address of a Dask scheduler, such as ``"tcp://10.0.0.5:8786"``, in place of processes. Its
        workers need this package and the model's file under the same path.
    engine : str
        One of :data:`sop.quantizing.engines.ENGINES`; ``auto`` is decided where a job runs.
    """

    processes: int = 1
    dask: str | None = None
    engine: str = "auto"

    def run(self, jobs: Sequence[Job]) -> Results:
        """Yield position and result of every job as it ends (:data:`Results`).

        Raises
        ------
        InputError
            If a job raises one, the scheduler does not answer or Dask is not installed.
        WorkerError
            If a worker process ends before its job.
        """
        if self.dask is not None:
            yield from self._on_cluster(jobs, self.dask)
        elif self.processes == 1:
            for position, job in enumerate(jobs):
                yield _numbered(position, job, self.engine)
        else:
            yield from self._in_processes(jobs)

    def _in_processes(self, jobs: Sequence[Job]) -> Results:
        # One thread each: the workers share the processor already.
        with joblib.parallel_config(
            "loky",
            inner_max_num_threads=1,
            initializer=end_with_parent,
            initargs=(os.getpid(),),
            max_nbytes=None,  # arguments go through pipes, so that no files are shared
        ):
            parallel = joblib.Parallel(
                n_jobs=self.processes, return_as="generator_unordered", pre_dispatch="2*n_jobs"
            )
            tasks = (
                joblib.delayed(_numbered)(position, job, self.engine)
                for position, job in enumerate(jobs)
            )
            done = False
            try:
                yield from parallel(tasks)
                done = True
            except BrokenProcessPool as error:
                # A signal to all processes of a group may take the workers first.
                time.sleep(_GROUP_SECONDS)
                raise WorkerError(
                    "a worker process was ended from outside; if memory ran out, use fewer --jobs"
                ) from error
            finally:
                if not done:
                    get_reusable_executor(reuse=True).shutdown(kill_workers=True)

    def _on_cluster(self, jobs: Sequence[Job], address: str) -> Results:
        try:
            distributed: Any = importlib.import_module("distributed")
        except ModuleNotFoundError as error:
            how = install_command("cluster")
            raise ClusterError(f"--dask needs {error.name!r}; run `{how}`") from error
        try:
            client = distributed.Client(address, timeout=10)
        except (OSError, TimeoutError, ValueError) as error:
            raise ClusterError(f"--dask {address}: no scheduler answers: {error}") from error
        with client:
            futures = [
                client.submit(_numbered, position, job, self.engine, pure=False)
                for position, job in enumerate(jobs)
            ]
            for future in distributed.as_completed(futures):
                yield future.result()
                future.release()
