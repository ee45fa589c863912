"""GRPO (arXiv 2402.03300): prompt-only policy loss, one outcome reward per rollout, group-relative advantage."""

from __future__ import annotations

from pact_fast.algorithms.matchtir import MatchTIR
from pact_fast.algorithms.registry import algorithm


@algorithm("grpo")
class GRPO(MatchTIR):
    """The loss of MatchTIR with outcome rewards instead of turn-level ones."""

    turn_advantages = False
