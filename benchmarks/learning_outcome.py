"""PACT where success is the only reward: without the turn-level rewards of the matching."""

from __future__ import annotations

from pact_fast.algorithms.pact import Pact


class OutcomePact(Pact):
    """PACT with one outcome reward per rollout and the group advantage alone, as GRPO has them."""

    turn_advantages = False
