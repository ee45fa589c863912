"""The lock of a run directory: one process trains in it, and another one is told which.

`run.lock` is locked with flock, which the kernel releases when the process ends, however it ends. The file says who
holds it: host, process id, start, and a heartbeat that is written every ten seconds. File systems on which flock
fails, or does not reach other hosts, are why a file that another host left behind is watched before it is taken over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import stat
import threading
import time
import weakref
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pact_fast.errors import PactError
from pact_fast.text import short, visible

LOCK = "run.lock"
HEARTBEAT_SECONDS = 10.0  # seconds between heartbeats
HEARTBEAT_TIMEOUT = 45.0  # without one for so long, a process of another host counts as dead
ATTEMPTS = 100  # at a file that others remove while it is opened
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # of a file system that cannot lock

Record = dict[str, Any]


class RunLock:
    """Holds the lock from its construction until `release`, the end of the process, or its own end as an object.

    Args:
        run: The run directory; it is created if it does not exist.
        note: Tells people about a wait.

    Raises:
        PactError: Another process has the lock (the message names it), or the directory is not writable.
    """

    def __init__(self, run: Path, note: Callable[[str], object] = lambda text: None):
        self._run, self._path = run, run / LOCK
        created = not run.exists()
        try:
            descriptor, shared = _open_locked(run, self._path)
        except OSError as error:
            raise PactError(
                f"cannot lock {run}: {error.strerror}; make the folder writable, or choose another"
            ) from None
        record = _own_record()
        self._held = _HeldLock(self._path, descriptor, record, run if created else None)
        self._finalizer = weakref.finalize(self, self._held.release)
        try:
            before = _read(self._path)
            if before and (not shared or before.get("boot") != record["boot"]):
                _watch(self._path, before, note)
            self._held.start()
            if not shared:  # two processes may have waited for the same silence
                time.sleep(1.0)
                self.check()
        except BaseException:
            self.release()
            raise

    def check(self) -> None:
        """PactError if another process has taken the lock meanwhile: it took this one for dead, or the file was removed."""
        record = _read(self._path)
        if record and record.get("id") != self._held.record["id"]:
            raise PactError(
                f"{self._run} was taken over by {_holder_text(record)}, so this process stops; its checkpoints are kept"
            )

    def release(self) -> None:
        """Remove the file, and the directory if the lock has created it and nothing else is there. Idempotent."""
        self._finalizer()


class _HeldLock:
    """The locked file of this process, and the thread that writes heartbeats to it."""

    def __init__(self, path: Path, descriptor: int, record: Record, folder: Path | None):
        self.record = record
        self._path, self._descriptor, self._folder = path, descriptor, folder
        self._mutex, self._ended = threading.Lock(), threading.Event()
        self._pid = os.getpid()
        _all_held.add(self)

    def start(self) -> None:
        self._write()
        threading.Thread(target=self._beat, name="run-lock", daemon=True).start()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with self._mutex:
                if self._ended.is_set():  # the descriptor may be another file's by now
                    return
                self.record["beat"] += 1
                with contextlib.suppress(OSError):  # a full or absent disk: the next write of the run reports it
                    self._write()

    def _write(self) -> None:
        data = json.dumps(self.record).encode() + b"\n"
        os.pwrite(self._descriptor, data, 0)
        os.ftruncate(self._descriptor, len(data))

    def release(self) -> None:
        if self._pid != os.getpid():  # a forked child inherits the object, not the lock
            return
        with self._mutex:
            if self._ended.is_set():
                return
            self._ended.set()
            with contextlib.suppress(OSError):
                if (_read(self._path) or {}).get("id") == self.record["id"]:  # not one that was only watched
                    self._path.unlink()
                if self._folder:
                    self._folder.rmdir()  # fails if a run has begun there
            os.close(self._descriptor)

    def close_in_child(self) -> None:
        """A child that outlives this process must not keep the lock."""
        if not self._ended.is_set():
            os.close(self._descriptor)


_all_held: weakref.WeakSet[_HeldLock] = weakref.WeakSet()


def _forked() -> None:
    for held in _all_held:
        held.close_in_child()
    _all_held.clear()


os.register_at_fork(after_in_child=_forked)


def _open_locked(run: Path, path: Path) -> tuple[int, bool]:
    """(descriptor of the locked file, whether the kernel has locked it). PactError if another process has it."""
    for _ in range(ATTEMPTS):
        run.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # the directory was removed by a process that has just ended
            continue
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise PactError(f"{path} is not a file; remove it")
            shared = _flock(descriptor)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(descriptor)):
                    return descriptor, shared
        except BlockingIOError:
            os.close(descriptor)
            raise PactError(_in_use(run, _read_with_retries(path))) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # of a file that its last holder has removed
    raise PactError(f"cannot lock {run}: other processes keep starting and ending there; try again")


def _flock(descriptor: int) -> bool:
    """Lock the file; False if its file system cannot. BlockingIOError if another process has locked it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _watch(path: Path, before: Record, note: Callable[[str], object]) -> None:
    """Wait whether the holder of another host, or of a file system without locks, shows a heartbeat."""
    note(
        f"{path.parent} was last used by {_holder_text(before)}; waiting {HEARTBEAT_TIMEOUT:.0f} s for a heartbeat from there"
    )
    deadline = time.monotonic() + HEARTBEAT_TIMEOUT
    while time.monotonic() < deadline:
        time.sleep(min(1.0, HEARTBEAT_TIMEOUT / 10))
        now = _read(path)
        if now and (now.get("id"), now.get("beat")) != (before.get("id"), before.get("beat")):
            raise PactError(_in_use(path.parent, now))


def _own_record() -> Record:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "boot": _boot_id(),
        "started": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "beat": 0,
        "id": secrets.token_hex(8),
    }


def _boot_id() -> str:
    """Identifies this start of this machine: containers that share a kernel, and its locks, share it."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return socket.gethostname()


def _read(path: Path) -> Record | None:
    """The record of a lock file; None if there is none, or it is being written."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            value = json.loads(file.read(4096))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _read_with_retries(path: Path) -> Record | None:
    """The record, for which a process that has just got the lock has a second."""
    for _ in range(20):
        if record := _read(path):
            return record
        time.sleep(0.05)
    return None


def _in_use(run: Path, record: Record | None) -> str:
    return (
        f"{run} is in use by {_holder_text(record)}; wait until it has ended, or stop it, and start again, or choose another "
        "output_dir="
    )


def _holder_text(record: Record | None) -> str:
    if record is None:
        return "another process"
    host, pid, started = (record.get(key) for key in ("host", "pid", "started"))
    return f"process {short(pid)} on {visible(str(host))[:80]}, started {visible(str(started))[:40]}"
