"""Dynamic sampling: groups without signal are replaced within a bound, at a cost near the least possible; runs repeat."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest

from pact_fast.algorithms.base import Group
from pact_fast.config import load_config
from pact_fast.config.schema import FilterGroupsConfig
from pact_fast.data.types import StopReason, Task, Trajectory, TurnRecord
from pact_fast.distributed.world import World
from pact_fast.errors import PactError
from pact_fast.train.collect import RolloutCollector
from pact_fast.train.filter_groups import FurtherTasks, filter_groups, has_signal
from pact_fast.train.prefetch import RolloutPrefetcher
from tests.support.runs import SETTINGS, RunProcess, assert_same, cut_back, metrics

PROMPTS = 16


class Prompts:
    """An endless source; the id of a prompt says where it stands."""

    def train(self, step: int, count: int) -> list[Task]:
        return [Task(f"{step}/{i}", [{"role": "user", "content": ""}]) for i in range(count)]

    def held_out(self, count: int) -> list[Task]:
        return []


def trajectory(reward: float, turns: tuple[float, ...] = ()) -> Trajectory:
    ids, none = np.arange(3), np.zeros(3, np.int16)
    made = Trajectory(
        "t", ids, ids, none.astype(np.uint8), none, np.ones(3, bool), np.zeros(3, np.float32), np.zeros(3, np.int32),
        [TurnRecord("", "", "")], StopReason.ANSWER,
    )  # fmt: skip
    made.reward, made.turn_rewards, made.env_rewards = reward, list(turns), {"success": reward}
    return made


def group(task: Task, rewards: list[float]) -> Group:
    return Group(task, 0, np.zeros(1, np.int64), [trajectory(reward) for reward in rewards])


def run_step(informative, bound: int, step: int = 0, prompts: int = PROMPTS):
    """(chosen groups, counts, ids of all sampled prompts in order). `informative`: id → whether its rewards differ."""
    order: list[str] = []

    def sample(tasks: list[Task], first: int) -> list[Group]:
        assert first == len(order)
        order.extend(task.id for task in tasks)
        return [group(task, [1.0, 0.0] if informative(task.id) else [1.0, 1.0]) for task in tasks]

    source, config = Prompts(), FilterGroupsConfig(enable=True, max_num_gen_batches=bound)
    first = sample(source.train(step, prompts), 0)
    further = FurtherTasks(source, 1000 + step * bound, prompts, {g.task.id for g in first})
    chosen, counts = filter_groups(first, sample, further, config, use_turns=False)
    return chosen, counts, order


def test_at_70_percent_without_signal_a_step_costs_at_most_1_3_of_what_an_oracle_needs():
    """The oracle stops at the prompt that completes the step, in the order in which they were sampled."""
    ratios, rounds = [], []
    for step in range(300):
        known: dict[str, bool] = {}
        rng = random.Random(step)

        def informative(task_id, known=known, rng=rng):
            return known.setdefault(task_id, rng.random() < 0.3)

        chosen, counts, order = run_step(informative, 12, step)
        assert len(chosen) == PROMPTS and counts.without_signal == 0 and len(set(order)) == len(order)
        assert [g.prompt_index for g in chosen] == list(range(PROMPTS))
        positions = [i for i, task_id in enumerate(order) if known[task_id]]
        oracle = max(positions[PROMPTS - 1] + 1, PROMPTS)
        ratios.append(len(order) / oracle)
        rounds.append(counts.rounds)
        assert counts.sampled == len(order) <= 12 * PROMPTS
    assert max(ratios) <= 1.3 and np.mean(ratios) <= 1.15, (np.mean(ratios), max(ratios))
    assert np.mean(rounds) <= 5, np.mean(rounds)


@pytest.mark.parametrize("bound", [1, 2, 5])
def test_a_step_never_samples_more_than_its_bound_and_never_starves(bound):
    chosen, counts, order = run_step(lambda task_id: False, bound)
    assert len(order) == bound * PROMPTS == counts.sampled == counts.dropped
    assert len(chosen) == PROMPTS == counts.without_signal
    chosen, counts, _ = run_step(lambda task_id: task_id == "0/3", bound)
    assert chosen[0].task.id == "0/3" and len({g.task.id for g in chosen}) == PROMPTS == counts.without_signal + 1


def test_a_step_whose_groups_all_have_a_signal_samples_nothing_more():
    _, counts, _ = run_step(lambda task_id: True, 4)
    assert counts.sampled == PROMPTS and counts.rounds == 0 == counts.dropped
    assert "filter/reward_mean_dropped" not in counts.metrics()


def test_prompts_that_were_used_come_again_only_when_there_are_no_others():
    class Three(Prompts):
        def train(self, step, count):
            return [Task(str((step * count + i) % 3), []) for i in range(count)]

    further = FurtherTasks(Three(), 0, 4, {"0"})
    assert [task.id for task in further.take(5)] == ["1", "2", "1", "2", "0"]


@pytest.mark.parametrize(
    ("rewards", "turns", "use_turns", "limit", "signal"),
    [
        ([0.1] * 3, [(), (), ()], False, None, False), ([0.1, 0.1, 0.2], [(), (), ()], False, None, True),
        ([1.0, 1.0], [(0.0, 1.0), (1.0, 0.0)], True, None, True), ([1.0, 1.0], [(0.0, 1.0), (1.0, 0.0)], False, None, False),
        ([1.0, 1.0, 1.0, 0.0], [()] * 4, False, 0.75, False), ([1.0, 1.0, 0.0, 0.0], [()] * 4, False, 0.75, True),
        ([0.0], [()], False, None, False), ([], [], False, None, False),
    ],
)  # fmt: skip
def test_signal(rewards, turns, use_turns, limit, signal):
    made = Group(Task("t", []), 0, np.zeros(1), [trajectory(r, t) for r, t in zip(rewards, turns, strict=True)])
    assert has_signal(made, FilterGroupsConfig(max_mean_reward=limit), use_turns) is signal


class Loop:
    """An agent loop whose rollouts succeed by chance, drawn from the job's random numbers; one call at a time."""

    def __init__(self):
        self.busy, self.sampled, self.keys = False, 0, []

    def resolve_task(self, task):
        return task, None

    def trained_view(self, task):
        return task, np.zeros(1, np.int64)

    def run(self, jobs, on_finish=None, keep=None):
        assert not self.busy
        self.busy = True
        self.sampled += len(jobs)
        self.keys += [job.rng_key for job in jobs]
        made = [
            trajectory(float(random.Random(f"{job.task.id}/{job.rng_key}").random() < 0.2)) for job in jobs
        ]  # fmt: skip
        self.busy = False
        return made


def collector(ahead: int, loop: Loop, notes: list[str], algorithm: str = "grpo", bound: int = 3) -> RolloutCollector:
    config = load_config(
        "quickstart",
        [
            f"algorithm.name={algorithm}", "algorithm.filter_groups.enable=true", "rollout.num_generations=4",
            f"algorithm.filter_groups.max_num_gen_batches={bound}", "trainer.prompts_per_step=6", "trainer.max_steps=9",
        ],
    )  # fmt: skip
    from contextlib import nullcontext

    progress = SimpleNamespace(rollouts=lambda total, name: nullcontext(lambda: None), note=notes.append)
    kind = SimpleNamespace(needs_rollouts=True, samples=lambda step: True, turn_advantages=False)
    made = RolloutCollector(config, Prompts(), loop, kind, {}, [0], World(), progress)  # type: ignore[arg-type]
    made._prefetcher = RolloutPrefetcher(made._sample, 9, ahead)
    return made


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_filtering_goes_with_prefetching_and_a_resumed_run_collects_the_same(ahead):
    def steps(first: int, loop: Loop) -> list:
        made = collector(ahead, loop, [])
        found = []
        for step in range(first, 9):
            groups, _ = made.collect(step, 0)
            found.append([(g.task.id, [t.reward for t in g.trajectories], g.advantages[0].tolist()) for g in groups])
            assert len(groups) == 6 and made.filtered and made.filtered.sampled <= 18
        made.close()
        return found

    loop = Loop()
    whole = steps(0, loop)
    assert len(set(loop.keys)) == len(loop.keys)  # no two rollouts share their random numbers
    assert steps(4, Loop()) == whole[4:]  # nothing is carried over from earlier steps
    signal = [len(set(rewards)) > 1 for step in whole for _, rewards, _ in step]
    assert np.mean(signal) > 0.95


def test_a_run_of_solved_tasks_goes_on_and_says_so(monkeypatch):
    notes: list[str] = []
    loop = Loop()
    monkeypatch.setattr(Loop, "run", lambda self, jobs, *_: [trajectory(1.0) for _ in jobs])
    made = collector(0, loop, notes)
    for step in range(2):
        groups, _ = made.collect(step, 0)
        assert len(groups) == 6 and not any(np.any(a) for g in groups for a in g.advantages)
    assert "step 1: none of 18 groups has a signal (mean reward 1.00)" in notes[0] and len(notes) == 2


def test_filtering_without_rollouts_is_refused():
    from pact_fast.algorithms.registry import make_algorithm
    from pact_fast.train.preflight import check_settings

    config = load_config("quickstart", ["algorithm.name=sft", "algorithm.filter_groups.enable=true"])
    with pytest.raises(PactError, match="filter_groups has no effect with algorithm"):
        check_settings(config, make_algorithm(config.algorithm))


REWARD = """
import zlib
def parity(completions, prompts, **kwargs):
    # three prompts of ten have a signal
    return [float(len(str(c)) % 2) if zlib.crc32(str(p).encode()) % 10 < 3 else 1.0 for c, p in zip(completions, prompts)]
"""


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "pact"])
def test_a_filtered_run_resumes_bit_for_bit(tmp_path, algorithm):
    (tmp_path / "parity.py").write_text(REWARD)
    recipe = [
        "quickstart", *SETTINGS, f"algorithm.name={algorithm}", "algorithm.filter_groups.enable=true",
        "algorithm.filter_groups.max_num_gen_batches=3", "trainer.max_steps=3", "trainer.eval_steps=null",
        "trainer.save_total_limit=9", f"algorithm.reward.functions=[{tmp_path / 'parity.py'}:parity]",
        *(["algorithm.reward.match_weight=0"] if algorithm == "pact" else []),
    ]  # fmt: skip
    whole = tmp_path / "whole"
    RunProcess(whole, recipe=recipe).succeed()
    records = [record for record in metrics(whole) if "loss" in record]
    assert all(4 <= record["filter/groups_sampled"] <= 12 for record in records)
    assert any(record["filter/rounds"] for record in records) or algorithm == "pact"
    again = cut_back(whole, tmp_path / "again", 1)
    RunProcess(again, recipe=recipe).succeed()
    assert_same(again, whole)
