"""The quickstart with and without shared prefixes: the same losses and gradients, and how long an update takes.

python benchmarks/quickstart_sharing.py                    the shipped recipe after a shorter base-model stage
python benchmarks/quickstart_sharing.py pretrain.steps=700 --steps 8 --out results.json

The steps are the recipe's own: its model, tasks, rollouts, rewards and plans; after each, the weights move as they do in a
run. Before they do, the step's plans are applied to the same weights in three ways: with rollouts merged where they begin
alike, with shared prefixes only, and with every sequence alone:

loss, gradient  relative differences from every sequence alone (gradient: of all parameters as one vector), fp32, at most 1e-5
seconds         packing, forward, loss and backward; median over all rounds, the ways alternate. The optimizer's step, which
                is the same in any way, is counted apart
ratio           every sequence alone to the way, median over the rounds of the ratio within a round
tokens          that the trunk computes, by step

Status 1: losses or gradients differ, or sharing is not faster.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # a script among its siblings, from wherever it is imported

from measure import markdown, median_ratio, paired_rounds, stamp

from pact_fast.algorithms.base import PromptBatch
from pact_fast.algorithms.registry import make_algorithm
from pact_fast.config import Config, load_config
from pact_fast.train.learner import Learner, UpdateResult
from pact_fast.train.run import Trainer

LIMIT = 1e-5
SHORT = ["pretrain.steps=200"]  # enough for rollouts of several turns
WAYS = {
    "merged": {"share_prefixes": True, "merge_rollouts": True},
    "shared": {"share_prefixes": True, "merge_rollouts": False},
    "alone": {"share_prefixes": False},
}
SHARING = ("merged", "shared")


class Steps(Trainer):
    """The recipe's steps without evaluations and checkpoints."""

    def each(self, count: int, look: Callable[[list[PromptBatch]], None]) -> list[UpdateResult]:
        """`look` is given the plans of every update before the weights move."""
        self._assemble(*self._models(None))
        update, done = self.learner.update, []

        def looked_at(plans: list[PromptBatch]) -> UpdateResult:
            look(plans)
            return update(plans)

        self.learner.update = looked_at
        try:
            for step in range(count):
                done += self._update(step, self._exchange(self._sample(step)))[1]
        finally:
            self.progress.close()
            self.loop.close()
        return done


class Comparison:
    """All ways over the plans of one update after another."""

    def __init__(self, trainer: Steps, rounds: int):
        self._trainer, self._rounds = trainer, rounds
        self.steps: list[dict[str, Any]] = []

    def __call__(self, plans: list[PromptBatch]) -> None:
        learners = {way: self._learner(settings) for way, settings in WAYS.items()}
        found = {way: self._gradient(learner, plans) for way, learner in learners.items()}
        alone, theirs = found["alone"]
        calls = {way: functools.partial(self._gradient, learner, plans) for way, learner in learners.items()}
        times = paired_rounds(calls, dict.fromkeys(calls, self._rounds), self._trainer.device)
        self._trainer.model.zero_grad(set_to_none=True)
        self.steps.append({
            "loss": {way: result.loss for way, (result, _) in found.items()},
            "loss_error": max(abs(found[way][0].loss / alone.loss - 1.0) for way in SHARING),
            "gradient_error": max(float((found[way][1] - theirs).norm() / theirs.norm()) for way in SHARING),
            "tokens": {way: result.tokens for way, (result, _) in found.items()},
            "round_ms": times,
        })  # fmt: skip

    def _learner(self, settings: dict[str, bool]) -> Learner:
        config = self._trainer.config
        trainer = config.trainer.model_copy(update=settings)
        temperature = config.rollout.temperature
        return Learner(
            self._trainer.model, trainer, make_algorithm(config.algorithm), total_updates=1, temperature=temperature
        )

    def _gradient(self, learner: Learner, plans: list[PromptBatch]) -> tuple[UpdateResult, torch.Tensor]:
        self._trainer.model.zero_grad(set_to_none=True)
        result = learner.accumulate(plans)
        return result, torch.cat([p.grad.flatten() for p in self._trainer.model.parameters() if p.grad is not None])


def measure(config: Config, steps: int, rounds: int) -> dict[str, Any]:
    """Everything of one recipe."""
    trainer = Steps(config)
    comparison = Comparison(trainer, rounds)
    done = trainer.each(steps, comparison)
    found = comparison.steps
    times = {way: [t for step in found for t in step["round_ms"][way]] for way in WAYS}
    return {
        "steps": found,
        "loss_error": max(step["loss_error"] for step in found),
        "gradient_error": max(step["gradient_error"] for step in found),
        "tokens": {way: statistics.median(step["tokens"][way] for step in found) for way in WAYS},
        "seconds": {way: statistics.median(times[way]) / 1e3 for way in WAYS},
        "optimizer_s": statistics.median(result.seconds["optimizer"] for result in done),
        "ratio": {way: median_ratio(times["alone"], times[way]) for way in SHARING},
    }


def failures(result: dict[str, Any]) -> list[str]:
    off = [f"{what} is off by {result[what]:.2g}" for what in ("loss_error", "gradient_error") if result[what] > LIMIT]
    return off + [f"{way} is not faster: {ratio:.2f}" for way, ratio in result["ratio"].items() if ratio <= 1.0]


def table(result: dict[str, Any]) -> str:
    rows = [
        [way, f"{result['seconds'][way]:.3f}", f"{result['tokens'][way]:.0f}"]
        + [f"{step['loss'][way]:.7f}" for step in result["steps"]]
        for way in WAYS
    ]
    header = ["prefixes", "seconds", "tokens", *(f"loss {i + 1}" for i in range(len(result["steps"])))]
    return (
        f"{markdown(header, rows)}\n\nratio: merged {result['ratio']['merged']:.2f}, shared {result['ratio']['shared']:.2f}; "
        f"optimizer {result['optimizer_s']:.3f} s; differences: "
        f"loss {result['loss_error']:.1e}, gradient {result['gradient_error']:.1e} (at most {LIMIT:g})"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"settings; default {' '.join(SHORT)}")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="of each way, for every step")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    args = parser.parse_args(argv)
    report: dict[str, Any] = {"benchmark": "quickstart_sharing", **stamp(), "overrides": args.overrides or SHORT}
    with tempfile.TemporaryDirectory() as folder:
        config = load_config("quickstart", [*report["overrides"], f"output_dir={folder}/run"])
        report |= measure(config, args.steps, args.rounds)
    report["failures"] = failures(report)
    print(table(report))
    print("\n".join(f"FAIL {failure}" for failure in report["failures"]))
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
