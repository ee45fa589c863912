"""Cache of data derived from a data file: written by one process of a node, read by all.

An entry is a folder below `rows/` of the cache folder ($XDG_CACHE_HOME/pact_fast). Its name depends on the file's size,
modification time and first and last bytes, so that a changed file gets another entry. An entry appears when it is
complete; incomplete entries of a killed process are removed by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pact_fast.errors import PactError
from pact_fast.files import cache_folder, io_errors, private_folder

VERSION = 1  # of the format of entries
END_BYTES = 1 << 16  # bytes at either end of a file that tell it from others
CURE = "free some space, or set XDG_CACHE_HOME to a folder that is writable"


class FileState(NamedTuple):
    """Size in bytes and time of change in ns: while both stay, the bytes are taken to be the same."""

    size: int
    changed: int

    @classmethod
    def of(cls, file: int | Path) -> FileState:
        found = os.stat(file)
        return cls(found.st_size, found.st_mtime_ns)


class FileChanged(PactError):
    """A data file is another one than when the run began."""

    def __init__(self, name: str):
        super().__init__(
            f"{name} has changed since the run began, and its rows are read when they are drawn; restore it, and continue "
            "with resume=auto"
        )


class CacheEntry:
    """Cached result of `make` for a data file: a folder of files.

    Args:
        path: The data file.
        what: Kind of the derived data; part of the folder's name.
        make: Writes the files into the folder it is given. Called by one process of a node; the others wait for it.

    Raises:
        FileChanged: The data file changed while `make` ran.
        PactError: The disk is full. (A cache folder that is not writable is replaced by a private one.)
        Exception: Any exception of `make`.
    """

    def __init__(self, path: Path, what: str, make: Callable[[Path], None]):
        self._path, self._what, self._make = path, what, make
        self._state = FileState.of(path)
        self.folder = self._find()

    def _find(self) -> Path:
        key = f"{_digest(self._path, self._state)}-{self._what}"
        home = _home(self._path)
        found = home / key
        if not found.is_dir():
            with io_errors(home, CURE), _locked(home / "lock"):
                if not found.is_dir():
                    _remove_others(home, key)
                    _write(self._path, self._state, found, self._make)
        return found

    def open(self, name: str) -> BinaryIO:
        """Open a file of the entry. The entry is made again if the cache folder has been cleared."""
        try:
            return (self.folder / name).open("rb", buffering=0)
        except FileNotFoundError:
            self.check(self._path)
            self.folder = self._find()
            return (self.folder / name).open("rb", buffering=0)

    def check(self, file: int | Path) -> None:
        """FileChanged if the data file, open or by its path, is not as it was."""
        if FileState.of(file) != self._state:
            raise FileChanged(str(self._path))


def _write(path: Path, state: FileState, target: Path, make: Callable[[Path], None]) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=".", suffix=".tmp", dir=target.parent))
    try:
        make(temporary)
        if FileState.of(path) != state:
            raise FileChanged(str(path))
        for file in temporary.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        with contextlib.suppress(FileExistsError, NotADirectoryError):
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _digest(path: Path, state: FileState) -> str:
    digest = hashlib.sha256(repr((VERSION, *state)).encode())
    with path.open("rb") as file:
        digest.update(file.read(END_BYTES))
        file.seek(max(0, state.size - END_BYTES))
        digest.update(file.read(END_BYTES))
    return digest.hexdigest()[:24]


def _home(path: Path) -> Path:
    """The folder of a file's entries; in a private folder of the process if the cache folder cannot be written to."""
    name = Path("rows", hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:24])
    for base in (cache_folder(), Path(private_folder())):
        home = base / name
        with contextlib.suppress(OSError):
            home.mkdir(parents=True, exist_ok=True)
            if os.access(home, os.W_OK):
                return home
    raise PactError(f"cannot write {cache_folder()}; {CURE}")


def _remove_others(home: Path, key: str) -> None:
    """Remove entries of older states of the file, and leftovers of killed processes. The caller holds the lock."""
    state = key.partition("-")[0]
    for path in home.iterdir():
        if path.is_dir() and not path.name.startswith(f"{state}-"):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks; else each process makes an entry, and the first one stays."""
    with path.open("wb") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
