"""Number of random cases of a fuzz loop."""

from __future__ import annotations

import os


def cases(usual: int = 1000) -> int:
    """Return PACT_FUZZ if it is set, to search for rare cases; else `usual`, which every test run can afford."""
    return int(os.environ.get("PACT_FUZZ", usual))
