"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pact_fast import __version__
from pact_fast.distributed.exit import skip_teardown_exit
from pact_fast.errors import PactError
from pact_fast.train.shutdown import ShutdownRequested

EPILOG = """\
first steps:
  pact-fast train quickstart              train a small tool-use agent on this machine, on the CPU
  pact-fast view runs/quickstart          look at its rollouts
  pact-fast recipes                       what else is shipped

settings are dotted keys with YAML values: pact-fast train quickstart trainer.max_steps=20 seed=1
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status. A PactError is one line on standard error and status 2."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    rest = [
        item for item in rest if not item.startswith("--local_rank=")
    ]  # the deepspeed launcher says it to everybody
    settings = [item for item in rest if "=" in item and not item.startswith("-")]  # settings may also follow an option
    if settings != rest or (rest and not hasattr(arguments, "settings")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.settings += rest
    status = _status(arguments)
    skip_teardown_exit(status)
    return status


def _status(arguments: argparse.Namespace) -> int:
    try:
        return arguments.run(arguments) or 0
    except ShutdownRequested as stopped:
        return stopped.status
    except PactError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; continue with resume=auto", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone: `pact-fast recipes | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pact-fast",
        description="PACT: train multi-turn tool-use agents with expert traces.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pact-fast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    train = _command(commands, "train", _train, "train from a recipe or a YAML file")
    _recipe(train)
    train.add_argument(
        "--dry-run", action="store_true", help="check everything, print the resolved settings, train nothing"
    )

    evaluate = _command(commands, "eval", _eval, "success of a model on held-out tasks, sampled and greedy")
    _recipe(evaluate, "RUN|RECIPE|FILE", "run directory (its newest model), recipe name or YAML file")
    evaluate.add_argument("--out", type=Path, help="also write the result as JSON here")

    rollout = _command(commands, "rollout", _rollout, "sample trajectories and write them as JSONL")
    _recipe(rollout, "RUN|RECIPE|FILE", "run directory (its newest model), recipe name or YAML file")
    rollout.add_argument("--tasks", type=int, default=4, help="number of tasks (default: 4)")
    rollout.add_argument("--split", choices=["train", "eval"], default="eval", help="which tasks (default: eval)")
    rollout.add_argument("--out", type=Path, help="file to write (default: print them)")

    doctor = _command(commands, "doctor", _doctor, "check template, parser, masks, environment and model before a run")
    _recipe(doctor)
    doctor.add_argument(
        "--memory", action="store_true", help="only estimate the peak of training memory, and what it is made of"
    )
    doctor.add_argument("--world-size", type=int, help="with --memory: devices that train together (default: 1)")
    doctor.add_argument(
        "--zero-stage", type=int, help="with --memory: ZeRO stage, 0 to 3 (default: the settings', or 0)"
    )

    plan = _command(commands, "plan", _plan, "estimate time, memory and communication of a step before it runs")
    _recipe(plan)
    plan.add_argument("--gpus", type=int, default=1, help="devices that train and sample (default: 1)")
    plan.add_argument(
        "--gpu",
        default="this",
        help="a100, h100, h200, b200: published peaks times assumed efficiencies; this: measure this machine (default)",
    )
    plan.add_argument("--zero-stage", type=int, help="ZeRO stage, 0 to 3 (default: the settings', or 0)")
    plan.add_argument("--prompt", type=int, help="tokens of a prompt (default: rollout.max_prompt_length)")
    plan.add_argument("--trace", type=int, help="tokens of an expert trace (default: those of a response)")
    plan.add_argument(
        "--response", type=int, help="tokens of a rollout, observations too (default: rollout.max_completion_length)"
    )

    view = _command(commands, "view", _view, "an HTML page of a run's rollouts, coloured by component")
    view.add_argument("run_dir", metavar="RUN", type=Path, help="run directory")
    view.add_argument("--step", type=int, help="only this step (default: all)")
    view.add_argument("--out", type=Path, help="file to write (default: RUN/view.html)")

    export = _command(
        commands, "export", _export, "write a run's newest model as Hugging Face weights, adapters merged"
    )
    export.add_argument("run_dir", metavar="RUN", type=Path, help="run directory")
    export.add_argument("out", metavar="OUT", type=Path, help="folder to make")

    _command(commands, "recipes", _recipes, "list the shipped recipes")
    bench = _command(commands, "bench", _bench, "list the benchmarks of a checkout, or run one")
    bench.add_argument("name", metavar="NAME", nargs="?", help="benchmark to run (default: list all)")
    bench.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of the benchmark; --help explains them"
    )
    return parser


def _command(commands, name: str, run: Callable, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def _recipe(
    parser: argparse.ArgumentParser, metavar: str = "RECIPE|FILE", text: str = "recipe name or YAML file"
) -> None:
    parser.add_argument("source", metavar=metavar, help=text)
    parser.add_argument(
        "settings", metavar="key=value", nargs="*", help="settings that override it, for example seed=1"
    )


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
    from pact_fast.cli.session import evaluate_command

    return evaluate_command(arguments.source, arguments.settings, arguments.out)


def _rollout(arguments) -> int:
    from pact_fast.cli.session import rollout_command

    return rollout_command(arguments.source, arguments.settings, arguments.tasks, arguments.split, arguments.out)


def _doctor(arguments) -> int:
    from pact_fast.config import load_config

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
        raise PactError(f"{arguments.run_dir} is no run directory; pass the folder that `pact-fast train` printed")
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
    sys.exit(main())
