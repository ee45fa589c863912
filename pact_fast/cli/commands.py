"""The commands. Each takes parsed arguments and returns an exit status; imports are local to keep `--help` fast."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pact_fast.errors import PactError


def run_train(arguments: argparse.Namespace) -> int:
    """Train, or with --dry-run check the settings."""
    from pact_fast.config import load_config

    config = load_config(arguments.source, arguments.settings)
    if arguments.dry_run:
        from pact_fast.cli.doctor import dry_run

        return dry_run(config)
    from pact_fast.train.run import Trainer

    Trainer(config).train()
    return 0


def run_eval(arguments: argparse.Namespace) -> int:
    """Evaluate a model on held-out tasks or on a benchmark."""
    if arguments.model is not None:
        from pact_fast.cli.eval_benchmark import EvalRequest, benchmark_command

        return benchmark_command(
            EvalRequest(
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
            raise PactError(f"--{option} applies to benchmarks only; give the name of a benchmark and --model")
    from pact_fast.cli.session import evaluate_command

    return evaluate_command(arguments.source, arguments.settings, arguments.out)


def run_rollout(arguments: argparse.Namespace) -> int:
    """Sample trajectories."""
    from pact_fast.cli.session import rollout_command

    return rollout_command(arguments.source, arguments.settings, arguments.tasks, arguments.split, arguments.out)


def run_doctor(arguments: argparse.Namespace) -> int:
    """Check a run or a model, or estimate memory."""
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


def run_plan(arguments: argparse.Namespace) -> int:
    """Estimate time and memory of a step."""
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


def run_view(arguments: argparse.Namespace) -> int:
    """Write the HTML page of a run's rollouts."""
    from pact_fast.report import write_view

    if not arguments.run_dir.is_dir():
        raise PactError(f"{arguments.run_dir} is not a run directory; pass the folder that `pact-fast train` printed")
    print(write_view(arguments.run_dir, out=arguments.out, step=arguments.step))
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    """Write the newest model as a Hugging Face folder."""
    from pact_fast.train.export import export

    print(export(arguments.run_dir, arguments.out))
    return 0


def run_recipes(arguments: argparse.Namespace) -> int:
    """List the shipped recipes."""
    from pact_fast.config import recipes

    for name, path in recipes().items():
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        print(f"{name:14} {first}")
    return 0


def run_convert(arguments: argparse.Namespace) -> int:
    """Write the tasks of a benchmark as data rows."""
    from pact_fast.cli.data_convert import convert_command

    return convert_command(
        arguments.source, arguments.settings, arguments.out, arguments.category, arguments.split, arguments.limit
    )


def run_data(arguments: argparse.Namespace) -> int:
    """Never run: a kind of data is required."""
    raise AssertionError("the kind of data is required")


def run_bench(arguments: argparse.Namespace) -> int:
    """List the benchmarks of the checkout, or run one in a process of its own."""
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    sources = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))}
    found = {name: text for name, text in sources.items() if '\nif __name__ == "__main__":' in text}
    if not found:
        raise PactError(
            f"no benchmarks in {folder}: they are in the repository, not in the installed package; clone it, and install it "
            "with `pip install -e .` or run `python -m benchmarks.NAME` in it"
        )
    if arguments.name is None:
        for name, text in found.items():
            print(f"{name:20} {text.splitlines()[0].strip(chr(34))}")
        return 0
    if arguments.name not in found:
        raise PactError(f"no benchmark '{arguments.name}'; there are: {', '.join(found)}")
    import subprocess

    return subprocess.call([sys.executable, str(folder / f"{arguments.name}.py"), *arguments.arguments])
