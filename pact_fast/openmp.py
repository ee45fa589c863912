"""Spin time of waiting OpenMP threads: a setting that the runtime reads once, while torch is loaded.

torch's wheels for Linux bring GNU's libgomp. At the end of a parallel region its threads spin 300,000 times before they
sleep. Where other processes use the cores, that takes time from the very thread that is waited for, region after region
(`benchmarks/contention.py`). 2,000 turns are some tens of microseconds, about the time between two small regions.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SPIN_COUNT = 2000
USERS_CHOICE = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # either one says how threads wait


def limit_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set GOMP_SPINCOUNT unless the user has chosen. Child processes inherit it; no effect where torch is loaded already."""
    if not any(name in environment for name in USERS_CHOICE):
        environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
