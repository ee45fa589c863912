"""One rank of a training step without a model, among simulated ranks with the same data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from pact_fast.algorithms.base import PromptBatch
from pact_fast.algorithms.registry import make_algorithm
from pact_fast.batch.parts import assign
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.components import Component
from pact_fast.config import load_config
from pact_fast.data.types import Task, ToolCall, Trajectory, TurnRecord
from pact_fast.distributed.serialization import decode, encode
from pact_fast.distributed.world import World
from pact_fast.envs.lookup_chain import LookupChainTasks
from pact_fast.model.tokenizer import train_tokenizer
from pact_fast.train.collect import RolloutCollector
from pact_fast.train.learner import UpdateResult, loss_table_to_tensors
from pact_fast.train.packs import make_packs
from pact_fast.train.progress import Progress
from pact_fast.train.step import Stepper

TURNS, PACK_TOKENS = 8, 16_384
PER_TOKEN, PER_PAIR = 4.9e10, 4e5  # FLOPs of an 8B model; only their ratio counts


def flops(tokens: int, pairs: int) -> float:
    """FLOPs of decoder tokens and query-key pairs."""
    return PER_TOKEN * tokens + PER_PAIR * pairs


@dataclass(frozen=True)
class ImaginedWorld(World):
    """A rank whose peers have the same data. Their messages are decoded; the cost of simulating them is in `spent`.

    parts of packs  a peer's parts for this rank follow from the assignment, and look like this rank's own
    """

    spent: list[float] = field(default_factory=lambda: [0.0])
    tables: list[np.ndarray] = field(default_factory=list)

    def all_gather(self, value: Any, what: str = "data") -> list[Any]:
        data = encode(value)
        if what == "the size of packs" and value.ndim == 2:
            self.tables[:] = [value] * self.size
        return [decode(data) for _ in range(self.size)]

    def broadcast_from_main(self, make: Any, what: str = "data") -> Any:
        return decode(encode(make()))

    def all_reduce_sum(self, values: torch.Tensor, what: str = "statistics") -> torch.Tensor:
        return values.detach().to(torch.float64) * self.size

    def all_to_all(self, values: Any, what: str = "data") -> list[Any]:
        messages = [None if value is None or r == self.rank else encode(value) for r, value in enumerate(values)]
        with self._imagining():
            if what == "the parts of packs":
                replies = self._parts(values)
            elif values[0] is not None:  # gathered on rank 0
                replies = [encode(values[0])] * self.size if self.is_main else [None] * self.size
            else:
                replies = [None] * self.size
        del messages
        return [values[r] if r == self.rank else reply and decode(reply) for r, reply in enumerate(replies)]

    @contextlib.contextmanager
    def _imagining(self) -> Iterator[None]:
        began = time.process_time()
        yield
        self.spent[0] += time.process_time() - began

    def _parts(self, outgoing: list[Any]) -> list[bytes | None]:
        """Return the messages of every rank: the parts of this rank's packs, shaped as those that it sends."""
        sent = [message for messages in outgoing if messages for message in messages.values()]
        each = len(self.tables[0])
        bins, table = assign(np.concatenate(self.tables), PACK_TOKENS, self.replicas, flops)
        wanted: list[dict[str, Any]] = [{} for _ in range(self.size)]
        for number in (n for row in table for n in bins[row[self.replica]]):
            if number // each != self.rank:
                wanted[number // each][str(number)] = sent[number % each % len(sent)]
        return [encode(messages) if messages else None for messages in wanted]


class InstantLoop:
    """In place of the agent loop: rollouts of random tokens."""

    def __init__(self, renderer: ChatRenderer, tokens: int):
        self._renderer, self._tokens, self._rng = renderer, tokens, np.random.default_rng(0)
        self.spent = 0.0  # seconds of CPU time

    def resolve_task(self, task: Task) -> tuple[Task, None]:
        return task, None

    def trained_view(self, task: Task) -> tuple[Task, np.ndarray]:
        return task, self._renderer.prompt_ids(task.prompt, task.tools)

    def run(self, jobs: list[Any], on_finish: Any = None, keep: int | None = None) -> list[Trajectory]:
        began = time.process_time()
        made = [self._rollout(job.task) for job in jobs]
        self.spent += time.process_time() - began
        return made

    def _rollout(self, task: Task) -> Trajectory:
        n, rng = self._tokens, self._rng
        turn = np.arange(n) * TURNS // n
        within = np.arange(n) * TURNS % n / n
        sampled = within < 0.8  # the rest are observations
        components = np.where(
            sampled, np.where(within < 0.6, Component.REASONING, Component.TOOL_CALL), Component.OBSERVATION
        )
        text = "an observation of some words " * 20
        return Trajectory(
            task_id=task.id, prompt_ids=self._renderer.prompt_ids(task.prompt, task.tools), ids=rng.integers(0, 500, n),
            components=components.astype(np.uint8), turn_ids=turn.astype(np.int16), sampled=sampled,
            logprobs=np.where(sampled, -rng.random(n), np.nan).astype(np.float32),
            versions=np.where(sampled, 0, -1).astype(np.int32),
            turns=[TurnRecord(text * 4, text, "", [ToolCall("look_up", {"key": "x"})], [text]) for _ in range(TURNS)],
            stop_reason="answer", env_rewards={"success": float(rng.random() < 0.5)},
        )  # fmt: skip


class NoModel:
    """In place of the learner: packs and loss tables, no forward pass."""

    updates, updates_per_batch, model = 0, 1, None

    def __init__(self, world: World):
        self.world, self._rng = world, np.random.default_rng(1)

    def prepare(self, batches: list[PromptBatch]) -> None: ...

    def learning_rate(self) -> float:
        return 1e-6

    def update(self, batches: list[PromptBatch]) -> UpdateResult:
        packs = make_packs(batches, flops, max_tokens=PACK_TOKENS, world=self.world, share=True, merge=True)
        differences = []
        for pack in packs.packs:
            tokens, _ = loss_table_to_tensors(pack.batch, pack.scored)
            column = self._rng.normal(0, 1e-3, len(tokens)).astype(np.float32)
            differences.append(np.stack([tokens.component.numpy().astype(np.float32), column], 1))
        return UpdateResult(**vars(packs.cost), logprob_diff=differences)


@dataclass(frozen=True)
class RankStep:
    """A step of one rank, called as `rank_step(step)`."""

    stepper: Stepper
    world: ImaginedWorld
    loop: InstantLoop

    def __call__(self, step: int) -> float:
        """Seconds of CPU time, without those of making rollouts and of imagining the other ranks."""
        self.world.spent[0] = self.loop.spent = 0.0
        began = time.process_time()
        self.stepper(step)
        return time.process_time() - began - self.world.spent[0] - self.loop.spent


def make_step(prompts: int, ranks: int, tokens: int = 4096, rollouts: int = 16) -> RankStep:
    """A step of rank 0 of `ranks` with `prompts` prompts, all of which have traces."""
    config = load_config(
        "quickstart",
        [
            f"trainer.prompts_per_step={prompts}", "trainer.prompts_per_update=null", f"rollout.num_generations={rollouts}",
            "algorithm.anchor.mode=gate", f"rollout.max_completion_length={tokens}",
        ],
    )  # fmt: skip
    tasks = LookupChainTasks("train", 0)
    renderer = ChatRenderer(train_tokenizer(tasks.tasks(100), 512))
    world, algorithm = ImaginedWorld(0, ranks), make_algorithm(config.algorithm)
    drawn = tasks.tasks(prompts)
    source, loop = SimpleNamespace(train=lambda step, count: drawn), InstantLoop(renderer, tokens)
    collector = RolloutCollector(config, source, loop, algorithm, {}, list(range(ranks)), world, Progress(quiet=True))  # type: ignore[arg-type]
    engine = SimpleNamespace(sleep=lambda: None, update_weights=lambda model, version: None)
    stepper = Stepper(config, algorithm, NoModel(world), engine, collector, renderer)  # type: ignore[arg-type]
    return RankStep(stepper, world, loop)
