"""τ²-bench end to end: PACT on telecom tickets, from rows and from the environment's own tasks."""

import json
from dataclasses import replace

import pytest
import yaml

from pact_fast.data.readers import read_tasks, write_tasks
from pact_fast.envs.tau2.tasks import make_task, training_ids
from tests.support.models import TINY
from tests.support.runs import RunProcess, metrics
from tests.support.tau2 import needs_tau2

pytestmark = [needs_tau2, pytest.mark.slow]


def short_rows(path, solo, count):
    """Tasks without the policy, and with the tools of their traces alone: a tiny model reads 23k characters slowly."""
    tasks = []
    for task_id in training_ids("telecom", "base")[:count]:
        task = make_task("telecom", task_id, solo)
        used = {call.name for call in task.expert.calls} or {"get_details_by_id"}
        prompt = [{"role": "system", "content": "Solve the ticket."}, task.prompt[-1]]
        tasks.append(replace(task, prompt=prompt, tools=[t for t in task.tools if t["function"]["name"] in used]))
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
