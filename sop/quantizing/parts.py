"""The folder in which a run gathers its results, so that an interrupted one can go on."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from golden.errors import InputError
from golden.new_file import TEMPORARY_PREFIX, new_file
from sop.quantizing.run_config import RunConfig
from sop.shared.lock import locked

__all__ = ["KeptParts", "Parts", "gathering"]

_RUN = "run.json"
_LOCK = "lock"
_RESULT = r"(options|tensor)-[\w-]+\.(json|safetensors)"
_OWN = re.compile(rf"{_RUN}|{_LOCK}|{_RESULT}|{re.escape(TEMPORARY_PREFIX)}[0-9a-f]{{8}}")


class Parts:
    """Finished results by name, in memory."""

    def __init__(self) -> None:
        self._contents: dict[str, bytes] = {}

    def put(self, name: str, content: bytes) -> None:
        """Keep a result."""
        self._contents[name] = content

    def __contains__(self, name: str) -> bool:
        """Whether the result is there."""
        return name in self._contents

    def read(self, name: str) -> bytes:
        """Bytes of a result."""
        return self._contents[name]


class KeptParts(Parts):
    """Finished results, one file each in a folder, put into place at once.

    Only files that a run made are ever removed from it.

    Parameters
    ----------
    folder : Path
        It must exist.
    made_here : bool
        Whether it is removed too, once it is empty.
    """

    def __init__(self, folder: Path, *, made_here: bool = True) -> None:
        super().__init__()
        self.folder = folder
        self._made_here = made_here
        self._made = os.stat(folder)
        self._described: os.stat_result | None = None

    def _present(self) -> bool:
        """Whether the folder is still the same; somebody may have removed it.

        A new folder may get the number of the old one, but not its description.
        """
        if not (self.folder.is_dir() and os.path.samestat(self._made, os.stat(self.folder))):
            return False
        before = self._described
        if before is None:
            return True
        try:
            now = os.stat(self.folder / _RUN)
        except FileNotFoundError:
            return False
        return os.path.samestat(before, now) and before.st_mtime_ns == now.st_mtime_ns

    def _check_present(self) -> None:
        if not self._present():
            problem = "was removed while this run was writing into it"
            raise InputError(f"{self.folder}: {problem}")

    def put(self, name: str, content: bytes) -> None:
        """Write a result so that it is there as a whole or not at all."""
        self._check_present()
        with new_file(self.folder / name) as file:
            file.write(content)

    def __contains__(self, name: str) -> bool:
        """Whether the result is there."""
        self._check_present()
        return self.path(name).is_file()

    def read(self, name: str) -> bytes:
        """Bytes of a result."""
        return self.path(name).read_bytes()

    def path(self, name: str) -> Path:
        """File of a result."""
        return self.folder / name

    @property
    def has_results(self) -> bool:
        """Whether there is anything to go on from."""
        return self._present() and any(
            re.fullmatch(_RESULT, name) for name in os.listdir(self.folder)
        )

    def remove(self) -> None:
        """Remove what runs made, and the folder, unless somebody put more into it."""
        if not self._present():
            return
        for name in os.listdir(self.folder):
            if _OWN.fullmatch(name):
                (self.folder / name).unlink()
        if self._made_here:
            with suppress(OSError):  # not empty
                self.folder.rmdir()

    def start(self, config: RunConfig, resume: bool) -> None:
        """Describe the run, or check that what an old one left belongs to it."""
        text = json.dumps(config.to_json(), sort_keys=True)
        described = self.folder / _RUN
        if not described.exists():
            self.put(_RUN, text.encode())
            self._described = os.stat(described)
            return
        if not resume:
            raise InputError(
                f"{self.folder}: left by an interrupted run; go on with --resume, or remove it"
            )
        old = described.read_bytes()
        if old != text.encode():
            before = RunConfig.from_json(json.loads(old), str(described))
            problem = config.difference(before)
            raise InputError(f"{self.folder}: {problem}; remove it to start anew")
        self._described = os.stat(described)


@contextmanager
def gathering(output: Path, config: RunConfig, *, resume: bool) -> Iterator[KeptParts]:
    """Gather results in a folder beside the output; it is locked while the block lives.

    The folder is removed when the block ends, and stays when it ends by an exception and there are
    results to go on from.

    Parameters
    ----------
    output : Path
        The folder has ``.parts`` behind this name.
    config : RunConfig
        What the results depend on.
    resume : bool
        Whether to go on from results that are there.

    Raises
    ------
    InputError
        If another run is writing this output, the folder is not one of a run, it holds results and
        `resume` is false, or they are of a run with another `config`.
    """
    folder = output.with_name(output.name + ".parts")
    _check_own(folder)
    strange = folder.is_dir() and not os.listdir(folder)
    folder.mkdir(exist_ok=True)
    parts = KeptParts(folder, made_here=not strange)
    with locked(folder / _LOCK, output):
        parts.start(config, resume)
        try:
            yield parts
        except BaseException:
            if not parts.has_results:
                parts.remove()
            raise
        parts.remove()


def _check_own(folder: Path) -> None:
    """Refuse a folder that no run made: without its description it may have a lock at most."""
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise InputError(f"{folder}: is in the way of the folder for parts; it is not touched")
    described = folder / _RUN
    if described.is_file():
        own = _is_description(described)
    else:
        own = set(os.listdir(folder)) <= {_LOCK}
    if not own:
        raise InputError(f"{folder}: was not made by this program, so it is not touched")


def _is_description(path: Path) -> bool:
    """Whether a file describes a run."""
    try:
        RunConfig.from_json(json.loads(path.read_bytes()), str(path))
    except ValueError:  # InputErrors among them
        return False
    return True
