"""Methods of the learning study and ablations of PACT: each a set of settings over those of the regime."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.learning_regimes import Regime

# PACT's settings for tiny models, those of the recipe `quickstart` (written out: a regime may have another recipe)
TINY_SFT = "algorithm.sft={coef: 1.0, reasoning_level_start: 4, reasoning_level_end: 3}"
PAPER_SFT = "algorithm.sft={coef: 0.1, reasoning_level_start: 4, reasoning_level_end: 0}"


@dataclass(frozen=True)
class Method:
    """One way to train.

    settings  over those of the regime
    rates     learning rates that are tried, the same number for every method
    outcome   settings where the regime rewards success alone
    rewards   rewards that it is defined for; MatchTIR without turn rewards is GRPO
    """

    settings: tuple[str, ...]
    rates: tuple[float, ...] = ()
    outcome: tuple[str, ...] = ()
    rewards: tuple[str, ...] = ("dense", "outcome")

    def settings_in(self, regime: Regime) -> tuple[str, ...]:
        """The method's settings in a regime: with outcome rewards, further ones."""
        return self.settings + (self.outcome if regime.reward == "outcome" else ())


SUPERVISED = (3e-3, 1e-3, 3e-4)  # in the order of trial
REINFORCED = (2e-3, 7e-4, 2.5e-4)
OUTCOME_PACT = ("algorithm.name=benchmarks.learning_outcome:OutcomePact",)


def pact(*settings: str, sft: str = TINY_SFT) -> Method:
    """PACT with these settings, and a weight of its SFT loss."""
    return Method(("algorithm.name=pact", sft, *settings), REINFORCED, OUTCOME_PACT)


METHODS = {
    "sft": Method(("algorithm.name=sft", "algorithm.sft={final_answer: true}"), SUPERVISED),
    "sft-without-answer": Method(("algorithm.name=sft",), SUPERVISED),  # the part of a trace that PACT sees
    "grpo": Method(("algorithm.name=grpo",), REINFORCED),
    "matchtir": Method(("algorithm.name=matchtir",), REINFORCED, rewards=("dense",)),
    "pact": pact(),
    "sft_then_rl": Method(
        ("algorithm.name=sft_then_rl", "algorithm.sft_then_rl={steps: 4, rl: matchtir}"),
        REINFORCED,
        outcome=("algorithm.sft_then_rl.rl=grpo",),
    ),
    "chord": Method(
        ("algorithm.name=chord", "algorithm.chord={rl: matchtir}"), REINFORCED, outcome=("algorithm.chord.rl=grpo",)
    ),
    "luffy": Method(("algorithm.name=luffy",), REINFORCED),
    "hpt": Method(
        ("algorithm.name=hpt", "algorithm.hpt={rl: matchtir}"), REINFORCED, outcome=("algorithm.hpt.rl=grpo",)
    ),
    "sdft": Method(("algorithm.name=sdft",), REINFORCED),
}
ABLATIONS = {
    "pact-defaults": pact(sft=PAPER_SFT),
    "pact-no-anchor": pact("algorithm.anchor.q=0"),
    "pact-no-sft": pact("algorithm.sft.coef=0"),
    "pact-q-0.2": pact("algorithm.anchor.q=0.2"),
    "pact-q-0.6": pact("algorithm.anchor.q=0.6"),
    "pact-q-0.8": pact("algorithm.anchor.q=0.8"),
    "pact-blend": pact("algorithm.anchor.mode=blend"),
    "pact-calls-only": pact("algorithm.sft={coef: 1.0, reasoning_level_start: 0, reasoning_level_end: 0}"),
    "pact-constant-schedule": pact(
        "algorithm.sft={coef: 1.0, lambda_end: 0.8, reasoning_level_start: 4, reasoning_level_end: 4}"
    ),
    "pact-reasoning-level": pact("algorithm.trace.reasoning=level"),
    "pact-turns": pact("algorithm.trace.rendering=turns"),
    "pact-hint": pact("algorithm.trace.rendering=hint"),
    "pact-no-context-weight": pact("algorithm.trace.context_importance_weight=none"),
    "pact-sequence-weight": pact("algorithm.trace.context_importance_weight=sequence"),
    "pact-not-merged": pact("trainer.merge_rollouts=false"),
}
ALL = METHODS | ABLATIONS
