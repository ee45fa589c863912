"""τ²-bench end to end: PACT on telecom's rows, and GRPO whose rewards the package's own evaluator confirms."""

import functools
import json
import os
from dataclasses import replace

import pytest
import yaml

from pact_fast.data.readers import read_tasks, write_tasks
from pact_fast.envs.tau2.tasks import make_task, training_ids
from tests.support import tau2_run
from tests.support.models import TINY
from tests.support.runs import RunProcess, metrics
from tests.support.tau2 import needs_tau2

pytestmark = [needs_tau2, pytest.mark.slow]


def short_rows(path, solo, count, named=True):
    """Tasks without the policy, and with the tools of their traces alone: a tiny model reads 23k characters slowly.

    `named`: a row names its environment, else that of the run plays it.
    """
    tasks = []
    for task_id in training_ids("telecom", "base")[:count]:
        task = make_task("telecom", task_id, solo)
        used = {call.name for call in task.expert.calls} or {"get_details_by_id"}
        prompt = [{"role": "system", "content": f"Solve the ticket {task_id}."}, task.prompt[-1]]
        tasks.append(
            replace(
                task,
                env=task.env if named else None,
                prompt=prompt,
                tools=[t for t in task.tools if t["function"]["name"] in used],
            )
        )
    write_tasks(path, tasks)
    return tasks


@pytest.mark.parametrize("solo", [True, False])
def test_two_pact_steps_on_telecom(tmp_path, solo):
    rows = tmp_path / "rows.jsonl"
    written = short_rows(rows, solo, 6)
    assert [task.expert for task in read_tasks(str(rows))] == [task.expert for task in written]
    assert solo or any(turn.user for task in written for turn in task.expert.turns)
    rollout = {"num_generations": 2, "max_turns": 2, "max_turn_tokens": 8, "max_completion_length": 400}
    settings = {
        "model": {"random_init": TINY | {"max_position_embeddings": 16384}},
        "data": {"train": str(rows), "eval": str(rows)},
        "rollout": {**rollout, "max_prompt_length": 8000},
        "trainer": {"max_steps": 2, "prompts_per_step": 2, "eval_tasks": 2, "save_steps": 2},
        "threads": 1,
    }
    recipe = tmp_path / "tau2.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    run = tmp_path / "run"
    RunProcess(run, recipe=[str(recipe)]).succeed()
    steps = [record for record in metrics(run) if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2]
    assert json.loads((run / "summary.json").read_text())["steps"] == 2


FULL = pytest.param(20, marks=pytest.mark.skipif(not os.environ.get("PACT_TEST_TAU2_FULL"), reason="takes minutes"))


@pytest.mark.parametrize("count", [2, FULL])
def test_rewards_of_rl_on_telecom_are_those_of_the_package_s_evaluator(tmp_path, count):
    """GRPO, two steps of 4 rollouts per task with the scripted user: every episode is judged again by the package.

    A tiny policy solves nothing, so every second rollout plays the expert trace: rewards differ within groups. All 20 tasks
    take minutes: PACT_TEST_TAU2_FULL=1.
    """
    from benchmarks.tau2_reference import Event, package_verdict

    rows, episodes = tmp_path / "rows.jsonl", tmp_path / "episodes.jsonl"
    tasks = short_rows(rows, False, count, named=False)
    limits = {"max_turns": 40, "max_turn_tokens": 400, "max_completion_length": 12000, "max_prompt_length": 8000}
    settings = {
        "model": {"random_init": TINY | {"max_position_embeddings": 32768}},
        "data": {"train": str(rows)},
        "env": {"name": "tests.support.tau2_run:Watched"},
        "rollout": {
            "engine": "tests.support.tau2_run:HalfExpert",
            "num_generations": 4,
            "max_user_turns": 12,
            **limits,
        },
        "algorithm": {"name": "grpo"},
        "trainer": {"max_steps": 2, "prompts_per_step": count, "save_steps": 2, "max_tokens_per_pack": 32768},
        "threads": 1,
    }
    recipe = tmp_path / "tau2.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    run = tmp_path / "run"
    RunProcess(run, recipe=[str(recipe)], inject=functools.partial(tau2_run.name_files, rows, episodes)).succeed()
    steps = [record for record in metrics(run) if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2]
    played = [json.loads(line) for line in episodes.read_text().splitlines()]
    assert len(played) == 2 * 4 * count and {one["task"] for one in played} == {task.env_args["task"] for task in tasks}
    for one in played:
        events = [Event(c["side"], "", c["name"], c["arguments"], c["answer"]) for c in one["calls"]]
        events += [Event("assistant", text) for text in one["said"]]
        verdict = package_verdict("telecom", one["task"], events, False, one["ending"] or "max_steps")
        assert verdict["reward"] == one["success"], one
    assert {one["success"] for one in played} == {0.0, 1.0}
    assert all(record["reward/success"] > 0 for record in steps if "reward/success" in record)
    assert all(0 < record["success"] < 1 for record in steps)
