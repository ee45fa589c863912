"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import atexit
import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from pact_fast import __version__
from pact_fast.cli.eigendata import add_eigendata
from pact_fast.cli.mtr import add_mtr
from pact_fast.cli.traces import add_traces
from pact_fast.distributed.exit import skip_teardown_exit
from pact_fast.errors import EngineError, PactError, ShutdownRequested
from pact_fast.plugins import no_exit
from pact_fast.streams import discard, flush_standard_streams, open_standard_streams, say
from pact_fast.text import one_line, visible

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
95 % intervals. The model is a run's newest checkpoint, or the one that a recipe starts from. Prints JSON, which states how
it sampled. With the name of a benchmark and --model, runs the benchmark instead: pass@1, pass^k and their intervals by
category, as a table and as JSON. An interrupted benchmark continues when the same command is given again.
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
List the shipped recipes. Each is a YAML file whose first lines say how to start it and what it needs.
"""
RECIPES_EXAMPLES = """\
  pact-fast recipes
"""
CONVERT = """\
Write the tasks of a benchmark as JSON Lines in our own columns, with expert traces where the benchmark has a ground truth,
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status; a PactError is one line on standard error and status 2."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    rest = [item for item in rest if not item.startswith("--local_rank=")]  # added by the deepspeed launcher
    settings = [item for item in rest if "=" in item and not item.startswith("-")]  # settings may also follow options
    if settings != rest or (rest and not hasattr(arguments, "settings")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.settings += rest
    status = _status(arguments)
    skip_teardown_exit(status)
    return status


def entry() -> NoReturn:
    """`main` as the process: nothing that happens to its streams or at its end becomes a traceback."""
    open_standard_streams()
    logging.setLogRecordFactory(_VisibleRecord)
    try:
        status = main()
    except KeyboardInterrupt:  # again, while the first one is handled
        status = 130
    except SystemExit as stopped:  # of the argument parser
        status = stopped.code if isinstance(stopped.code, int) else 2
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    error = flush_standard_streams()
    if error is not None and status == 0:
        say(f"error: cannot write to standard output: {error.strerror}")
        status = 141 if isinstance(error, BrokenPipeError) else 2
    if any(thread is not threading.main_thread() and not thread.daemon for thread in threading.enumerate()):
        atexit._run_exitfuncs()  # Python would wait first for threads whose results nobody reads: tools under way
        os._exit(status)
    sys.exit(status)


class _VisibleRecord(logging.LogRecord):
    """A log record without control characters: libraries log what stands in files of strangers."""

    def getMessage(self) -> str:
        return visible(super().getMessage())


def _status(arguments: argparse.Namespace) -> int:
    try:
        with no_exit("code that the command ran"):
            return arguments.run(arguments) or 0
    except ShutdownRequested as stopped:
        return stopped.status
    except PactError as error:
        # the end of an engine's log has several lines
        say(f"error: {visible(str(error)) if isinstance(error, EngineError) else one_line(str(error))}")
        return 2
    except KeyboardInterrupt:
        say("interrupted; continue with resume=auto" if arguments.run is _train else "interrupted")
        return 130
    except BrokenPipeError:  # the reader of our output has exited: `pact-fast recipes | head -1`
        discard(sys.stdout)
        return 141
    except OSError as error:  # of the system, which has no traceback to show
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EIO):
            raise
        if error.filename is None:
            say(f"error: cannot write to standard output: {error.strerror}")
            discard(sys.stdout)
        else:
            say(one_line(f"error: {error.strerror}: {error.filename}"))
        return 2


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="pact-fast",
        description="PACT: train multi-turn tool-use agents with expert traces.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pact-fast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = _command(commands, "train", _train, "train from a recipe or a YAML file", TRAIN, TRAIN_EXAMPLES)
    _recipe(train)
    train.add_argument(
        "--dry-run", action="store_true", help="run the checks of `doctor`, print the resolved settings, train nothing"
    )

    evaluate = _command(commands, "eval", _eval, "success rate of a model on held-out tasks", EVAL, EVAL_EXAMPLES)
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
        "--temperature", type=float, default=0.0, help="of sampling (default: 0, which is greedy)"
    )
    bench_options.add_argument("--limit", type=int, help="at most so many tasks per category")

    rollout = _command(commands, "rollout", _rollout, "sample trajectories", ROLLOUT, ROLLOUT_EXAMPLES)
    _recipe(rollout, "RUN|RECIPE|FILE", "run directory (its newest model), recipe name or YAML file")
    rollout.add_argument("--tasks", type=int, default=4, help="number of tasks (default: 4)")
    rollout.add_argument("--split", choices=["train", "eval"], default="eval", help="which tasks (default: eval)")
    rollout.add_argument("--out", type=Path, help="JSON Lines file to write (default: print the trajectories)")

    doctor = _command(commands, "doctor", _doctor, "check a run before it starts", DOCTOR, DOCTOR_EXAMPLES)
    _recipe(doctor, "RECIPE|FILE|MODEL", "recipe name, YAML file, model folder or hub name")
    doctor.add_argument(
        "--memory", action="store_true", help="only estimate the peak of training memory, and its parts"
    )
    doctor.add_argument("--world-size", type=int, help="with --memory: devices that train together (default: 1)")
    doctor.add_argument(
        "--zero-stage", type=int, help="with --memory: ZeRO stage, 0 to 3 (default: the settings' stage, or 0)"
    )

    plan = _command(commands, "plan", _plan, "estimate time and memory of a step (experimental)", PLAN, PLAN_EXAMPLES)
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

    view = _command(commands, "view", _view, "an HTML page of a run's rollouts", VIEW, VIEW_EXAMPLES)
    view.add_argument("run_dir", metavar="RUN", type=Path, help="run directory")
    view.add_argument("--step", type=int, help="only this step (default: all)")
    view.add_argument("--out", type=Path, help="file to write (default: RUN/view.html)")

    export = _command(
        commands, "export", _export, "write a run's newest model for Hugging Face", EXPORT, EXPORT_EXAMPLES
    )
    export.add_argument("run_dir", metavar="RUN", type=Path, help="run directory")
    export.add_argument("out", metavar="OUT", type=Path, help="folder to create")

    _command(commands, "recipes", _recipes, "list the shipped recipes", RECIPES, RECIPES_EXAMPLES)
    data = _command(commands, "data", _data, "make data to train on", DATA, DATA_EXAMPLES)
    kinds = data.add_subparsers(title="what to make", metavar="KIND", required=True)
    add_eigendata(kinds, _command)
    add_mtr(kinds, _command)
    convert = _command(kinds, "convert", _convert, "a benchmark's tasks as data rows", CONVERT, CONVERT_EXAMPLES)
    _recipe(convert, "BENCH", "name of a benchmark (`pact-fast eval`), or file.py:Class")
    convert.add_argument("-o", "--out", type=Path, required=True, help="JSON Lines file to write")
    convert.add_argument("--split", choices=["train", "test", "all"], default="all", help="which tasks (default: all)")
    convert.add_argument("--category", action="append", metavar="NAME", help="only this category or group")
    convert.add_argument("--limit", type=int, help="at most so many rows per category")
    add_traces(commands, _command)
    bench = _command(commands, "bench", _bench, "list the repository's benchmarks, or run one", BENCH, BENCH_EXAMPLES)
    bench.add_argument("name", metavar="NAME", nargs="?", help="benchmark to run (default: list all)")
    bench.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the benchmark; --help explains them"
    )
    return parser


def _command(commands, name: str, run: Callable, summary: str, description: str, examples: str):
    """Add a command. `summary`: its line in the list of commands; `description`, `examples`: its own help."""
    parser = commands.add_parser(
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


def _train(arguments) -> int:
    from pact_fast.config import load_config

    config = load_config(arguments.source, arguments.settings)
    if arguments.dry_run:
        from pact_fast.cli.doctor import dry_run

        return dry_run(config)
    from pact_fast.train.run import Trainer

    Trainer(config).train()
    return 0


def _eval(arguments) -> int:
    if arguments.model is not None:
        from pact_fast.cli.eval_benchmark import Request, benchmark_command

        return benchmark_command(
            Request(
                name=arguments.source,
                model=arguments.model,
                settings=arguments.settings,
                engine=arguments.engine,
                categories=arguments.category,
                samples=arguments.samples,
                temperature=arguments.temperature,
                limit=arguments.limit,
                out=arguments.out,
            )
        )
    from pact_fast.evaluation.benchmark import benchmark

    if arguments.source in benchmark.names() and not Path(arguments.source).exists():
        raise PactError(
            f"{arguments.source} is a benchmark: add --model, a run directory, a model folder or a hub name"
        )
    for option in ("engine", "category", "limit"):
        if getattr(arguments, option) is not None:
            raise PactError(f"--{option} belongs to a benchmark; give its name and --model")
    from pact_fast.cli.session import evaluate_command

    return evaluate_command(arguments.source, arguments.settings, arguments.out)


def _rollout(arguments) -> int:
    from pact_fast.cli.session import rollout_command

    return rollout_command(arguments.source, arguments.settings, arguments.tasks, arguments.split, arguments.out)


def _doctor(arguments) -> int:
    from pact_fast.cli.model_row import is_model, model_command
    from pact_fast.config import load_config

    if is_model(arguments.source) and not arguments.memory:
        return model_command(arguments.source, arguments.settings)
    config = load_config(arguments.source, arguments.settings)
    if arguments.memory:
        from pact_fast.cli.estimate import memory_command

        return memory_command(config, arguments.world_size, arguments.zero_stage)
    if arguments.world_size is not None or arguments.zero_stage is not None:
        raise PactError("--world-size and --zero-stage belong to the memory estimate; add --memory")
    from pact_fast.cli.doctor import doctor

    return doctor(config)


def _plan(arguments) -> int:
    from pact_fast.cli.estimate import plan_command
    from pact_fast.config import load_config

    return plan_command(
        load_config(arguments.source, arguments.settings),
        gpus=arguments.gpus,
        gpu=arguments.gpu,
        zero_stage=arguments.zero_stage,
        prompt=arguments.prompt,
        trace=arguments.trace,
        response=arguments.response,
    )


def _view(arguments) -> int:
    from pact_fast.report import write_view

    if not arguments.run_dir.is_dir():
        raise PactError(f"{arguments.run_dir} is not a run directory; pass the folder that `pact-fast train` printed")
    print(write_view(arguments.run_dir, out=arguments.out, step=arguments.step))
    return 0


def _export(arguments) -> int:
    from pact_fast.train.export import export

    print(export(arguments.run_dir, arguments.out))
    return 0


def _recipes(arguments) -> int:
    from pact_fast.config import recipes

    for name, path in recipes().items():
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        print(f"{name:14} {first}")
    return 0


def _convert(arguments) -> int:
    from pact_fast.cli.data_convert import convert_command

    return convert_command(
        arguments.source, arguments.settings, arguments.out, arguments.category, arguments.split, arguments.limit
    )


def _data(arguments) -> int:
    raise AssertionError("the kind of data is required")


def _bench(arguments) -> int:
    """List the benchmarks of the checkout, or run one in a process of its own."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    sources = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))}
    found = {name: text for name, text in sources.items() if '\nif __name__ == "__main__":' in text}
    if not found:
        raise PactError(f"no benchmarks in {folder}: the installed package has none; run the command from a checkout")
    if arguments.name is None:
        for name, text in found.items():
            print(f"{name:20} {text.splitlines()[0].strip(chr(34))}")
        return 0
    if arguments.name not in found:
        raise PactError(f"no benchmark '{arguments.name}'; there are: {', '.join(found)}")
    import subprocess

    return subprocess.call([sys.executable, str(folder / f"{arguments.name}.py"), *arguments.arguments])


if __name__ == "__main__":
    entry()
