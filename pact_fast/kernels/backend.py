"""Which back-ends of the kernels are live here."""

from __future__ import annotations

from pact_fast.errors import PactError


def backends() -> dict[str, str]:
    """Every back-end by name: "ready", or the reason why it is not."""
    return {
        "torch": "ready",
        "triton": "not built yet in this version",
        "cpp": "not built yet in this version",
    }


def require_backend(name: str) -> None:
    """Raise PactError unless `name` is "auto" (which picks "torch") or a live back-end."""
    known = backends()
    if name != "auto" and known.get(name) != "ready":
        reason = known.get(name, f"no such back-end; there are {', '.join(known)}")
        raise PactError(f"backend='{name}': {reason}; use backend='auto'")
