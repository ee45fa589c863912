"""EigenData on a CPU: SFT and GRPO of the recipe, against an untuned user, and against no filtering.

python -m benchmarks.eigendata                             the recipe, seeds 0, 1, 2
python -m benchmarks.eigendata --seeds 0 --variants recipe untuned_user unfiltered
python -m benchmarks.eigendata trainer.max_steps=30        the same with other settings

recipe        pact-fast train eigendata-quickstart: SFT of agent and user, then GRPO with dynamic filtering
untuned_user  GRPO in dialogue with the base model, which no SFT has made a user
unfiltered    GRPO without filtering: the same number of steps

The other variants start from the recipe's own agent and user, so that they differ in stage 3 alone. Every agent is evaluated
before and after stage 3 on the held-out tasks, with the tuned user and with the scripted one: pass^1 and pass^k of --samples
samples per task, with bootstrap intervals over the tasks. The second table has paired differences of pass^1 over the
tasks of all seeds: what stage 3 adds to SFT, and what a variant of it adds to the recipe.

without signal  share of the sampled tokens whose group has no signal: of those that were trained on, and of groups that
                were sampled at all
"""

from __future__ import annotations

if not __package__:  # started as a file
    from as_module import run_as_module

    run_as_module(__file__)

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import make_parser, markdown, new_report, write_report
from pact_fast.evaluation.statistics import estimate

RECIPE, BENCHMARK = "eigendata-quickstart", "helpdesk-small"
VARIANTS = ("recipe", "untuned_user", "unfiltered")
SFT = "SFT"
USERS = ("tuned", "scripted")


def train(variant: str, seed: int, folder: Path, settings: list[str]) -> dict[str, Any]:
    """Train a variant unless its run exists. Returns CPU seconds (None: it existed), and counts of the groups."""
    recipe, out = folder / f"recipe_{seed}", folder / f"{variant}_{seed}"
    own = [f"seed={seed}", f"output_dir={out}", "resume=auto", *settings]
    if variant != "recipe":
        user = recipe / ("base" if variant == "untuned_user" else "user")
        own += [
            "model.random_init=null",
            f"model.path={recipe / 'base'}",
            "pretrain=null",
            f"rollout.user_model={user}",
        ]
        own += ["algorithm.filter_groups.enable=false"] if variant == "unfiltered" else []
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    trained_before = (out / "summary.json").exists()
    if not trained_before:
        subprocess.run([sys.executable, "-m", "pact_fast", "train", RECIPE, *own], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"run": str(out), "cpu_seconds": None if trained_before else round(cpu, 1), **signal(out)}


def signal(run: Path) -> dict[str, float]:
    """Shares without signal, over all steps of a run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if "loss" in record]
    sampled = [record["lengths/sampled_mean"] for record in steps]  # as many trajectories in every step
    tokens = sum(n * record["reward/zero_advantage_tokens"] for n, record in zip(sampled, steps, strict=True))
    groups = [record for record in steps if "filter/groups_sampled" in record]
    dropped = sum(record["filter/groups_dropped"] for record in groups)
    of_all = dropped / sum(record["filter/groups_sampled"] for record in groups) if groups else None
    trained = tokens / max(sum(sampled), 1e-9)
    zero = sum(record["reward/zero_advantage_groups"] for record in steps) / max(len(steps), 1)
    return {"tokens_without_signal": trained, "groups_without_signal": zero if of_all is None else of_all}


def evaluate(seed: int, agent: str, user: str, args: argparse.Namespace) -> dict[str, Any]:
    """Scores on the held-out tasks, as `pact-fast eval` gives them. `agent`: a variant, or SFT."""
    recipe = args.folder / f"recipe_{seed}"
    model, tuned = recipe / "base" if agent == SFT else args.folder / f"{agent}_{seed}", recipe / "user"
    own = [f"seed={seed}", f"threads={args.threads}"]
    own += (
        ["rollout.user=environment", "rollout.user_model=null"]
        if user == "scripted"
        else ["rollout.user=model", f"rollout.user_model={tuned}"]
    )
    if agent == SFT:
        own += ["rollout.max_turns=12", "rollout.max_turn_tokens=48", "rollout.max_completion_length=320"]
        own += ["rollout.max_prompt_length=256"]
    command = ["eval", BENCHMARK, "--model", str(model), "--samples", str(args.samples), "--temperature", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "pact_fast", *command, "--out", str(evaluation(args.folder, seed, agent, user)), *own],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    return json.loads(done.stdout)["categories"]["held_out"]


def evaluation(folder: Path, seed: int, agent: str, user: str) -> Path:
    """The folder of an evaluation."""
    return folder / "evals" / f"{f'recipe_{seed}_base' if agent == SFT else f'{agent}_{seed}'}_{user}"


def rates(folder: Path, seed: int, agent: str, user: str) -> dict[str, float]:
    """Rate of success of every held-out task, as evaluated."""
    lines = (evaluation(folder, seed, agent, user) / "results.jsonl").read_text().splitlines()
    found: dict[str, list[float]] = {}
    for line in map(json.loads, lines):
        found.setdefault(line["task"], []).append(line["rewards"]["success"])
    return {task: sum(values) / len(values) for task, values in found.items()}


def differences(folder: Path, seeds: list[int], variants: list[str]) -> list[dict[str, Any]]:
    """Paired differences of pass^1 with 95 % bootstrap intervals, over the tasks of all seeds, which weigh the same."""
    pairs = [(variant, SFT) for variant in variants] + [
        (variant, "recipe") for variant in variants if variant != "recipe"
    ]
    found = []
    for agent, to in pairs:
        row: dict[str, Any] = {"agent": agent, "to": to}
        for user in USERS:
            values = {}
            for seed in seeds:
                ours, theirs = (rates(folder, seed, name, user) for name in (agent, to))
                values[str(seed)] = [ours[task] - theirs[task] for task in theirs]
            row[user] = estimate(values, by="task").to_json()
        found.append(row)
    return found


def _minutes(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds / 60:.1f}"


def rows(report: dict[str, Any], samples: int) -> list[list[str]]:
    """Lines of the table: each variant, and its scores with either user."""
    names = ["pass@1", f"pass^{samples}"] if samples > 1 else ["pass@1"]
    table = []
    for result in report["results"]:
        scores = [_percent(result[user][name]) for user in USERS for name in names]
        shares = [f"{result[key]:.0%}" if key in result else "" for key in SHARES]
        table.append([str(result["seed"]), result["agent"], *scores, *shares, _minutes(result.get("cpu_seconds"))])
    return table


SHARES = ("tokens_without_signal", "groups_without_signal")


def _percent(score: dict[str, float]) -> str:
    mean, low, high = (100 * score[name] for name in ("mean", "low", "high"))
    return f"{mean:.0f} [{low:.0f}, {high:.0f}]"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "eigendata")
    parser.add_argument("settings", metavar="key=value", nargs="*", help="settings that override the recipe's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="(default: 0 1 2)")
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", default=["recipe"], help="(default: recipe)")
    parser.add_argument("--samples", type=int, default=4, metavar="K", help="samples per task (default: 4)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/eigendata"), help="of the runs; finished ones are not repeated"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    report = new_report("eigendata", args, settings=args.settings, samples=args.samples, results=[])
    for seed in args.seeds:
        for variant in dict.fromkeys(["recipe", *args.variants]):
            made = train(variant, seed, args.folder, [f"threads={args.threads}", *args.settings])
            for agent in (SFT, variant) if variant == "recipe" else (variant,):
                scores = {user: evaluate(seed, agent, user, args) for user in USERS}
                label, training = (SFT, {}) if agent == SFT else (f"SFT + GRPO ({agent})", made)
                report["results"].append({"seed": seed, "agent": label, **scores, **training})
                write_report(report, args.out)
    names = ["pass^1", f"pass^{args.samples}"] if args.samples > 1 else ["pass^1"]
    heads = [f"{name}, {user} user" for user in USERS for name in names]
    print(
        markdown(
            ["seed", "agent", *heads, "tokens without signal", "groups", "CPU minutes"], rows(report, args.samples)
        )
    )
    variants = list(dict.fromkeys(["recipe", *args.variants]))
    report["differences"] = differences(args.folder, args.seeds, variants)
    write_report(report, args.out)
    names = [f"difference of pass^1, {user} user" for user in USERS]
    table = [[row["agent"], row["to"], *(_percent(row[user]) for user in USERS)] for row in report["differences"]]
    print(markdown(["stage 3", "compared with", *names], table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
