"""A part of a step's time: an amount divided by a rate."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepPart:
    """One part of a step's time on one device.

    phase   rollout, log-probs (passes without gradient), update, communication, batching, records or checkpoint
    name    for display
    amount  per step, in `unit`
    unit    "FLOP", "B", or "s" for what was measured in seconds
    rate    per second; 1 for seconds
    """

    phase: str
    name: str
    amount: float
    unit: str
    rate: float

    @property
    def seconds(self) -> float:
        """Amount over rate; 0 for an unknown rate."""
        return self.amount / self.rate if self.rate else 0.0
