"""The parser of the command line: commands, options and help texts."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pact_fast import __version__
from pact_fast.cli import commands
from pact_fast.cli.eigendata import add_eigendata
from pact_fast.cli.mtr import add_mtr
from pact_fast.cli.traces import add_traces

EPILOG = """\
first steps:
  pact-fast doctor quickstart             check the recipe and this machine, train nothing
  pact-fast train quickstart              train a small tool-use agent on this machine, on the CPU, in minutes
  pact-fast view runs/quickstart          write an HTML page of its rollouts
  pact-fast recipes                       list all recipes

Settings are dotted keys with YAML values, after the recipe; docs/configuration.md lists them:
  pact-fast train quickstart trainer.max_steps=20 seed=1

`pact-fast COMMAND --help` explains a command with examples.
"""

TRAIN = """\
Train a policy: sample rollouts, score them, update, repeat. Takes a shipped recipe (`pact-fast recipes`) or a YAML file,
and writes checkpoints, metrics, rollouts and a report to the run directory (output_dir=).
"""
TRAIN_EXAMPLES = """\
  pact-fast train quickstart                                        on the CPU, in minutes
  pact-fast train quickstart resume=auto                            continue a run that was stopped
  pact-fast train mine.yaml trainer.learning_rate=1e-6 output_dir=runs/b
  pact-fast train mine.yaml --dry-run                               check everything, train nothing
  torchrun --nproc-per-node 8 -m pact_fast train gpu-8 data.train=train.jsonl
"""
EVAL = """\
Measure the success rate on held-out tasks, sampled (with rollout.temperature, top_p, top_k and min_p) and greedy, with
95 % intervals. The model is a run's newest checkpoint, or the one that a recipe starts from. Prints JSON, including the
sampling settings. With the name of a benchmark and --model, runs the benchmark instead: pass@1, pass^k and their
intervals by category, as a table and as JSON. An interrupted benchmark continues when you repeat the command.
"""
EVAL_EXAMPLES = """\
  pact-fast eval runs/quickstart
  pact-fast eval runs/quickstart trainer.eval_tasks=50 --out result.json
  pact-fast eval ftrl data.eval=ftrl/test.parquet --model runs/mine
  pact-fast eval bfcl --model runs/mine --category multi_turn
  pact-fast eval toolhop data.eval=ToolHop.json --model Qwen/Qwen3-1.7B --engine vllm --samples 4 --temperature 0.7
"""
ROLLOUT = """\
Sample one trajectory for each of a few tasks, and print them coloured by component, or write them as JSON Lines.
"""
ROLLOUT_EXAMPLES = """\
  pact-fast rollout runs/quickstart --tasks 2
  pact-fast rollout quickstart seed=1 --split train --out rollouts.jsonl
"""
DOCTOR = """\
Check versions, data, tokenizer, chat template, token labels, environment, prompt lengths, model, memory and kernels before a
run, one line each: ok, warn or FAIL. With rollout.engine=vllm, also start the engine and sample a few tasks. Status 1 if a
check fails. With --memory, only print the estimated peak of training memory and its parts. With a model folder or hub name,
print what works with that model: decoder, shared prefixes, engines, tool format, chat template, dialogues.
"""
DOCTOR_EXAMPLES = """\
  pact-fast doctor quickstart
  pact-fast doctor mine.yaml rollout.engine=vllm
  pact-fast doctor gpu-8 --memory --world-size 8 --zero-stage 3
  pact-fast doctor Qwen/Qwen3-0.6B
"""
PLAN = """\
Estimate time, memory and communication of one training step, and its bottleneck, before it runs. Experimental: times were
compared with measured updates on CPUs only; use them to compare settings. Needs neither weights nor data.
"""
PLAN_EXAMPLES = """\
  pact-fast plan quickstart
  pact-fast plan gpu-8 --gpus 8 --gpu h100 --prompt 1024 --trace 1024 --response 2048
  pact-fast plan gpu-8 --gpus 8 64 512 --gpu h100
"""
VIEW = """\
Write an HTML page of a run's rollouts: every token with its component, advantage and weight. Opens offline; prints its path.
"""
VIEW_EXAMPLES = """\
  pact-fast view runs/quickstart
  pact-fast view runs/quickstart --step 20 --out step20.html
"""
EXPORT = """\
Write a run's newest model and its tokenizer as one Hugging Face folder, LoRA adapters merged into the weights.
"""
EXPORT_EXAMPLES = """\
  pact-fast export runs/quickstart quickstart-model
"""
RECIPES = """\
List the shipped recipes. Each is a YAML file; comments at its beginning explain how to start it and what it requires.
"""
RECIPES_EXAMPLES = """\
  pact-fast recipes
"""
CONVERT = """\
Write the tasks of a benchmark as JSON Lines in our own columns, with expert traces for categories with a ground truth,
for data.train and data.eval.
"""
CONVERT_EXAMPLES = """\
  pact-fast data convert bfcl -o bfcl-train.jsonl --split train --category multi_turn
  pact-fast data convert ftrl data.eval=ftrl/test.parquet -o ftrl.jsonl
"""
DATA = """\
Make data to train on.
"""
DATA_EXAMPLES = """\
  pact-fast data eigendata helpdesk -o data/helpdesk
  pact-fast data mtr musique_train.jsonl -o data/mtr
  pact-fast data convert bfcl -o bfcl-train.jsonl --split train --category multi_turn
"""
BENCH = """\
List the repository's benchmarks, or run one. Works in a checkout only: benchmarks are not part of the installed package.
"""
BENCH_EXAMPLES = """\
  pact-fast bench
  pact-fast bench head --help
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="pact-fast",
        description="PACT: train multi-turn tool-use agents with expert traces.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pact-fast {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_train(subparsers)
    _add_eval(subparsers)
    _add_rollout(subparsers)
    _add_doctor(subparsers)
    _add_plan(subparsers)
    _add_view_and_export(subparsers)
    _command(subparsers, "recipes", commands.run_recipes, "list the shipped recipes", RECIPES, RECIPES_EXAMPLES)
    _add_data(subparsers)
    add_traces(subparsers, _command)
    _add_bench(subparsers)
    return parser


def _add_train(subparsers: Any) -> None:
    train = _command(
        subparsers, "train", commands.run_train, "train from a recipe or a YAML file", TRAIN, TRAIN_EXAMPLES
    )
    _recipe(train)
    train.add_argument(
        "--dry-run", action="store_true", help="run the checks of `doctor`, print the resolved settings, train nothing"
    )


def _add_eval(subparsers: Any) -> None:
    evaluate = _command(
        subparsers, "eval", commands.run_eval, "success rate of a model on held-out tasks", EVAL, EVAL_EXAMPLES
    )
    _recipe(
        evaluate, "RUN|RECIPE|FILE|BENCH", "run directory (its newest model), recipe, YAML file, or name of a benchmark"
    )
    evaluate.add_argument(
        "--out", type=Path, help="also write the result as JSON to this file; BENCH: folder of the results"
    )
    bench_options = evaluate.add_argument_group("with BENCH")
    bench_options.add_argument("--model", help="run directory, model folder or hub name, recipe or YAML file")
    bench_options.add_argument("--engine", help="rollout engine (default: that of the settings)")
    bench_options.add_argument(
        "--category", action="append", metavar="NAME", help="only this category or group; may be given several times"
    )
    bench_options.add_argument("--samples", type=int, default=1, help="samples per task, for pass^k (default: 1)")
    bench_options.add_argument(
        "--temperature", type=float, default=0.0, help="sampling temperature (default: 0, greedy)"
    )
    bench_options.add_argument("--limit", type=int, help="maximum number of tasks per category (default: all)")


def _add_rollout(subparsers: Any) -> None:
    rollout = _command(subparsers, "rollout", commands.run_rollout, "sample trajectories", ROLLOUT, ROLLOUT_EXAMPLES)
    _recipe(rollout, "RUN|RECIPE|FILE", "run directory (its newest model), recipe name or YAML file")
    rollout.add_argument("--tasks", type=int, default=4, help="number of tasks (default: 4)")
    rollout.add_argument("--split", choices=["train", "eval"], default="eval", help="tasks to sample (default: eval)")
    rollout.add_argument("--out", type=Path, help="JSON Lines file to write (default: print the trajectories)")


def _add_doctor(subparsers: Any) -> None:
    doctor = _command(
        subparsers, "doctor", commands.run_doctor, "check a run before it starts", DOCTOR, DOCTOR_EXAMPLES
    )
    _recipe(doctor, "RECIPE|FILE|MODEL", "recipe name, YAML file, model folder or hub name")
    doctor.add_argument(
        "--memory", action="store_true", help="only estimate the peak of training memory, and its parts"
    )
    doctor.add_argument("--world-size", type=int, help="with --memory: devices that train together (default: 1)")
    doctor.add_argument(
        "--zero-stage", type=int, help="with --memory: ZeRO stage, 0 to 3 (default: the settings' stage, or 0)"
    )


def _add_plan(subparsers: Any) -> None:
    plan = _command(
        subparsers, "plan", commands.run_plan, "estimate time and memory of a step (experimental)", PLAN, PLAN_EXAMPLES
    )
    _recipe(plan)
    plan.add_argument(
        "--gpus", type=int, nargs="+", default=[1], metavar="N",
        help="devices that train and sample (default: 1); several numbers are compared",
    )  # fmt: skip
    plan.add_argument(
        "--gpu",
        default="this",
        help="a100, h100, h200, b200: published peaks times assumed efficiencies; this: measure this machine (default)",
    )
    plan.add_argument("--zero-stage", type=int, help="ZeRO stage, 0 to 3 (default: the settings' stage, or 0)")
    plan.add_argument("--prompt", type=int, help="tokens of a prompt (default: rollout.max_prompt_length)")
    plan.add_argument("--trace", type=int, help="tokens of an expert trace (default: those of a response)")
    plan.add_argument(
        "--response", type=int, help="tokens of a rollout with observations (default: rollout.max_completion_length)"
    )


def _add_view_and_export(subparsers: Any) -> None:
    view = _command(subparsers, "view", commands.run_view, "an HTML page of a run's rollouts", VIEW, VIEW_EXAMPLES)
    view.add_argument("run_dir", metavar="RUN", type=Path, help="run directory")
    view.add_argument("--step", type=int, help="only this step (default: all)")
    view.add_argument("--out", type=Path, help="file to write (default: RUN/view.html)")

    export = _command(
        subparsers,
        "export",
        commands.run_export,
        "write a run's newest model for Hugging Face",
        EXPORT,
        EXPORT_EXAMPLES,
    )
    export.add_argument("run_dir", metavar="RUN", type=Path, help="run directory")
    export.add_argument("out", metavar="OUT", type=Path, help="folder to create")


def _add_data(subparsers: Any) -> None:
    data = _command(subparsers, "data", commands.run_data, "make data to train on", DATA, DATA_EXAMPLES)
    kinds = data.add_subparsers(title="what to make", metavar="KIND", required=True)
    add_eigendata(kinds, _command)
    add_mtr(kinds, _command)
    convert = _command(
        kinds, "convert", commands.run_convert, "a benchmark's tasks as data rows", CONVERT, CONVERT_EXAMPLES
    )
    _recipe(convert, "BENCH", "name of a benchmark (`pact-fast eval`), or file.py:Class")
    convert.add_argument("-o", "--out", type=Path, required=True, help="JSON Lines file to write")
    convert.add_argument(
        "--split", choices=["train", "test", "all"], default="all", help="tasks to write (default: all)"
    )
    convert.add_argument("--category", action="append", metavar="NAME", help="only this category or group")
    convert.add_argument("--limit", type=int, help="maximum number of rows per category (default: all)")


def _add_bench(subparsers: Any) -> None:
    bench = _command(
        subparsers, "bench", commands.run_bench, "list the repository's benchmarks, or run one", BENCH, BENCH_EXAMPLES
    )
    bench.add_argument("name", metavar="NAME", nargs="?", help="benchmark to run (default: list all)")
    bench.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the benchmark; --help explains them"
    )


def _command(subparsers, name: str, run: Callable, summary: str, description: str, examples: str):
    """Add a command. `summary`: its line in the list of commands; `description`, `examples`: its own help."""
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _recipe(
    parser: argparse.ArgumentParser, metavar: str = "RECIPE|FILE", text: str = "recipe name or YAML file"
) -> None:
    """Add the arguments that give a configuration: where it comes from, and overrides."""
    parser.add_argument("source", metavar=metavar, help=text)
    parser.add_argument("settings", metavar="key=value", nargs="*", help="settings to override, for example seed=1")
