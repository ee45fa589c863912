"""Rollouts: throughput of the agent loop with both engines against raw vLLM, and the time of a weight update.

python -m benchmarks.rollout                               a model of 30 M parameters, 32 trajectories of 4 turns
python -m benchmarks.rollout --trajectories 64 --tokens 96 --server --out results.json

All configurations do the same work: the quickstart's tasks in groups of 8; turns of exactly --tokens sampled tokens; a tool's
answer between turns. A model with random weights calls no tools, so two things are forced: only its length ends a turn, and
every turn, parsed as usual, counts as one call of the task's first tool.

transformers   the agent loop with the embedded engine
vllm           the agent loop with vLLM in this process
vllm server    the agent loop with a vLLM server process (--server)
raw stream     vLLM's engine without agent loop: the next turn of a trajectory is requested when the last one has ended
raw generate   LLM.generate, all trajectories turn by turn

"Raw": the same engine object, prompts, sampling parameters and token counts, without rendering, parsing, environment and
records. The prefix cache is empty at the start of every run.

time/raw       time relative to the faster raw configuration: median over rounds of the ratio within a round. The overhead of
               the agent loop is this minus 1, and must be at most 5 %
outside s      seconds of a run outside vLLM's `step`, and the number of steps; on a busy machine, where rounds differ by more
               than 5 %, they still show the loop's cost. vLLM needs as many free cores as it has threads:
               OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind restricts it to one
weight update  loading all weights, then verifying fingerprints of those that vLLM holds, per GB of weights

Exit status 1: the overhead is above 5 %, or a configuration did other work.
"""

from __future__ import annotations

if not __package__:  # started as a file
    from as_module import run_as_module

    run_as_module(__file__)

import argparse
import contextlib
import functools
import itertools
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.harness import exit_status, make_parser, markdown, new_report, write_report
from benchmarks.measure import median_ratio, paired_rounds
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.config import Config, load_config
from pact_fast.data.sources import TaskSource
from pact_fast.data.types import Task, ToolCall, Trajectory
from pact_fast.envs.registry import EnvironmentFactory, make_tasks
from pact_fast.model.build import make_model
from pact_fast.model.tokenizer import train_tokenizer
from pact_fast.rollout.agent import AgentLoop, Job
from pact_fast.rollout.registry import make_engine
from pact_fast.rollout.vllm.colocated import import_vllm, sampling_params
from pact_fast.rollout.vllm.engine import VllmEngine
from pact_fast.rollout.vllm.transport import TurnRequest

LIMIT = 0.05
GROUP = 8
RAW = ("raw stream", "raw generate")
SHAPE = {
    "vocab_size": 8192, "head_dim": 64, "num_key_value_heads": 4, "hidden_size": 512, "intermediate_size": 1536,
    "num_hidden_layers": 8, "num_attention_heads": 8, "max_position_embeddings": 4096,
}  # fmt: skip
TINY = SHAPE | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}


class FixedRenderer(ChatRenderer):
    """Parses turns as usual, then reports each as one tool call; no token ends a turn."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.eot_ids = ()

    def parse(self, ids, tools):
        turn = super().parse(ids, tools)
        turn.attempts = [ToolCall(tools[0]["function"]["name"], {"of": "@ada"})]
        return turn


class Ended:
    """Wraps an engine: a turn that reaches its length counts as ended."""

    def __init__(self, engine):
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self, timeout: float | None = None):
        return [replace(completion, ended=True) for completion in self._engine.step(timeout)]


class Steps:
    """Counts and times vLLM's steps."""

    def __init__(self, engine):
        self._step, self.seconds, self.count = engine.step, 0.0, 0
        engine.step = self

    def __call__(self):
        begin = time.perf_counter()
        found = self._step()
        self.seconds, self.count = self.seconds + time.perf_counter() - begin, self.count + 1
        return found


@dataclass
class Work:
    """The work of a run, as token ids: prompts, and the tokens between turns."""

    prompts: list[list[int]]
    bridge_tokens: list[list[list[int]]]  # [trajectory][turn]: tokens after the turn; none after the last
    turns: int
    tokens: int
    temperature: float

    @property
    def sampled(self) -> int:
        """Tokens that all turns sample."""
        return len(self.prompts) * self.turns * self.tokens

    def ask(self, index: int, turn: int, ids: list[int]) -> TurnRequest:
        """The request of a turn: `ids` are its whole context."""
        return TurnRequest(f"{index}/{turn}", ids, self.tokens, self.temperature, 1000 * index + turn, [], 0)


class Subject:
    """Model, tasks and engines of one configuration."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self._folder = args, folder
        self.config = _config(args)
        tasks = make_tasks(self.config)
        self.renderer = FixedRenderer(_tokenizer(tasks, args.shape["vocab_size"]))
        self.model = make_model(self.config, self.renderer.tokenizer).eval()
        self.jobs = _jobs(tasks, args.trajectories)
        self.engines: dict[str, Any] = {"vllm": self._engine("colocate", self.config)}
        if args.transformers_rounds:
            rollout = self.config.rollout.model_copy(update={"engine": "transformers"})
            self.engines["transformers"] = self._engine("-", self.config.model_copy(update={"rollout": rollout}))
        if args.server:
            rollout = self.config.rollout.model_copy(update={"vllm_mode": "server"})
            self.engines["vllm server"] = self._engine("server", self.config.model_copy(update={"rollout": rollout}))

    def _engine(self, name: str, config: Config):
        engine = make_engine(config, self.model, self.renderer, folder=self._folder / name)
        engine.update_weights(self.model, 0)
        return engine

    def loop(self, engine: str) -> list[Trajectory]:
        """All trajectories, by the agent loop on an engine."""
        make_env = EnvironmentFactory(self.config)
        loop = AgentLoop(Ended(self.engines[engine]), self.renderer, make_env, self.config.rollout)
        try:
            return loop.run(self.jobs)
        finally:
            loop.close()

    def work(self) -> Work:
        """The work of the agent loop, recorded from one run."""
        done = self.loop("vllm")
        bridge_tokens = [
            [t.ids[(t.turn_ids == turn) & ~t.sampled].tolist() for turn in range(len(t.turns) - 1)] for t in done
        ]
        rollout = self.config.rollout
        prompts = [t.prompt_ids.tolist() for t in done]
        return Work(prompts, bridge_tokens, self.args.turns, self.args.tokens, rollout.temperature)

    def forget_prefixes(self) -> None:
        """Empty vLLM's prefix caches."""
        for engine in self.engines.values():
            if isinstance(engine, VllmEngine):
                engine.transport.reset_prefix_cache()

    def close(self) -> None:
        """Stop all engines."""
        for engine in self.engines.values():
            engine.shutdown()


def _config(args: argparse.Namespace) -> Config:
    settings = {
        "device": "cpu" if not torch.cuda.is_available() else "cuda",
        "model.dtype": "bfloat16" if torch.cuda.is_available() else "float32",
        "rollout.engine": "vllm",
        "rollout.max_turns": args.turns,
        "rollout.max_turn_tokens": args.tokens,
        "rollout.max_prompt_length": 512,
        "rollout.max_completion_length": args.turns * (args.tokens + 64),
        "rollout.max_batch_size": args.trajectories,
        **{f"model.random_init.{key}": value for key, value in args.shape.items()},
    }
    return load_config("quickstart", [f"{key}={value}" for key, value in settings.items()])


def _tokenizer(tasks: TaskSource, size: int):
    """A tokenizer trained on the tasks and, since they have too few words, on Python's standard library."""
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [Task(path.name, [{"role": "user", "content": path.read_text("utf-8", "replace")}]) for path in library]
    return train_tokenizer([*tasks.train(0, 100), *texts], size)


def _jobs(tasks: TaskSource, count: int) -> list[Job]:
    each = tasks.train(0, -(-count // GROUP))
    return [Job(each[index // GROUP], (0, index), 1.0) for index in range(count)]


class Raw:
    """vLLM without the agent loop, on the engine object that the agent loop uses."""

    def __init__(self, engine: VllmEngine, work: Work):
        self._vllm = import_vllm()
        self._engine, self._work = engine.transport.llm_engine, work
        with mock.patch.object(type(self._engine), "from_engine_args", return_value=self._engine):
            self._llm = self._vllm.LLM(model=self._engine.model_config.model)

    def stream(self) -> int:
        """Run all turns, each as soon as the one before has ended; returns the number of sampled tokens."""
        contexts, turns, sampled = [list(ids) for ids in self._work.prompts], [0] * len(self._work.prompts), 0
        for index, ids in enumerate(contexts):
            self._add(index, 0, ids)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if not output.finished:
                    continue
                index, ids = int(output.request_id.split("/")[0]), output.outputs[0].token_ids
                sampled += len(ids)
                turns[index] += 1
                if turns[index] < self._work.turns:
                    contexts[index] += [*ids, *self._work.bridge_tokens[index][turns[index] - 1]]
                    self._add(index, turns[index], list(contexts[index]))
        return sampled

    def _add(self, index: int, turn: int, ids: list[int]) -> None:
        asked = self._work.ask(index, turn, ids)
        self._engine.add_request(asked.key, {"prompt_token_ids": ids}, sampling_params(self._vllm, asked))

    def generate(self) -> int:
        """Run all turns by `LLM.generate`, one batch for each turn; returns the number of sampled tokens."""
        contexts, sampled = [list(ids) for ids in self._work.prompts], 0
        for turn in range(self._work.turns):
            params = [
                sampling_params(self._vllm, self._work.ask(index, turn, ids)) for index, ids in enumerate(contexts)
            ]
            prompts = [{"prompt_token_ids": ids} for ids in contexts]
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
            for context, bridge_tokens, output in zip(contexts, self._work.bridge_tokens, outputs, strict=True):
                ids = output.outputs[0].token_ids
                sampled += len(ids)
                context += [*ids, *(bridge_tokens[turn] if turn < len(bridge_tokens) else [])]
        return sampled


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Paired rounds of all methods: seconds, tokens sampled, and time inside vLLM's steps."""
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Subject(args, Path(folder))) as subject:
        work = subject.work()
        raw = Raw(subject.engines["vllm"], work)
        steps = Steps(subject.engines["vllm"].transport.llm_engine)
        sampled: dict[str, set[int]] = {}
        inside: dict[str, list[tuple[float, int]]] = {}

        def counted(name: str, call: Callable[[], int]) -> None:
            steps.seconds, steps.count = 0.0, 0
            sampled.setdefault(name, set()).add(call())
            inside.setdefault(name, []).append((steps.seconds, steps.count))

        calls: dict[str, Callable[[], int]] = {
            name: functools.partial(lambda engine: sum(int(t.sampled.sum()) for t in subject.loop(engine)), name)
            for name in subject.engines
        } | {"raw stream": raw.stream, "raw generate": raw.generate}
        timed = {name: functools.partial(counted, name, call) for name, call in calls.items()}
        rounds = {name: args.transformers_rounds if name == "transformers" else args.rounds for name in calls}
        for name in timed:
            timed[name]()  # warm
        inside.clear()
        times = paired_rounds(timed, rounds, torch.device("cpu"), subject.forget_prefixes)
        return {
            "parameters": sum(p.numel() for p in subject.model.parameters()),
            "work": {
                "trajectories": len(work.prompts), "turns": work.turns, "tokens_per_turn": work.tokens,
                "prompt_tokens": sum(map(len, work.prompts)),
                "observation_tokens": sum(len(ids) for ids in itertools.chain(*work.bridge_tokens)),
                "sampled_tokens": work.sampled,
            },
            "rows": rows(times, inside, work),
            "wrong_work": {name: sorted(found) for name, found in sampled.items() if found != {work.sampled}},
            "sync": sync(subject.engines["vllm"], subject.model, args.rounds),
        }  # fmt: skip


def rows(
    times: dict[str, list[float]], inside: dict[str, list[tuple[float, int]]], work: Work
) -> dict[str, dict[str, Any]]:
    """The numbers of every method: median seconds, tokens per second, and its time relative to the best raw use of vLLM."""
    best = min(RAW, key=lambda name: statistics.median(times[name]))
    found = {}
    for name, column in times.items():
        seconds = statistics.median(column) / 1e3
        found[name] = {
            "seconds": seconds,
            "trajectories_per_second": len(work.prompts) / seconds,
            "tokens_per_second": work.sampled / seconds,
            "ratio_to_raw": median_ratio(column, times[best]),
            "outside_seconds": statistics.median(t / 1e3 - s for t, (s, _) in zip(column, inside[name], strict=True)),
            "steps": statistics.median(count for _, count in inside[name]),
            "round_ms": column,
        }
    return found


def sync(engine: VllmEngine, model: torch.nn.Module, rounds: int) -> dict[str, float]:
    """Seconds per GB to load weights and to verify them; medians."""
    load, verify = [], []
    for version in range(1, rounds + 1):
        with torch.no_grad():
            next(model.parameters()).mul_(1.001)
        engine.update_weights(model, version)
        assert engine.sync_report is not None and engine.sync_report.verify_seconds is not None
        size = engine.sync_report.bytes / 1e9
        load.append(engine.sync_report.load_seconds / size)
        verify.append(engine.sync_report.verify_seconds / size)
    return {
        "gigabytes": size,
        "load_s_per_gb": statistics.median(load),
        "verify_s_per_gb": statistics.median(verify),
    }


def failures(result: dict[str, Any]) -> list[str]:
    """A line for every method that did other work, and for an agent loop that costs more than its limit."""
    wrong = [f"{name} sampled {found} tokens" for name, found in result["wrong_work"].items()]
    overhead = result["rows"]["vllm"]["ratio_to_raw"] - 1
    return wrong + ([f"the agent loop costs {overhead:.1%} more than raw vLLM"] if overhead > LIMIT else [])


def table(result: dict[str, Any]) -> str:
    lines = [
        [name, f"{row['seconds']:.2f}", f"{row['trajectories_per_second']:.2f}", f"{row['tokens_per_second']:.0f}",
         f"{row['ratio_to_raw']:.3f}", *([f"{row['outside_seconds']:.3f}", f"{row['steps']:.0f}"] if row["steps"] else "--")]
        for name, row in result["rows"].items()
    ]  # fmt: skip
    found, work = result["sync"], result["work"]
    return (
        f"{result['parameters'] / 1e6:.1f} M parameters; {work['trajectories']} trajectories of {work['turns']} turns of "
        f"{work['tokens_per_turn']} tokens\n\n"
        + markdown(["configuration", "seconds", "trajectories/s", "tokens/s", "time/raw", "outside s", "steps"], lines)
        + f"\n\noverhead of the agent loop {result['rows']['vllm']['ratio_to_raw'] - 1:+.1%} (at most {LIMIT:.0%}); "
        f"verified weight update: {found['load_s_per_gb']:.2f} s to load and {found['verify_s_per_gb']:.2f} s to verify "
        f"per GB ({found['gigabytes']:.3f} GB)"
    )


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "rollout")
    parser.add_argument("--trajectories", type=int, default=32, metavar="N", help="per run (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=4, metavar="N", help="per trajectory (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="sampled per turn (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds (default: %(default)s)")
    parser.add_argument(
        "--transformers-rounds", type=int, default=2, metavar="N",
        help="rounds of the embedded engine; 0 leaves it out (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--server", action="store_true", help="also measure a vLLM server process")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, as a smoke test")
    args = parser.parse_args(argv)
    args.shape = TINY if args.tiny else SHAPE
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    report = new_report("rollout", args)
    report |= measure(args)
    report["failures"] = failures(report)
    print(table(report))
    write_report(report, args.out)
    return exit_status(report["failures"])


if __name__ == "__main__":
    sys.exit(main())
