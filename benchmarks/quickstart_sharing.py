"""Prefix sharing in the quickstart: the same losses and gradients with and without it, and the time of an update.

python -m benchmarks.quickstart_sharing                    the shipped recipe after a shorter base-model stage
python -m benchmarks.quickstart_sharing pretrain.steps=700 --steps 8 --out results.json

The steps are the recipe's own: its model, tasks, rollouts, rewards and optimizer steps. Before each optimizer step, the same
batches are applied to the same weights in three modes: prefixes shared and rollouts with equal beginnings merged
(merged), prefixes shared (shared), every sequence by itself (unshared).

loss, gradient  relative differences from unshared (gradient: all parameters as one vector), fp32, at most 1e-5
seconds         packing, forward, loss and backward; median over rounds, in rotating order. The optimizer step, which is the
                same in all modes, is reported apart
ratio           time of unshared relative to the mode: median over rounds of the ratio within a round
tokens          that the decoder computes per step

Exit status 1: losses or gradients differ, or sharing is not faster.
"""

from __future__ import annotations

if not __package__:  # started as a file
    from as_module import run_as_module

    run_as_module(__file__)

import argparse
import contextlib
import functools
import statistics
import sys
import tempfile
from typing import Any
from unittest import mock

import torch

from benchmarks.harness import exit_status, make_parser, markdown, new_report, write_report
from benchmarks.measure import median_ratio, paired_rounds
from pact_fast.algorithms.base import PromptBatch
from pact_fast.algorithms.registry import make_algorithm
from pact_fast.config import Config, load_config
from pact_fast.train.learner import Learner, UpdateResult
from pact_fast.train.run import Trainer

LIMIT = 1e-5
SHORT = ["pretrain.steps=200"]  # enough for rollouts of several turns
MODES = {
    "merged": {"share_prefixes": True, "merge_rollouts": True},
    "shared": {"share_prefixes": True, "merge_rollouts": False},
    "unshared": {"share_prefixes": False},
}
SHARING = ("merged", "shared")


class EnoughSteps(Exception):
    """Ends the run after the steps that are compared."""


class Comparison:
    """Compares all modes on the batches of every optimizer step of a run, before the weights change.

    Args:
        config: The run's configuration.
        count: Steps, after which the run is ended.
        rounds: Paired rounds per step.
    """

    def __init__(self, config: Config, count: int, rounds: int):
        self._config, self._count, self._rounds = config, count, rounds
        self.steps: list[dict[str, Any]] = []
        self.results: list[UpdateResult] = []

    def run(self) -> None:
        """Train, and at every update compare the packs with and without sharing."""
        comparison = self

        class ComparedLearner(Learner):
            def update(self, batches: list[PromptBatch], lr_scale: float = 1.0) -> UpdateResult:
                comparison._compare(self, batches)
                comparison.results.append(super().update(batches, lr_scale))
                if len(comparison.results) == comparison._count:
                    raise EnoughSteps
                return comparison.results[-1]

        # the learner of the run, not that of the base-model stage
        with mock.patch("pact_fast.train.run.Learner", ComparedLearner), contextlib.suppress(EnoughSteps):
            Trainer(self._config).train()

    def _compare(self, learner: Learner, batches: list[PromptBatch]) -> None:
        learners = {mode: self._learner(learner, settings) for mode, settings in MODES.items()}
        found = {mode: gradient(own, batches) for mode, own in learners.items()}
        reference, reference_gradient = found["unshared"]
        calls = {mode: functools.partial(gradient, own, batches) for mode, own in learners.items()}
        times = paired_rounds(calls, dict.fromkeys(calls, self._rounds), learner.model.device)
        learner.model.zero_grad(set_to_none=True)
        norm = reference_gradient.norm()
        self.steps.append({
            "loss": {mode: result.loss for mode, (result, _) in found.items()},
            "loss_error": max(abs(found[mode][0].loss / reference.loss - 1.0) for mode in SHARING),
            "gradient_error": max(float((found[mode][1] - reference_gradient).norm() / norm) for mode in SHARING),
            "tokens": {mode: result.tokens for mode, (result, _) in found.items()},
            "round_ms": times,
        })  # fmt: skip

    def _learner(self, learner: Learner, settings: dict[str, bool]) -> Learner:
        config = self._config
        trainer = learner.trainer.model_copy(update=settings)
        return Learner(
            learner.model,
            trainer,
            make_algorithm(config.algorithm),
            total_updates=1,
            temperature=config.rollout.temperature,
        )


def gradient(learner: Learner, batches: list[PromptBatch]) -> tuple[UpdateResult, torch.Tensor]:
    """(result, gradient of all parameters as one vector) of the batches."""
    learner.model.zero_grad(set_to_none=True)
    result = learner.accumulate(batches)
    return result, torch.cat([p.grad.flatten() for p in learner.model.parameters() if p.grad is not None])


def measure(config: Config, steps: int, rounds: int) -> dict[str, Any]:
    """All results of one configuration."""
    comparison = Comparison(config, steps, rounds)
    comparison.run()
    found = comparison.steps
    times = {mode: [t for step in found for t in step["round_ms"][mode]] for mode in MODES}
    return {
        "steps": found,
        "loss_error": max(step["loss_error"] for step in found),
        "gradient_error": max(step["gradient_error"] for step in found),
        "tokens": {mode: statistics.median(step["tokens"][mode] for step in found) for mode in MODES},
        "seconds": {mode: statistics.median(times[mode]) / 1e3 for mode in MODES},
        "optimizer_s": statistics.median(result.seconds["optimizer"] for result in comparison.results),
        "ratio": {mode: median_ratio(times["unshared"], times[mode]) for mode in SHARING},
    }


def failures(result: dict[str, Any]) -> list[str]:
    """A line for every error above its limit, and every mode that is not faster."""
    off = [f"{what} is off by {result[what]:.2g}" for what in ("loss_error", "gradient_error") if result[what] > LIMIT]
    return off + [f"{mode} is not faster: {ratio:.2f}" for mode, ratio in result["ratio"].items() if ratio <= 1.0]


def table(result: dict[str, Any]) -> str:
    rows = [
        [mode, f"{result['seconds'][mode]:.3f}", f"{result['tokens'][mode]:.0f}"]
        + [f"{step['loss'][mode]:.7f}" for step in result["steps"]]
        for mode in MODES
    ]
    header = ["mode", "seconds", "tokens", *(f"loss {i + 1}" for i in range(len(result["steps"])))]
    return (
        f"{markdown(header, rows)}\n\nratio: merged {result['ratio']['merged']:.2f}, shared {result['ratio']['shared']:.2f}; "
        f"optimizer step {result['optimizer_s']:.3f} s; differences: "
        f"loss {result['loss_error']:.1e}, gradient {result['gradient_error']:.1e} (at most {LIMIT:g})"
    )


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "quickstart_sharing")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help=f"recipe settings (default: {' '.join(SHORT)})"
    )
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="optimizer steps (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="paired rounds per step (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    report = new_report("quickstart_sharing", args, settings=args.settings or SHORT)
    with tempfile.TemporaryDirectory() as folder:
        own = [f"output_dir={folder}/run", "trainer.eval_tasks=1"]  # the success rate is of no interest
        report |= measure(load_config("quickstart", [*report["settings"], *own]), args.steps, args.rounds)
    report["failures"] = failures(report)
    print(table(report))
    write_report(report, args.out)
    return exit_status(report["failures"])


if __name__ == "__main__":
    sys.exit(main())
