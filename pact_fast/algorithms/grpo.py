"""GRPO: prompt-only policy loss, outcome reward, group advantage."""

from __future__ import annotations

from pact_fast.algorithms.matchtir import MatchTIR


class GRPO(MatchTIR):
    """The loss is MatchTIR's; only the advantages differ: one outcome reward per rollout, no turns."""

    turn_advantages = False
