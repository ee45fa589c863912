"""Faults of tools, injected in code and drawn from a seed: a simulator that is asked to fail succeeds anyway."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Any

from pact_fast.errors import PactError
from pact_fast.text import short


@dataclass(frozen=True)
class Faults:
    """Probabilities per call, all 0 by default.

    timeout       the error `timeout`
    rate_limited  the error `rate_limited`
    empty         an empty result, where the output is a list
    noise_start, noise_end
                  a search finds the least fitting passages, with probability s + (4^p − 1)/3·(e − s), the schedule of
                  ZeroSearch; p in [0, 1] is the row's `progress`
    seed          of all draws

    A draw depends on the seed, the task, the call and how often the episode has made that call: a retry may succeed, and
    equal actions give equal observations.
    """

    timeout: float = 0.0
    rate_limited: float = 0.0
    empty: float = 0.0
    noise_start: float = 0.0
    noise_end: float = 0.0
    seed: int = 0

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> Faults:
        """From `env.args.faults`. PactError for an unknown key, or a value that is not a probability."""
        known = [field.name for field in fields(cls)]
        for key, value in settings.items():
            if key not in known:
                raise PactError(f"env.args.faults: unknown key {short(key)}; there are: {', '.join(known)}")
            if isinstance(value, bool) or not isinstance(value, int | float) or (key != "seed" and not 0 <= value <= 1):
                raise PactError(f"env.args.faults.{key}: {short(value)} must be a number in [0, 1]")
        made = cls(**settings)
        if made.timeout + made.rate_limited + made.empty > 1:
            raise PactError("env.args.faults: timeout, rate_limited and empty together must not exceed 1")
        return made

    def draw(self, task_id: str, call: str, repetition: int) -> str | None:
        """`timeout`, `rate_limited`, `empty` or None, for a call given by its key and how often it was made before."""
        u = self._uniform("fault", task_id, call, repetition)
        for kind in ("timeout", "rate_limited", "empty"):
            probability = getattr(self, kind)
            if u < probability:
                return kind
            u -= probability
        return None

    def is_noisy(self, task_id: str, call: str, progress: float) -> bool:
        """Whether a search is noisy at this progress of the curriculum."""
        return self._uniform("noise", task_id, call, 0) < self.noise(progress)

    def noise(self, progress: float) -> float:
        """The probability of a noisy search."""
        return self.noise_start + (4.0**progress - 1) / 3 * (self.noise_end - self.noise_start)

    def _uniform(self, *parts: object) -> float:
        digest = hashlib.sha256(repr((self.seed, *parts)).encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:7], "big") / 2**56
