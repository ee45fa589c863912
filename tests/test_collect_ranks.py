"""A step that several ranks sample has the same groups, metrics and records as on one rank."""

from __future__ import annotations

import random
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pact_fast.algorithms.base import Algorithm, PromptBatch
from pact_fast.algorithms.registry import make_algorithm
from pact_fast.batch.tree import TokenTree
from pact_fast.config import AlgorithmConfig, load_config
from pact_fast.data.types import StopReason, Task, ToolCall, Trajectory, TurnRecord
from pact_fast.distributed.world import World
from pact_fast.report.rollout_files import read_lines
from pact_fast.train.collect import RolloutCollector
from pact_fast.train.learner import UpdateResult
from pact_fast.train.metrics import control_token_prob, logged_metrics, rollout_metrics
from pact_fast.train.records import RolloutWriter
from pact_fast.train.step import Stepper
from tests.support.thread_world import run_threads

PROMPTS, ROLLOUTS = 6, 4


class Prompts:
    """An endless source."""

    def train(self, step: int, count: int) -> list[Task]:
        return [Task(f"{step}/{i}", [{"role": "user", "content": f"{step}/{i}"}]) for i in range(count)]


class Loop:
    """An agent loop whose rollouts depend on the job's random numbers alone."""

    def resolve_task(self, task: Task) -> tuple[Task, None]:
        return task, None

    def trained_view(self, task: Task) -> tuple[Task, np.ndarray]:
        return task, np.frombuffer(task.id.encode(), np.uint8).astype(np.int64)

    def run(self, jobs: list[Any], on_finish: Any = None, keep: int | None = None) -> list[Trajectory]:
        made = [self.rollout(job) for job in jobs]
        if keep is None:
            return made
        groups: dict[int, list[Trajectory]] = {}
        for job, trajectory in zip(jobs, made, strict=True):
            groups.setdefault(job.group, []).append(trajectory)
        return [trajectory for group in groups.values() for trajectory in group[:keep]]

    def rollout(self, job: Any) -> Trajectory:
        rng = random.Random(f"{job.task.id}/{job.rng_key}")
        n = rng.randint(4, 12)
        sampled = np.arange(n) % 3 != 2
        call = ToolCall("f", {"x": rng.random()})
        made = Trajectory(
            job.task.id, np.arange(3), np.array([rng.randrange(50) for _ in range(n)]), (np.arange(n) % 4).astype(np.uint8),
            np.zeros(n, np.int16), sampled, np.where(sampled, -rng.random(), np.nan).astype(np.float32),
            np.where(sampled, rng.randrange(5), -1).astype(np.int32), [TurnRecord("é", "r", "c", [call, "malformed"], ["o"])],
            rng.choice([StopReason.ANSWER, StopReason.MAX_TURNS]),
        )  # fmt: skip
        made.env_rewards = {"success": float(rng.random() < 0.4)}
        if n % 2:
            made.branches = np.array([[n // 2, 1]])
        made.metrics = {"seen": rng.random()} if rng.random() < 0.7 else {}
        return made


def collector(world: World, settings: list[str], samplers: list[int]) -> RolloutCollector:
    sizes = [f"rollout.num_generations={ROLLOUTS}", f"trainer.prompts_per_step={PROMPTS}", "trainer.max_steps=9"]
    config = load_config("quickstart", ["algorithm.name=matchtir", *sizes, *settings])
    progress = SimpleNamespace(rollouts=lambda total, name: nullcontext(lambda: None), note=lambda text: None)
    algorithm = make_algorithm(config.algorithm)
    return RolloutCollector(config, Prompts(), Loop(), algorithm, {}, samplers, world, progress)  # type: ignore[arg-type]


def as_lists(group: Any) -> Any:
    return [
        group.prompt_index, group.task.id, group.prompt_ids.tolist(), [a.tolist() for a in group.advantages],
        [(t.ids.tolist(), t.reward, t.turn_rewards, t.turns, t.env_rewards) for t in group.trajectories],
    ]  # fmt: skip


FILTERED = ["algorithm.filter_groups.enable=true", "algorithm.filter_groups.max_num_gen_batches=3"]
SETTINGS = {
    "plain": [], "oversampled": ["rollout.oversampling_factor=1.5"], "filtered": FILTERED,
    "filtered by a limit": [*FILTERED, "algorithm.filter_groups.max_mean_reward=0.3"],
}  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("ranks", "samplers"), [(2, [0, 1]), (4, [0, 1, 2, 3]), (4, [0, 2]), (3, [0])])
def test_groups_and_metrics_are_those_of_one_rank(settings, ranks, samplers):
    def work(world: World):
        made = collector(world, SETTINGS[settings], samplers if world.size > 1 else [0])
        groups, stale = made.collect(0, oldest_version=1)  # a rollout of version 0 is stale
        control = frozenset(range(10))
        metrics = [
            rollout_metrics(groups, world),
            control_token_prob(groups, control, world),
            logged_metrics(groups, world),
        ]
        return list(map(as_lists, groups)), stale, [list(map(tuple, o)) for o in made.outcomes], made.filtered, metrics

    groups, stale, outcomes, filtered, metrics = work(World())
    assert stale > 0 and all(metrics) and 0 < metrics[0]["reward/zero_advantage_tokens"] < metrics[0]["branches/mean"]
    assert [group[0] for group in groups] == list(range(PROMPTS))
    found = run_threads(work, ranks)
    assert [group for result in found for group in result[0]] == groups
    assert max(len(result[0]) for result in found) <= -(-PROMPTS // ranks)
    for rank, result in enumerate(found):
        assert result[1:4] == (stale, outcomes, filtered)
        assert result[4] == (metrics if rank == 0 else [{}, {}, {}])


class Counting(Algorithm):
    """Counts the prompts of every optimizer step, over all ranks."""

    def __init__(self, config: AlgorithmConfig) -> None:
        super().__init__(config)
        self.counted: list[tuple[int, ...]] = []

    def prompt_batches(self, groups, step):
        self.counted.append(step.over_ranks(len(groups), step.step))
        routes = ["expert" if group.prompt_index % 3 == 1 else "blend" for group in groups]
        return [PromptBatch(group, route, [TokenTree()], []) for group, route in zip(groups, routes, strict=True)]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_step_has_the_metrics_and_the_counts_of_one_rank(ranks):
    """Three optimizer steps of two prompts each: most ranks have none of them, and sum counts all the same."""

    def work(world: World):
        made = collector(world, [], list(range(world.size)))
        learner = SimpleNamespace(
            world=world, updates=3, updates_per_batch=3, model=None, prepare=lambda batches: None,
            learning_rate=lambda: 0.5, update=lambda batches: UpdateResult(tokens=1),
        )  # fmt: skip
        engine = SimpleNamespace(sleep=lambda: None, update_weights=lambda model, version: None)
        config, algorithm = load_config("quickstart", ["trainer.max_steps=9"]), Counting(AlgorithmConfig())
        renderer = SimpleNamespace(control_ids=frozenset(range(10)))
        result = Stepper(config, algorithm, learner, engine, made, renderer)(1)  # type: ignore[arg-type]
        kept = {k: v for k, v in result.metrics.items() if not k.startswith(("time/", "tokens_per_second"))}
        return kept, result.prompts, algorithm.counted

    metrics, prompts, counted = work(World())
    routes = [metrics["routes/expert_fraction"], metrics["routes/trace_fraction"]]
    assert routes == pytest.approx([1 / 3, 2 / 3])
    assert prompts == PROMPTS and counted == [(2, 1)] * 3
    for found in run_threads(work, ranks):
        assert found == (metrics, prompts, [(2, ranks)] * 3)


def test_records_are_those_of_one_rank(tmp_path):
    renderer = SimpleNamespace(token_bytes=SimpleNamespace(join=lambda ids: bytes(97 + int(i) % 26 for i in ids)))

    def work(world: World, folder, limit: int) -> None:
        groups, _ = collector(world, [], list(range(world.size))).collect(0, 0)
        batches = [PromptBatch(group, "prompt", [TokenTree()], []) for group in groups]
        writer = RolloutWriter(folder, renderer, limit, world=world)  # type: ignore[arg-type]
        writer.write_step(1, batches, PROMPTS)
        writer.write_skipped(1, batches)

    for name, limit in (("few", 8), ("all", 100)):
        one, several = tmp_path / name / "one", tmp_path / name / "several"
        for folder in (one, several):
            (folder / "rollouts").mkdir(parents=True)
        work(World(), one, limit)
        run_threads(lambda world, folder=several, limit=limit: work(world, folder, limit), 4)
        for kind, count in (("step", min(limit, PROMPTS * ROLLOUTS)), ("skipped", PROMPTS * ROLLOUTS)):
            lines = list(read_lines(one / f"rollouts/{kind}_000001.jsonl.gz"))
            assert len(lines) == count
            assert lines == list(read_lines(several / f"rollouts/{kind}_000001.jsonl.gz"))
