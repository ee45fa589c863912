"""Which tokens may be sampled: top-p, top-k and min-p."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class SamplingFilters:
    """Restricts sampling to the most likely tokens; true if it does. Applied after the temperature, as vLLM does:

    min_p  first: tokens with at least this fraction of the most likely token's probability; 0: off
    top_k  then: the k most likely tokens, with all that tie with the last of them; 0: off
    top_p  last: of the remaining tokens, the fewest most likely ones whose probabilities sum to at least p; 1: off
    """

    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __bool__(self) -> bool:
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0

    def __str__(self) -> str:
        """`top-p 0.9, top-k 50`, or `unfiltered`."""
        parts = [
            f"top-p {self.top_p:g}" if self.top_p < 1.0 else "",
            f"top-k {self.top_k}" if self.top_k else "",
            f"min-p {self.min_p:g}" if self.min_p else "",
        ]
        return ", ".join(part for part in parts if part) or "unfiltered"

    def to_json(self) -> dict[str, float | int]:
        return asdict(self)


UNFILTERED = SamplingFilters()
