"""GRPO (arXiv 2402.03300): prompt-only policy loss, one outcome reward per rollout, group-relative advantage."""

from __future__ import annotations

from pact_fast.algorithms.base import TRACE_SETTINGS, TURN_SETTINGS
from pact_fast.algorithms.matchtir import MatchTIR
from pact_fast.algorithms.registry import algorithm


@algorithm("grpo")
class GRPO(MatchTIR):
    """Prompt-only policy loss with outcome rewards; MatchTIR without its turn-level rewards."""

    turn_advantages = False
    unused_settings = {**TRACE_SETTINGS, "reward": TURN_SETTINGS}  # noqa: RUF012
