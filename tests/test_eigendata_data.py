"""Output of `pact-fast data eigendata`: readable and playable rows, no leakage, a report, and no loss by kills."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pact_fast.cli.main import main
from pact_fast.data.readers import read_tasks
from pact_fast.envs.domain.controls import Finding
from pact_fast.envs.domain.instance import Instance
from pact_fast.envs.registry import environment
from pact_fast.synthesis.eigendata import quality
from pact_fast.synthesis.eigendata.engine import DataEngine, Settings
from pact_fast.synthesis.eigendata.engine import silent as engine_silent
from pact_fast.synthesis.eigendata.export import export
from pact_fast.synthesis.eigendata.report import write_report
from tests.support import eigendata as support
from tests.support.models import TINY
from tests.support.runs import RunProcess, metrics

DOMAIN = support.helpdesk()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("eigen") / "data"
    assert (
        main(["data", "eigendata", "helpdesk", "-o", str(out), "--rounds", "2", "--count", "60", "--plans", "24"]) == 0
    )
    return out


def test_rows_are_read_again_and_their_tasks_are_sound(folder):
    train = read_tasks(str(folder / "train.jsonl"), environments=environment.names())
    held_out = read_tasks(str(folder / "held_out.jsonl"), environments=environment.names())
    assert len(train) + len(held_out) >= 57 and len(held_out) >= 5
    for task in train[:20]:
        instance = Instance.from_json(task.env_args)
        assert instance.id == task.id and task.env == "helpdesk" and not support.failing_controls(DOMAIN, instance)
        assert instance.user.opening == task.prompt[-1]["content"]
        assert task.expert and any(turn.user for turn in task.expert.turns)
        assert set(task.columns["pass_rates"]) == {"careful", "average", "weak"}
    subjects = [{task.env_args["subject"] for task in tasks} for tasks in (train, held_out)]
    assert not subjects[0] & subjects[1]


def test_an_independent_replay_confirms_a_whole_folder_and_finds_a_wrong_task(tmp_path, folder, capsys):
    for name in ("train.jsonl", "held_out.jsonl"):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()[:8]]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert support.confirm(tmp_path) == 0
    rows[0]["env_args"]["checker"] |= {"compare": False, "assertions": [], "say": []}
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert support.confirm(tmp_path) == 1 and "nothing passes" in capsys.readouterr().out


def test_accepted_tasks_name_versions_that_exist(folder):
    for line in (folder / "candidates.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["accepted"]:
            file, rest = record["instance"]["versions"]["workflow.yaml"].split("@")
            assert (folder / "versions" / f"{int(rest.split(':')[0]):04d}" / file).exists()


def test_the_report_shows_dialogues_and_escapes_them(folder):
    page = (folder / "report.html").read_text()
    for heading in ("Acceptance", "Attribution", "Reflection", "Difficulty", "Dialogues"):
        assert f"<h2>{heading}</h2>" in page
    assert "What is your phone number?" in page and "<script" not in page and "default-src 'none'" in page
    assert "share no id, no task and no entity" in page


def test_texts_of_strangers_stay_text_on_the_page(tmp_path):
    """A domain or a model may write anything into a task."""
    engine = DataEngine(DOMAIN, tmp_path / "out", Settings("helpdesk", rounds=1, plans=4, count=4))
    candidates = engine.run()
    evil = "</dd><script>alert(1)</script>"
    for candidate in candidates:
        candidate.rollout.messages[1]["content"] = evil
        candidate.findings = [Finding(evil, "task", evil)]
    page = write_report(engine, export(engine, candidates, engine_silent)).read_text()
    assert "<script" not in page and page.count("&lt;script&gt;alert(1)") >= 4


def test_the_command_given_again_changes_nothing(folder):
    before = {path: path.read_bytes() for path in folder.glob("*.json*")}
    assert (
        main(["data", "eigendata", "helpdesk", "-o", str(folder), "--rounds", "2", "--count", "60", "--plans", "24"])
        == 0
    )
    assert {path: path.read_bytes() for path in folder.glob("*.json*")} == before


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["sft", "grpo"])
def test_a_run_trains_on_the_rows_and_talks_to_the_user(folder, tmp_path, algorithm):
    """From random weights: the policy's text is nonsense, to which the user answers until it gives up."""
    run = tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    rollout = {
        "num_generations": 2,
        "max_turn_tokens": 6,
        "max_completion_length": 400,
        "max_prompt_length": 3000,
        "max_turns": 6,
    }
    grpo = {"filter_groups": {"enable": True, "max_num_gen_batches": 2}} if algorithm == "grpo" else {}
    settings = {
        "model": {"random_init": {**TINY, "max_position_embeddings": 8192}}, "threads": 1, "env": {"name": "helpdesk"},
        "data": {half: str(tmp_path / half) for half in ("train", "eval")}, "rollout": rollout,
        "algorithm": {"name": algorithm, **grpo},
        "trainer": {"max_steps": 2, "prompts_per_step": 2, "eval_tasks": 1, "max_tokens_per_pack": 12_000},
    }  # fmt: skip
    recipe.write_text(json.dumps(settings))
    for half, name in (("train", "train.jsonl"), ("eval", "held_out.jsonl")):
        (tmp_path / half).write_text("\n".join((folder / name).read_text().splitlines()[:5]) + "\n")
    RunProcess(run, recipe=[str(recipe)]).succeed()
    records = [record for record in metrics(run) if "loss" in record]
    assert len(records) == 2
    if algorithm == "sft":
        assert all(record["tokens/supervised"] > 50 for record in records)
    else:
        assert all(record["filter/groups_sampled"] == 4 and record["turns/mean"] > 0 for record in records)


def test_leakage_is_found():
    one, two, *_ = support.instances(DOMAIN, 4)
    assert one.subject != two.subject and not quality.leakage(DOMAIN, [one], [two])
    same = quality.leakage(DOMAIN, [one], [replace(two, id=one.id)])
    assert same.ids == (one.id,) and not same.tasks
    shared = quality.leakage(DOMAIN, [one], [replace(one, id="other")])
    assert shared.tasks == (one.digest,) and one.subject in shared.entities
    mixed = replace(two, user=replace(two.user, opening=f"{two.user.opening} {one.subject}"))
    assert quality.leakage(DOMAIN, [one], [mixed]).entities == (one.subject,)


def test_near_duplicates_are_found():
    one, *others = support.instances(DOMAIN, 20)
    similarity = quality.Similarity(0.95)
    similarity.add(one)
    assert similarity.duplicate_of(replace(one, id="again")) == one.id
    shouted = replace(one, user=replace(one.user, opening=one.user.opening.upper()))
    assert shouted.digest != one.digest and similarity.duplicate_of(shouted) == one.id
    assert not any(similarity.duplicate_of(other) for other in others)
    assert quality.jaccard(frozenset("abc"), frozenset("bcd")) == 0.5


def test_weaker_reference_policies_pass_less_often():
    rates = [quality.pass_rates(DOMAIN, i, support.VERSION, rollouts=8) for i in support.instances(DOMAIN, 24)]
    careful, average, weak = (sum(rate[name] for rate in rates) / len(rates) for name in ("careful", "average", "weak"))
    assert careful > average + 0.1 > weak + 0.2


def test_every_tool_but_looking_and_handing_over_is_covered():
    counts = quality.coverage(DOMAIN, support.instances(DOMAIN, 120))
    assert {name for name, count in counts.items() if not count} == {"transfer_to_human", "look_at_phone"}
    found = quality.diversity(support.instances(DOMAIN, 120))
    assert found.combinations == 64 and found.call_paths > 60 and found.nearest < 0.9
