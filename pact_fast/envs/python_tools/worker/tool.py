"""The tool's process: gives up its rights, reads its request, runs the source, and writes one frame."""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import random
import re
import resource
import signal
import sys
import warnings
from typing import Any, NoReturn

from . import seccomp
from .frames import LENGTH, frame
from .linux import PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, drop_capabilities, libc_call, set_limit
from .settings import FILE_BYTES, FILES, PROCESSES, Settings

# Modules that tools commonly use, imported before any fork. Each one makes every fork slower; tools may import others.
# fmt: off
PRELOAD = (
    "_strptime", "base64", "bisect", "calendar", "cmath", "collections.abc", "copy", "dataclasses", "datetime",
    "decimal", "enum", "fractions", "functools", "hashlib", "heapq", "itertools", "json", "math", "operator", "random",
    "re", "statistics", "string", "time", "typing", "unicodedata", "uuid", "zoneinfo",
)
# fmt: on
RESULT, REQUEST = 3, 4  # the tool's file descriptors


def preload() -> None:
    for name in PRELOAD:
        importlib.import_module(name)
    gc.freeze()  # a garbage collection in a child would write to, and so copy, every page


def drop_privileges(settings: Settings, code: bytes | None, *, count_processes: bool) -> None:
    """Limits, user id, capabilities and system calls of this process, for ever.

    Args:
        settings: The worker's.
        code: The filter of system calls, if there is one.
        count_processes: Limit the user's number of processes: not if it has others than the call's.
    """
    set_limit(resource.RLIMIT_AS, settings.memory)
    set_limit(resource.RLIMIT_FSIZE, FILE_BYTES)
    set_limit(resource.RLIMIT_NOFILE, FILES)
    set_limit(resource.RLIMIT_CORE, 0)
    if count_processes:
        set_limit(resource.RLIMIT_NPROC, PROCESSES)
    os.umask(0o077)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if settings.uid is not None:
        os.setgroups([])
        os.setresgid(settings.uid, settings.uid, settings.uid)
        os.setresuid(settings.uid, settings.uid, settings.uid)
    drop_capabilities()
    libc_call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc_call("prctl", PR_SET_DUMPABLE, 0)
    if code is not None:
        seccomp.install(code)


def arrange_descriptors(null: int, request: int, output: int) -> None:
    """No input, output to the pipe, the request as REQUEST, and nothing else but RESULT, which is there already."""
    os.dup2(null, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.dup2(request, REQUEST)
    os.closerange(REQUEST + 1, 1 << 16)


def serve(settings: Settings) -> NoReturn:
    """Wait for the request, run the tool, report, and exit."""
    try:
        with open(REQUEST, "rb") as file:
            call = json.loads(file.read(LENGTH.unpack(file.read(LENGTH.size))[0]))
        set_limit(resource.RLIMIT_CPU, math.ceil(call["timeout"]) + 1)
        text = run(call, settings.max_output)
        sys.stdout.flush()
        sys.stderr.flush()
        report(text)
    except BaseException as error:
        report(f"error: the tool's process failed: {error!r}")
    finally:
        os._exit(1)


def run(request: dict[str, Any], max_output: int) -> str | None:
    """Execute the source and call the function. Returns its result or its error as text; None if it returned None."""
    warnings.simplefilter("ignore")
    sys.stdout = open(1, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115
    try:
        random.seed(request["function"] + request["arguments"])  # equal calls give equal answers
        namespace: dict[str, Any] = {"__name__": "tool"}
        exec(compile(request["source"], "<tool>", "exec", dont_inherit=True), namespace)
        function = namespace.get(request["function"])
        if function is None:
            raise NameError(f"the source defines no function '{request['function']}'")
        value = function(**json.loads(request["arguments"]))
        return None if value is None else truncate(as_text(value), max_output)
    except BaseException as error:
        return truncate(f"error: {type(error).__name__}" + (f": {error}" if str(error) else ""), min(max_output, 1000))


def as_text(value: Any) -> str:
    """A result as an observation. TypeError if its text would show a memory address, which differs between runs."""
    if isinstance(value, dict | list):
        try:
            return json.dumps(value, ensure_ascii=False, default=str)
        except (TypeError, ValueError):  # keys that are not JSON, a list inside itself
            return str(value)
    text = str(value)
    if re.fullmatch(r"<.* at 0x[0-9a-f]+>", text, re.DOTALL):
        raise TypeError(f"the tool returned a {type(value).__name__}, which is not data")
    return text


def report(text: str | None) -> None:
    """Write the result frame."""
    data = frame(text)
    while data:
        data = data[os.write(RESULT, data) :]


def truncate(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… [cut at {limit} characters]"
