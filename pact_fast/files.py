"""Files and folders that are written whole or not at all: beside their place, flushed to disk, and renamed; the cache folder.

What is at their place already is replaced, never written through: a symbolic or hard link to another file is exchanged
for the new file, and the other one stays as it is.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pact_fast.errors import PactError, error_line

RESUME_CURE = "free some space or make the folder writable, and continue with resume=auto"
OTHER_FILE_CURE = "free some space, make the folder writable, or name another file"


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


_UMASK = _umask()  # once, while there are no threads


@contextmanager
def io_errors(path: Path, cure: str = RESUME_CURE) -> Iterator[None]:
    """Turn a failed write to `path` (disk full, no permission, no such folder) into a PactError that ends with `cure`."""
    try:
        yield
    except Exception as error:
        # safetensors has an error of its own, and this module is imported where safetensors is not
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        reason = error_line(error)
        raise PactError(f"cannot write {path}: {reason}; {cure}") from error


def write_text(path: Path, text: str, cure: str = RESUME_CURE) -> None:
    """Write a text file whole or not at all; half a surrogate pair is written as "?". PactError if the write fails."""
    with io_errors(path, cure):
        write_bytes(path, text.encode("utf-8", "replace"))


def write_named(path: Path, text: str) -> None:
    """`write_text` to a path that the user has named: a device or a pipe (/dev/stdout) is written to, not replaced."""
    with io_errors(path, OTHER_FILE_CURE):
        if path.exists() and not path.is_file() and not path.is_dir():
            with path.open("w", encoding="utf-8", errors="replace") as file:
                file.write(text)
            return
    write_text(path, text, OTHER_FILE_CURE)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all. OSError if the write fails; an existing file is then unchanged."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o666 & ~_UMASK)  # mkstemp's files are private
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        if path.is_dir() and not path.is_symlink():
            raise IsADirectoryError(f"{path} is a folder")
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def atomic_save_pretrained(objects: Any, folder: Path) -> None:
    """`save_pretrained` of one object or a list (model, tokenizer) into a new folder, which appears when it is complete."""
    with io_errors(folder):
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name[:100]}.", suffix=".tmp", dir=folder.parent))
        try:
            temporary.chmod(0o777 & ~_UMASK)
            for item in objects if isinstance(objects, list) else [objects]:
                item.save_pretrained(temporary)
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def remove(path: Path) -> None:
    """Remove a file, a folder or a link (not what it points to); nothing there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/pact_fast, by default ~/.cache/pact_fast; for a user without a home, a private folder of the process."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "pact_fast"
    try:
        return Path.home() / ".cache" / "pact_fast"
    except RuntimeError:  # a user id that the system does not know, as in some containers
        return Path(private_folder())


@functools.cache
def private_folder() -> str:
    """Removed at exit. A folder that others can foresee would let them choose the code that is loaded."""
    folder = tempfile.mkdtemp(prefix="pact-fast-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
