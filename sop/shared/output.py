"""Where commands write: what is refused before any work, and files that are whole or not there.

Every command that writes asks :func:`output_file` or :func:`output_folder` first, most through
:func:`writing_file` or :func:`writing_folder`, which lock the output too. They never let an
input, a folder of somebody else's, what is no regular file, or a file that this program did not
make be replaced; ``--force`` gives way for the last of these only.
"""

import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from golden import checkpoint
from golden.errors import InputError
from golden.new_file import new_file
from golden.new_file import new_folder as unfinished_folder
from sop.shared.lock import locked
from sop.shared.marks import (
    CALIBRATION_KEY,
    DECODED_KEY,
    PAGE_MARK,
    PARTIAL_KEY,
    PNG_SOFTWARE,
    TILE_ORDER_KEY,
)

__all__ = [
    "CALIBRATION",
    "CHECKPOINT",
    "DECODED",
    "PARTIAL",
    "IMAGE",
    "Kind",
    "PAGE",
    "TILED",
    "checked_folder",
    "locked_folder",
    "marked",
    "new_folder",
    "output_file",
    "output_folder",
    "write_files",
    "writing_file",
    "writing_folder",
]

_MARKED_BYTES = 1 << 16  # marks are near the start
_DEFAULT_FOLDER = Path("build")  # where commands write if they are not told
_LONGEST_SUFFIX = ".partial.lock"  # of what may lie beside an output
_FOLDER_LOCK = ".sop.lock"


@dataclass(frozen=True)
class Kind:
    """A kind of file that this program writes.

    Attributes
    ----------
    name : str
        For messages, such as ``"a checkpoint"``.
    made_here : callable
        Whether the content of a regular file shows that this program made it.
    """

    name: str
    made_here: Callable[[Path], bool]


def _with_metadata(key: str) -> Callable[[Path], bool]:
    """Whether a file is a safetensors file whose metadata, which come first, have a key."""
    mark = json.dumps(key).encode() + b":"

    def made_here(path: Path) -> bool:
        header = _start(path)[8:]  # after its length
        return header.startswith(b'{"__metadata__":{') and mark in header

    return made_here


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MARKED_BYTES)


def marked(name: str, *marks: bytes) -> Kind:
    """Kind of text files that have one of some marks near their start."""

    def made_here(path: Path) -> bool:
        start = _start(path)
        return any(mark in start for mark in marks)

    return Kind(name, made_here)


PAGE = marked("a page of `sop report`", PAGE_MARK)
IMAGE = marked("a figure of `sop report`", PNG_SOFTWARE.encode())
CHECKPOINT = Kind("a checkpoint", _with_metadata(checkpoint.METADATA_KEY))
CALIBRATION = Kind("a calibration file", _with_metadata(CALIBRATION_KEY))
PARTIAL = Kind("a partial file of `sop calibrate`", _with_metadata(PARTIAL_KEY))
DECODED = Kind("a file of `sop decode`", _with_metadata(DECODED_KEY))
TILED = Kind("a file of `sop export --tile-rows`", _with_metadata(TILE_ORDER_KEY))

_TYPES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def output_file(
    path: Path,
    kind: Kind,
    inputs: Iterable[str | Path | None] = (),
    *,
    force: bool = False,
    make_folder: bool = True,
) -> Path:
    """Check, before any work, that a file can be written and nobody loses anything by it.

    Parameters
    ----------
    path : Path
        What the user gave. A symbolic link stands for the file that it leads to.
    kind : Kind
        Of the file to be written; one of this kind is replaced.
    inputs : iterable of str, Path or None
        Files and folders that the command reads; what does not exist is left out.
    force : bool
        Replace a file of any kind.
    make_folder : bool
        Whether a missing folder may be made. If not, only the default one is.

    Returns
    -------
    target : Path
        The file itself, without links, to be written with :func:`golden.new_file.new_file`; its
        folder exists.

    Raises
    ------
    InputError
        If it is one of the inputs or lies in the folder of one, is no regular file, is read-only,
        was not made by this program, or cannot be written.
    OSError
        If the file system does not say.
    """
    target = _checked(path, kind, inputs, force=force)
    if not (make_folder or target.parent.is_dir() or path.parent == _DEFAULT_FOLDER):
        raise InputError(f"{path.parent}: no such folder")
    _check_writable(target.parent)
    _make_folder(target.parent)
    _check_name(target)
    return target


def _checked(path: Path, kind: Kind, inputs: Iterable[str | Path | None], *, force: bool) -> Path:
    """The file that a path leads to, if nobody loses anything when it is replaced."""
    target = _real_path(path)
    found = _status(target)
    _refuse_inputs(path, target, found, inputs)
    if found is None:
        return target
    if not stat.S_ISREG(found.st_mode):
        what = _TYPES.get(stat.S_IFMT(found.st_mode), "no regular file")
        raise InputError(f"{path}: is {what}; the output must be a regular file")
    if not found.st_mode & 0o222:
        raise InputError(f"{path}: is read-only, so it is not replaced")
    if not force and not kind.made_here(target):
        raise InputError(f"{path}: exists and is not {kind.name}; --force replaces it")
    return target


def output_folder(
    folder: Path,
    names: Iterable[str],
    kind: Kind,
    inputs: Iterable[str | Path | None] = (),
    *,
    force: bool = False,
) -> Path:
    """As :func:`output_file`, for files of some names in a folder, which is made if missing.

    Parameters
    ----------
    folder : Path
        What the user gave.
    names : iterable of str
        Files to be written, relative to the folder.
    kind, inputs, force
        As :func:`output_file`; other files in the folder are left alone, even inputs.

    Returns
    -------
    target : Path
        The folder itself, without links; it exists.
    """
    target = checked_folder(folder)
    given = [path for path in inputs if path is not None]
    for name in names:
        _checked(folder / name, kind, given, force=force)
    return _make_folder(target)


def checked_folder(folder: Path, inputs: Iterable[str | Path | None] = ()) -> Path:
    """The folder that a path leads to, there or to be made, if something can be written in it.

    It must not lie in an input.
    """
    target = _real_path(folder)
    found = _status(target)
    if found is not None and not stat.S_ISDIR(found.st_mode):
        raise InputError(f"{folder}: is not a folder")
    _refuse_inputs(folder, target, None, inputs)
    _check_writable(target)
    return target


def _make_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def writing_file(
    path: Path,
    kind: Kind,
    inputs: Iterable[str | Path | None] = (),
    *,
    force: bool = False,
    make_folder: bool = True,
) -> Iterator[Path]:
    """As :func:`output_file`; while the block lives, no other run can write the same file."""
    target = output_file(path, kind, inputs, force=force, make_folder=make_folder)
    with locked(target.with_name(f".{target.name}.lock"), path):
        yield target


@contextmanager
def locked_folder(folder: Path) -> Iterator[Path]:
    """Make a folder if it is missing; while the block lives, no other run can write into it.

    Runs that write several files would mix them otherwise.

    Yields
    ------
    target : Path
        The folder itself, without links.

    Raises
    ------
    InputError
        If nothing can be written in it, or another run is writing into it.
    """
    target = _make_folder(checked_folder(folder))
    with locked(target / _FOLDER_LOCK, folder):
        yield target


@contextmanager
def writing_folder(
    folder: Path,
    names: Iterable[str],
    kind: Kind,
    inputs: Iterable[str | Path | None] = (),
    *,
    force: bool = False,
) -> Iterator[Path]:
    """As :func:`output_folder`, locked as :func:`locked_folder` does."""
    output_folder(folder, names, kind, inputs, force=force)
    with locked_folder(folder) as target:
        yield target


@contextmanager
def new_folder(folder: Path, inputs: Iterable[str | Path | None] = ()) -> Iterator[Path]:
    """Make a folder that takes its name when it is complete; no other run can make it meanwhile.

    Parameters
    ----------
    folder : Path
        Must not exist, or be empty. No link: what it leads to would be replaced.
    inputs : iterable of str, Path or None
        The folder must not lie in one of them, or one of them in it.

    Yields
    ------
    made : Path
        Folder to write into, of a temporary name; it vanishes if the block ends by an exception.

    Raises
    ------
    InputError
        If the folder cannot be made, or another run is making it.
    """
    if folder.is_symlink():
        raise InputError(f"{folder}: is a link; give the name of a folder to be made")
    target = checked_folder(folder, inputs)
    if target.is_dir() and (any(target.iterdir()) or os.path.ismount(target)):
        raise InputError(f"{folder}: exists and is not an empty folder")
    _check_writable(target.parent)
    _make_folder(target.parent)
    _check_name(target)
    with locked(target.with_name(f".{target.name}.lock"), folder):
        with unfinished_folder(target) as made:
            yield made


def _real_path(path: Path) -> Path:
    """Path without symbolic links; refuses those that lead nowhere or to an open stream."""
    if "\0" in str(path):
        raise InputError(f"{str(path)!r}: a name cannot have a NUL in it")
    if path.name == "-":
        raise InputError("-: standard output cannot be written to; give a name")
    link = Path(os.path.realpath(path.parent), path.name)
    for _ in range(40):  # as many as Linux follows
        if str(link.parent).startswith("/proc/"):
            raise InputError(f"{path}: is an open stream or lies in /proc; give the name of a file")
        try:
            if not link.is_symlink():
                return Path(os.path.realpath(link))
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        link = link.parent / os.readlink(link)
        link = Path(os.path.realpath(link.parent), link.name)
        if not os.path.lexists(link):
            raise InputError(f"{path}: is a link to {link}, which does not exist")
    raise InputError(f"{path}: is a link that leads to itself")


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise InputError(f"{path}: a part of this path is a file, not a folder") from None


def _refuse_inputs(
    path: Path, target: Path, found: os.stat_result | None, inputs: Iterable[str | Path | None]
) -> None:
    for given in inputs:
        if given is None or not os.path.exists(given):
            continue
        real = Path(os.path.realpath(given))
        if real.is_dir() and target.is_relative_to(real):
            raise InputError(f"{path}: lies in {given}, which is an input; choose another folder")
        # Other names of the same files: the shards of a folder may be links, as in the hub's cache.
        files = [entry.path for entry in os.scandir(real)] if real.is_dir() else [str(real)]
        for file in files:
            if found is not None and os.path.exists(file):
                if os.path.samestat(found, os.stat(file)):
                    raise InputError(f"{path}: is the input {given}, which would be lost")


def _check_writable(folder: Path) -> None:
    """Refuse a folder, there or still to be made, in which nothing can be written."""
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a folder")
    try:
        # Permissions do not tell all: read-only file systems, quotas, root.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder}: cannot be written to: {error.strerror}") from None


def _check_name(target: Path) -> None:
    """Refuse a name too long for the file system, with what may be put beside it."""
    try:
        os.lstat(target.with_name(f".{target.name}{_LONGEST_SUFFIX}"))
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{target}: {error.strerror}, with {_LONGEST_SUFFIX} behind it") from None


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> list[Path]:
    """Write files into a folder, each one complete or not at all.

    Parameters
    ----------
    folder : Path
        Created if missing.
    files : mapping of str to str or bytes
        File names and their contents; text becomes UTF-8. A symbolic link stands for the file that
        it leads to.

    Returns
    -------
    paths : list of Path
        In the order given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, content in files.items():
        with new_file(_real_path(folder / name)) as file:
            file.write(content.encode() if isinstance(content, str) else content)
        paths.append(folder / name)
    return paths
