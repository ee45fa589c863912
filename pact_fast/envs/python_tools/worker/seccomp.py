"""System calls that tools cannot make, by a seccomp filter similar to Docker's default profile.

What they have in common: they make something that no namespace contains and no resource limit counts, or they reach
beyond the tool's own processes. Python has no binding of libseccomp that is maintained and needs no library, so the
filter is written out here: classic BPF, one comparison after the other.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct

from .linux import CLONE_NEWUSER, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, libc_call

# numbers by machine: (audit architecture, {name: number})
_MACHINES = {
    "x86_64": (0xC000003E, {
        "ioctl": 16, "shmget": 29, "socket": 41, "socketpair": 53, "clone": 56, "semget": 64, "msgget": 68, "ptrace": 101,
        "mq_open": 240, "add_key": 248, "request_key": 249, "keyctl": 250, "unshare": 272, "perf_event_open": 298,
        "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "bpf": 321, "userfaultfd": 323,
        "io_uring_setup": 425, "clone3": 435, "pidfd_getfd": 438,
    }),
    "aarch64": (0xC00000B7, {
        "ioctl": 29, "unshare": 97, "ptrace": 117, "mq_open": 180, "msgget": 186, "semget": 190, "shmget": 194,
        "socket": 198, "socketpair": 199, "add_key": 217, "request_key": 218, "keyctl": 219, "clone": 220,
        "perf_event_open": 241, "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271, "bpf": 280,
        "userfaultfd": 282, "io_uring_setup": 425, "clone3": 435, "pidfd_getfd": 438,
    }),
}  # fmt: skip

REFUSED = {
    "shmget": errno.ENOSYS, "semget": errno.ENOSYS, "msgget": errno.ENOSYS, "mq_open": errno.ENOSYS,  # outlive the call
    "add_key": errno.ENOSYS, "request_key": errno.ENOSYS, "keyctl": errno.ENOSYS,  # belong to the user
    "io_uring_setup": errno.ENOSYS,  # opens sockets without the system call
    "clone3": errno.ENOSYS,  # its flags cannot be seen; C libraries fall back on clone
    "unshare": errno.EPERM, "setns": errno.EPERM,  # rights in a new user namespace
    "ptrace": errno.EPERM, "process_vm_readv": errno.EPERM, "process_vm_writev": errno.EPERM, "pidfd_getfd": errno.EPERM,
    "bpf": errno.EPERM, "perf_event_open": errno.EPERM, "userfaultfd": errno.EPERM,
}  # fmt: skip
FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6)  # a network namespace contains these, and not vsock
TERMINAL_INPUT = (0x5412, 0x541C)  # TIOCSTI, TIOCLINUX: type into the user's terminal

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _MODE_FILTER = 0x7FFF0000, 0x00050000, 2
_NUMBER, _ARCHITECTURE, _ARGUMENT_0, _ARGUMENT_1 = 0, 4, 16, 24  # offsets in struct seccomp_data, low halves


def program(refused: dict[str, int] = REFUSED) -> bytes | None:
    """The filter, or None for a machine whose system calls are not listed here.

    Args:
        refused: {system call: errno}.
    """
    if os.uname().machine not in _MACHINES:
        return None
    architecture, numbers = _MACHINES[os.uname().machine]
    code = [
        _step(_LOAD, _ARCHITECTURE),
        *_unless(_EQUAL, architecture, errno.ENOSYS),  # 32-bit programs have other numbers
        _step(_LOAD, _NUMBER),
        *_if(_AT_LEAST, 0x40000000, errno.ENOSYS),  # x32 as well
    ]
    for name, error in refused.items():
        code += _if(_EQUAL, numbers[name], error)
    for name in ("socket", "socketpair"):
        allowed = [_step(_EQUAL, family, len(FAMILIES) - i, 0) for i, family in enumerate(FAMILIES)]
        code += _in_call(numbers[name], _ARGUMENT_0, [*allowed, _step(_RETURN, _ERRNO | errno.EAFNOSUPPORT)])
    code += _in_call(numbers["clone"], _ARGUMENT_0, _if(_ANY_BIT, CLONE_NEWUSER, errno.EPERM))
    code += _in_call(
        numbers["ioctl"],
        _ARGUMENT_1,
        [step for request in TERMINAL_INPUT for step in _if(_EQUAL, request, errno.EPERM)],
    )
    return b"".join([*code, _step(_RETURN, _ALLOW)])


def install(code: bytes) -> None:
    """Filter the system calls of this process and its children from now on, for ever."""
    buffer = ctypes.create_string_buffer(code, len(code))
    fprog = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    libc_call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc_call("prctl", PR_SET_SECCOMP, _MODE_FILTER, fprog, 0, 0)


def _step(operation: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """An instruction. `if_true`, `if_false`: how many of the next ones a comparison skips."""
    return struct.pack("HBBI", operation, if_true, if_false, operand)


def _if(comparison: int, operand: int, error: int) -> list[bytes]:
    """Refuse the system call if the comparison holds."""
    return [_step(comparison, operand, 0, 1), _step(_RETURN, _ERRNO | error)]


def _unless(comparison: int, operand: int, error: int) -> list[bytes]:
    return [_step(comparison, operand, 1, 0), _step(_RETURN, _ERRNO | error)]


def _in_call(number: int, argument: int, check: list[bytes]) -> list[bytes]:
    """Run the check of an argument for one system call only. Leaves the number loaded."""
    return [_step(_EQUAL, number, 0, len(check) + 2), _step(_LOAD, argument), *check, _step(_LOAD, _NUMBER)]
