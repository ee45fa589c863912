"""Runs whose rollouts branch: killed in the middle of a step and resumed, they repeat themselves bit for bit."""

from __future__ import annotations

import functools
import json
import os
import signal

import pytest
import yaml

from pact_fast.report.rollout_files import read_lines
from tests.support.faults import at_call
from tests.support.models import TINY
from tests.support.runs import RunProcess, assert_same, metrics
from tests.support.trl_templates import tokenizer_for

pytestmark = pytest.mark.slow
FILE = """
from pact_fast.data.types import ExpertTrace, ExpertTurn, Task
from pact_fast.rollout.embedded.builder import EmbeddedBuilder
from pact_fast.rollout.embedded.engine import TransformersEngine
from tests.support.asking_user import AskingUser


class Tasks:
    def train(self, step, count):
        return [task(f"{step}-{n}") for n in range(count)]

    def held_out(self, count):
        return [task(f"held-out-{n}") for n in range(count)]


def task(name):
    turns = (ExpertTurn("There are two.", (), (), "Which one?", "Norway's."), ExpertTurn("So.", (), (), "Seven.", "Sure?"))
    return Task(name, [{"role": "user", "content": f"How warm is Oslo? {name}"}], expert=ExpertTrace(turns, "Yes.", "Hm."))


class Asking(AskingUser):
    @classmethod
    def tasks(cls, args, seed):
        return Tasks()

    def reward(self, task, trajectory):
        return {"success": len(trajectory.ids) % 3 / 2}


class Hasty(EmbeddedBuilder):
    "The embedded engine, where a quarter of all tokens end a turn."

    def build(self, model, renderer, *, folder, autocast, world):
        return TransformersEngine(model, range(0, len(renderer.tokenizer), 4), slots=8)
"""
ALGORITHMS = {"pact": ["algorithm.anchor.mode=blend", "algorithm.reward.env_weight=1"], "sdft": []}
RECIPE = {
    "model": {"random_init": {**TINY, "max_position_embeddings": 2048, "initializer_range": 0.3}},
    "rollout": {"num_generations": 3, "max_turn_tokens": 30, "max_completion_length": 400, "max_prompt_length": 1000},
    "trainer": {"max_steps": 3, "prompts_per_step": 2, "eval_tasks": 1, "save_steps": 1, "learning_rate": 1e-3,
                "log_completions": 0, "report_to": "none"},
    "threads": 1,
}  # fmt: skip


def recipe(folder, *settings: str) -> list[str]:
    tokenizer_for("qwen3_5_think").save_pretrained(folder / "tokenizer")
    (folder / "asking.py").write_text(FILE)
    (folder / "run.yaml").write_text(yaml.safe_dump(RECIPE))
    plugins = [f"env.name={folder / 'asking.py'}:Asking", f"rollout.engine={folder / 'asking.py'}:Hasty"]
    return [str(folder / "run.yaml"), f"model.tokenizer={folder / 'tokenizer'}", *plugins, *settings]


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_with_branches_that_is_killed_resumes_bit_for_bit(name, tmp_path):
    """The expert traces branch, too."""
    settings = recipe(tmp_path, f"algorithm.name={name}", *ALGORITHMS[name])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    inject = functools.partial(at_call, "pact_fast.train.learner:Learner.update", 3, kill)
    assert RunProcess(killed, recipe=settings, inject=inject).exit_code() == -signal.SIGKILL
    assert (killed / "checkpoints/step_1").exists() and not (killed / "checkpoints/step_3").exists()
    for run in (killed, whole):
        RunProcess(run, recipe=settings).succeed()
    assert_same(killed, whole)
    steps = [record for record in metrics(whole) if "loss" in record]
    assert len(steps) == 3 and all(record["branches/mean"] > 2 and record["loss"] for record in steps)
    # the sampler, which saw every branch by itself, and the trainer, which computes their tree, agree
    assert all(0 < record["mismatch/max"] < 1e-4 for record in steps)
    file = "rollouts/step_000003.jsonl.gz"
    assert (killed / file).read_bytes() == (whole / file).read_bytes()
    records = [json.loads(line) for line in read_lines(whole / file)]
    assert all(len(record["branches"]) == 3 for record in records)
    assert all(
        ("branches" in record["expert"]) == (name == "pact") for record in records
    )  # sdft needs the last one alone
