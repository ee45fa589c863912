"""Settings of a tool worker, and the fixed limits of every call."""

from __future__ import annotations

from dataclasses import dataclass

PROCESSES, FILES, FILE_BYTES, WORK_BYTES = 16, 64, 16 << 20, 64 << 20  # per call
FIRST_UID = 1_800_000_000  # far above the ids that systems assign


@dataclass(frozen=True)
class Settings:
    """Settings of a worker.

    memory      address space of a process of a call, bytes
    max_output  characters of an observation
    sandbox     "namespaces" or "bubblewrap"
    folder      where calls have their folders if they have no file system of their own
    uid         user id of tools; None: the trainer's
    """

    memory: int
    max_output: int
    sandbox: str
    folder: str
    uid: int | None

    @property
    def own_uid(self) -> int | None:
        """The user id, if no other process has it: all its processes and objects belong to the worker's call."""
        return self.uid if self.uid is not None and self.uid >= FIRST_UID else None


def unused_uid(process: int) -> int | None:
    """Return an unused user id, different for each worker, so that the process limit counts the processes of one call.

    In a container that maps no such ids, it is the id of `nobody`, which others may use. None if that is not mapped.
    """
    with open("/proc/self/uid_map") as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    for candidate in (FIRST_UID + process, 65534):
        if any(first <= candidate < first + count for first, _, count in ranges):
            return candidate
    return None
