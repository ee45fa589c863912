"""Messages on the worker's socket and on the tool's pipes: a length, then JSON."""

from __future__ import annotations

import json
import struct
from typing import Any

LENGTH = struct.Struct("!I")
START, PID = (
    b"worker",
    struct.Struct("!I"),
)  # to the fork server, with two descriptors; from the forked worker, with one


def frame(message: Any) -> bytes:
    """A message as bytes."""
    data = json.dumps(message).encode()
    return LENGTH.pack(len(data)) + data
