"""Names and descriptions of the sandbox's protections, in the words of docs/environments.md."""

from __future__ import annotations

from collections.abc import Iterable

PROTECTIONS = {
    "network": "no network at all",
    "files": "the file system is read-only, except 64 MiB of the call's own; `/tmp` and `/proc` are empty",
    "devices": "no devices but null, zero, full, random and urandom; no terminals",
    "processes": "no process outside can be seen or signalled; processes started by the call end with it",
    "ipc": "no System V memory, semaphores or queues and no POSIX queues of others, and none outlives the call",
    "keys": "no kernel keyrings",
    "sockets": "no sockets but local ones and those of IPv4 and IPv6: no vsock, AF_ALG, AF_PACKET, netlink",
    "count": "at most 16 processes and threads of a call at a time",
    "identity": "an unused user id",
}


def describe(in_force: Iterable[str]) -> list[str]:
    """One line for each protection: in force, or missing."""
    holds = set(in_force)
    return [f"{name}: {'' if name in holds else 'NOT '}in force: {text}" for name, text in PROTECTIONS.items()]
