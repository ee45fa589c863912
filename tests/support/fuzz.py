"""How many random cases a fuzz loop tries."""

from __future__ import annotations

import os


def cases(usual: int = 1000) -> int:
    """PACT_FUZZ, for those who look for a rare case; else `usual`, which any run of the tests can afford."""
    return int(os.environ.get("PACT_FUZZ", usual))
