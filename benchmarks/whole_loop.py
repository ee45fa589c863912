"""The whole RL loop against TRL's GRPOTrainer: time per step, time to the same held-out success, where the time goes.

python -m benchmarks.whole_loop                                        three seeds, a Qwen3 of 1 M parameters
python -m benchmarks.whole_loop --seeds 0 1 --model models/smollm2     a model of yours, after the same pretraining
python -m benchmarks.whole_loop --quick                                whether it runs at all, in seconds

One class in the form of TRL's `environment_factory` (benchmarks/whole_loop_task.py: multi-hop look-ups, reward 0 or 1) is
trained by pact_fast's `grpo` and by TRL with the same base model, tokenizer, chat template, rows in the same order, prompts
and rollouts per step, limits of turns and tokens, temperature, loss, AdamW and clipping; each side writes its checkpoints.
The base is random weights pretrained on noisy traces of such tasks. TRL's settings, and why they are its best here, are in
benchmarks/whole_loop_trl.py. One side runs after the other in this process, in an order that alternates from seed to seed;
one thread unless OMP_NUM_THREADS says otherwise.

Before anything is timed, TRL is given a step's rollouts of ours: prompts, tool calls, observations and their tokens, rewards
and the gradient must be the same. Two differences remain: random numbers, and a malformed call, which ends a rollout of
TRL's, while ours gets an error and continues (the base rarely writes one).

ms/step         of training steps with their checkpoints, without start-up and evaluation, mean; wall clock, and CPU time,
                which other programs disturb less
TRL / ours      median over all pairs of steps (same seed, same step, same prompts) of the ratio, and its quartiles
threshold       halfway between the base's success and the lower of both final successes, or --threshold; the time to it is
                interpolated between evaluations, which both sides' checkpoints get from the same evaluator, on the same tasks
decomposition   each moment belongs to the innermost wrapped function; its sum is checked against the clock

Exit status 1: the sides do not do the same work, a decomposition does not add up, the success of both sides differs by more
than 0.15 (mean over all evaluations), or TRL's time to the threshold is less than twice ours. --quick looks at the first two.
"""

from __future__ import annotations

if not __package__:  # started as a file
    from as_module import run_as_module

    run_as_module(__file__)

import argparse
import dataclasses
import gc
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import whole_loop_report as reporting
from benchmarks.harness import exit_status, log, make_parser, new_report, write_report
from benchmarks.whole_loop_check import disagreements
from benchmarks.whole_loop_pact import Base, Budget, make_base, run_pact, success_of
from benchmarks.whole_loop_task import LookupTasks, write_rows
from benchmarks.whole_loop_trl import run_trl

TINY = Budget(
    hops=(1, 2), steps=2, points=1, prompts=2, generations=4, turns=3, turn_tokens=12, tokens=96, evaluated=4, pretraining=1,
    shape={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 16},
)  # fmt: skip


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "whole_loop")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of tasks and sampling (default: 0 1 2)"
    )
    parser.add_argument("--model", type=Path, help="folder of a model to pretrain in place of random weights")
    parser.add_argument("--quick", action="store_true", help="a tiny budget and model, one seed")
    for name in (
        "steps",
        "points",
        "prompts",
        "generations",
        "turns",
        "turn_tokens",
        "tokens",
        "pretraining",
        "evaluated",
    ):
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, help=f"(default: {getattr(Budget, name)})")
    parser.add_argument("--learning-rate", type=float, help=f"(default: {Budget.learning_rate})")
    parser.add_argument("--micro", type=int, default=8, help="TRL: sequences of a backward pass (default: %(default)s)")
    parser.add_argument("--continuous-batching", action="store_true", help="TRL: use_transformers_continuous_batching")
    parser.add_argument("--threshold", type=float, help="success to which the time is taken")
    parser.add_argument(
        "--work", type=Path, help="folder for the base and all runs, which is kept (default: a temporary one)"
    )
    parser.add_argument("--resume", action="store_true", help="do not repeat the runs that the file --out has already")
    args = parser.parse_args(argv)
    if args.resume and not args.out:
        parser.error("--resume needs --out")
    args.budget = budget_of(args)
    if args.budget.steps % args.budget.points or args.budget.rollouts % args.micro:
        parser.error("--steps must be a multiple of --points, and rollouts of a step a multiple of --micro")
    if args.quick:
        args.seeds = args.seeds[:1]
    return args


def budget_of(args: argparse.Namespace) -> Budget:
    given = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(Budget)}
    return dataclasses.replace(TINY if args.quick else Budget(), **{k: v for k, v in given.items() if v is not None})


def run_side(side: str, args: argparse.Namespace, base: Base, files: Path, seed: int) -> dict[str, Any]:
    """Train and evaluate; the run's folder is removed unless --work is set."""
    budget, out = args.budget, files / side
    shutil.rmtree(out, ignore_errors=True)
    gc.collect()
    if side == "trl":
        times, rewards, models = run_trl(
            budget, base, files / "train.jsonl", out, seed, args.micro, args.continuous_batching
        )
    else:
        times, rewards, models = run_pact(budget, base, files / "train.jsonl", out, seed)
    curve = [success_of(model, base, budget, files / "eval.jsonl", seed) for model in models]
    return {
        "side": side, "seed": seed, "steps": times.steps, "phases": times.seconds, "unexplained": times.unexplained(),
        "rewards": rewards, "success": curve,
    }  # fmt: skip


def run_seed(args: argparse.Namespace, report: dict[str, Any], base: Base, work: Path, seed: int, first: int) -> None:
    """The runs of both sides with a seed; `first`: which of them begins."""
    budget, files = args.budget, work / f"seed-{seed}"
    files.mkdir(parents=True, exist_ok=True)
    tasks = LookupTasks(seed, budget.hops)
    write_rows(files / "train.jsonl", tasks.train(0, budget.steps * budget.prompts))
    write_rows(files / "eval.jsonl", tasks.held_out(budget.evaluated))
    if str(seed) not in report["base"]:
        report["base"][str(seed)] = success_of(base.model, base, budget, files / "eval.jsonl", seed)
    for side in (reporting.SIDES * 2)[first : first + 2]:
        if any((run["side"], run["seed"]) == (side, seed) for run in report["runs"]):
            continue
        log(f"seed {seed}: {side}")
        report["runs"].append(run_side(side, args, base, files, seed))
        write_report(report, args.out)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Settings that a resumed run must have in common with the previous one, as JSON data."""
    return json.loads(
        json.dumps(
            {
                **dataclasses.asdict(args.budget), "model": args.model and str(args.model), "micro": args.micro,
                "continuous_batching": args.continuous_batching, "threads": torch.get_num_threads(),
            }
        )
    )  # fmt: skip


def opened(args: argparse.Namespace) -> dict[str, Any]:
    """A new report, with the runs of the file that is resumed."""
    report = new_report("whole_loop", args, settings=settings_of(args), base={}, runs=[])
    if args.resume and args.out.exists():
        earlier = json.loads(args.out.read_text())
        if earlier["settings"] == report["settings"]:
            report |= {"base": earlier["base"], "runs": earlier["runs"]}
        else:
            log(f"{args.out} has other settings, and is overwritten")
    return report


def measure(args: argparse.Namespace, work: Path) -> int:
    report = opened(args)
    log("base model")
    base = make_base(args.budget, work / "base", args.model)
    rows = work / "check.jsonl"
    write_rows(rows, LookupTasks(2000, args.budget.hops).train(0, args.budget.prompts))
    log("comparing prompts, observations, rewards and gradients")
    failures = disagreements(args.budget, base, rows)  # both sides are warm afterwards
    for number, seed in enumerate(args.seeds):
        run_seed(args, report, base, work, seed, number % 2)
    report["summary"] = reporting.summary(report, args.threshold)
    failures += reporting.failures(report, quick=args.quick)
    report["failures"] = failures
    write_report(report, args.out)
    print(reporting.tables(report))
    return exit_status(failures)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory() as folder:
        return measure(args, args.work or Path(folder))


if __name__ == "__main__":
    sys.exit(main())
