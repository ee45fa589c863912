"""The recipe eigendata-quickstart, cut to seconds: a user model of its own, frozen, judged in every evaluation, resumable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import eigendata
from pact_fast.errors import PactError
from pact_fast.report.rollout_files import read_lines
from pact_fast.synthesis.eigendata.generated import GeneratedHelpdesk
from tests.support.runs import RunProcess, assert_same, cut_back, metrics

RECIPE = ["eigendata-quickstart"]
SETTINGS = [
    "threads=1", "env.args={count: 24, max_issues: 1, early_stop: 0.1}",
    "pretrain.steps=3", "pretrain.user_steps=2", "pretrain.batch_size=2",
    "trainer.max_steps=2", "trainer.prompts_per_step=2", "trainer.eval_tasks=3", "trainer.save_steps=1",
    "rollout.num_generations=2", "rollout.max_turn_tokens=12", "rollout.max_completion_length=60",
    "rollout.max_prompt_length=600", "trainer.save_total_limit=9", "trainer.log_completions=0",
    "model.random_init.vocab_size=640", "model.random_init.hidden_size=32", "model.random_init.intermediate_size=32",
    "model.random_init.num_hidden_layers=2", "model.random_init.head_dim=8",
]  # fmt: skip
FLAWS = ("user_protocol_break", "user_premature_stop", "user_leak")


@pytest.mark.slow
def test_the_quickstart_trains_a_user_that_stays_as_it_is_and_resumes_bit_for_bit(tmp_path):
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    RunProcess(run, *SETTINGS, recipe=RECIPE).succeed()
    weights = {side: (run / side / "model.safetensors").read_bytes() for side in ("user", "base")}
    assert weights["user"] != weights["base"]
    records = metrics(run)
    steps = [record for record in records if "loss" in record]
    assert len(steps) == 2 and all(f"reward/{flaw}" in record for record in steps for flaw in FLAWS)
    assert all(0 <= record["reward/zero_advantage_tokens"] <= 1 for record in steps)
    assert all(f"eval/success/{flaw}" in records[0] for flaw in FLAWS)
    cut_back(run, resumed, 1)
    RunProcess(resumed, *SETTINGS, recipe=RECIPE).succeed()
    assert_same(run, resumed)
    assert (resumed / "user" / "model.safetensors").read_bytes() == weights["user"]
    # the user of one run in another, by its folder; one with another tokenizer is refused
    other = [*SETTINGS, f"rollout.user_model={run / 'user'}", f"model.tokenizer={run / 'tokenizer'}"]
    RunProcess(tmp_path / "other", *other, "trainer.max_steps=1", recipe=RECIPE).succeed()
    assert not (tmp_path / "other" / "user").exists()


@pytest.mark.slow
def test_flaws_of_the_user_are_in_the_evaluation_of_a_run_that_trains_the_user(tmp_path):
    settings = [*SETTINGS, "rollout.user=policy", "rollout.train_as=user", "trainer.max_steps=1"]
    RunProcess(tmp_path / "run", *settings, recipe=RECIPE).succeed()
    records = metrics(tmp_path / "run")
    assert all(f"eval/success/{flaw}" in records[0] for flaw in FLAWS)
    rollouts = [json.loads(line) for line in read_lines(tmp_path / "run/rollouts/step_000001.jsonl.gz")]
    assert all(
        "You are a customer" in record["prompt"] and set(FLAWS) <= set(record["reward_parts"]) for record in rollouts
    )


def test_generated_tasks_are_sound_and_no_customer_is_on_both_sides():
    tasks = GeneratedHelpdesk.tasks({"count": 40, "max_issues": 2}, 0)
    held_out, train = tasks.held_out(1000), tasks.train(0, 1000)
    assert len(held_out) + len(train) == 40  # every composed task passes its controls
    customers, words = [], []
    for half in (held_out, train):
        pairs = {(task.env_args["subject"], task.env_args["user"]["knows"]["handle"]) for task in half}
        customers.append(pairs)
        words.append({word for pair in pairs for word in pair})
    assert not customers[0] & customers[1] and words[0] & words[1]
    assert [task.id for task in tasks.train(3, 8)] == [task.id for task in tasks.train(3, 8)]
    assert [task.id for task in tasks.train(3, 8)] != [task.id for task in tasks.train(4, 8)]
    for args in ({"count": 3}, {"max_issues": 9}, {"count": "x"}, {"early_stop": 1}):
        with pytest.raises(PactError, match=r"env\.args"):
            GeneratedHelpdesk.tasks(args, 0)


def test_dialogues_of_a_hasty_agent_solve_some_tasks_and_change_none():
    """Replayed: the agent's actions in its dialogue solve the task if it continued to the end."""
    perfect, hasty = (GeneratedHelpdesk.tasks({"count": 40, "early_stop": p}, 0).train(0, 100) for p in (0.0, 0.3))
    assert [task.id for task in perfect] == [task.id for task in hasty]

    def solved(task):
        env = GeneratedHelpdesk()
        env.reset(task)
        for turn in task.expert.turns:
            for call in turn.calls:
                env.call(call.name, call.arguments)
            if turn.content:
                env.respond(turn.content)
        return env.verdict().passed

    assert all(map(solved, perfect)) and 0.1 < sum(map(solved, hasty)) / len(hasty) < 0.7
    assert all(task.expert.turns for task in hasty)


def test_shares_without_signal_by_hand(tmp_path):
    """Two steps of 100 and 300 sampled tokens per rollout, half and a quarter of them without signal."""
    steps = [
        {"step": 0, "eval/success": 0.5},
        {"step": 1, "loss": 1, "lengths/sampled_mean": 100, "reward/zero_advantage_tokens": 0.5,
         "reward/zero_advantage_groups": 0.5},
        {"step": 2, "loss": 1, "lengths/sampled_mean": 300, "reward/zero_advantage_tokens": 0.25,
         "reward/zero_advantage_groups": 0.0},
    ]  # fmt: skip
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert eigendata.signal(tmp_path) == {"tokens_without_signal": 125 / 400, "groups_without_signal": 0.25}
    filtered = [step | {"filter/groups_sampled": 10, "filter/groups_dropped": 4} for step in steps]
    path.write_text("".join(json.dumps(step) + "\n" for step in filtered))
    assert eigendata.signal(tmp_path)["groups_without_signal"] == 0.4


def test_variants_start_from_the_recipe_s_models_and_the_table_has_a_line_for_each(tmp_path, monkeypatch, capsys):
    asked = []

    def run(command, **kwargs):
        asked.append([str(part) for part in command])
        if "train" in command:
            out = next(part.removeprefix("output_dir=") for part in asked[-1] if part.startswith("output_dir="))
            (tmp_path / out).mkdir(parents=True)
            (tmp_path / out / "summary.json").write_text("{}")
            (tmp_path / out / "metrics.jsonl").write_text("")
        score = {"mean": 0.5, "low": 0.4, "high": 0.6}
        row = {"pass@1": score, "pass^2": score, "tasks": 3}
        if "eval" in command:  # of two samples each, GRPO solves one more of the second task
            place = Path(asked[-1][asked[-1].index("--out") + 1])
            place.mkdir(parents=True)
            solved = {"a": [1, 0], "b": [0, 0 if "base" in place.name else 1]}
            lines = [{"task": t, "rewards": {"success": x}} for t, xs in solved.items() for x in xs]
            (place / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return type("Done", (), {"returncode": 0, "stdout": json.dumps({"categories": {"held_out": row}})})

    monkeypatch.setattr(eigendata.subprocess, "run", run)
    folder = tmp_path / "runs"
    options = ["--seeds", "0", "--variants", "untuned_user", "unfiltered", "--samples", "2", "--folder", str(folder)]
    assert eigendata.main([*options, "--out", str(tmp_path / "out.json")]) == 0
    trained = [command for command in asked if "train" in command]
    assert len(trained) == 3 and sum("eval" in command for command in asked) == 2 * 4
    assert f"rollout.user_model={folder / 'recipe_0' / 'base'}" in trained[1]
    assert "algorithm.filter_groups.enable=false" in trained[2] and "pretrain=null" in trained[2]
    assert capsys.readouterr().out.count("50 [40, 60]") == 4 * 4
    report = json.loads((tmp_path / "out.json").read_text())
    assert len(report["results"]) == 4
    found = {(row["agent"], row["to"]): row["scripted"] for row in report["differences"]}
    assert found["recipe", "SFT"] == {"mean": 0.25, "low": 0.0, "high": 0.5}
    assert found["unfiltered", "recipe"] == {"mean": 0.0, "low": 0.0, "high": 0.0} and len(found) == 5
