"""Settings that are pointless together, settings of a resumed run, and leftovers of a failed start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pact_fast.algorithms.registry import make_algorithm
from pact_fast.cli.main import main
from pact_fast.config import Config, load_config, parse_config
from pact_fast.config.changes import MAY_CHANGE, fixed_changes
from pact_fast.config.filters import SamplingFilters
from pact_fast.config.load import known_keys
from pact_fast.data.sources import FileTasks
from pact_fast.envs.registry import make_tasks
from pact_fast.errors import PactError
from pact_fast.llm import LLMConfig
from pact_fast.report.before_after import comparisons
from pact_fast.train.evaluate import Sampling, evaluation_jobs, evaluation_kinds
from pact_fast.train.preflight import check_settings, check_tasks, ignored_settings
from pact_fast.train.run_dir import open_run, save_config
from tests.support.runs import TINY_RUN

CODES = {"codes": {"weather": "def weather(city): return 7"}}
TRACE = [
    {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}]},
    {"role": "tool", "content": "7"},
]
TOOLS = [{"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]


ROUND_ROBIN = "{zero_optimization: {round_robin_gradients: true}}"
SUPER_OFFLOAD = "{zero_optimization: {offload_optimizer: {device: cpu, super_offload: true}}}"


def settings(*overrides: str) -> Config:
    with_files = any(override.startswith("data.train=") for override in overrides)
    return load_config("quickstart", [*(["env.name=python_tools", "env.args={}"] if with_files else []), *overrides])


def checked(config: Config) -> list[str]:
    """The notes of the checks that run before a model is loaded."""
    notes: list[str] = []
    algorithm = make_algorithm(config.algorithm)
    check_settings(config, algorithm)
    check_tasks(config, algorithm, make_tasks(config), notes)
    return notes


def rows(tmp_path: Path, *given: dict[str, Any], name: str = "rows.jsonl") -> str:
    path = tmp_path / name
    base = {"prompt": "How warm is it?", "tools": TOOLS, "env_args": CODES}
    path.write_text("".join(json.dumps({**base, **row}) + "\n" for row in given))
    return f"data.train={path}"


# settings that cannot work together


def test_shipped_settings_pass():
    assert checked(settings()) == []
    assert checked(settings("algorithm.name=grpo", "algorithm.reward.gamma=0.5")) == [
        "algorithm.name=grpo does not use algorithm.sft.coef, algorithm.sft.reasoning_level_end, algorithm.reward.gamma"
    ]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm.name=grpo", "rollout.num_generations=1"], "rollout.num_generations=1 with algorithm.name=grpo"),
        (["trainer.deepspeed.stage=1", "model.dtype=bfloat16"], "deepspeed.stage=1 with model.dtype=bfloat16.*stage=2"),
        ([f"trainer.deepspeed.args={ROUND_ROBIN}"], "round_robin_gradients is not supported: a checkpoint"),
        (["trainer.deepspeed={stage: 3, args: {zero_optimization: {mics_shard_size: 2}}}"], "mics_shard_size is not"),
        ([f"trainer.deepspeed.args={SUPER_OFFLOAD}"], "super_offload is not supported: weights and moments"),
        (["rollout.num_generations=1"], "rollout.num_generations=1 with algorithm.name=pact"),
        (["algorithm.name=matchtir", "rollout.num_generations=1"], "set rollout.num_generations to 2 or more"),
        (["algorithm.name=grpo", "algorithm.reward.env_weight=0.5"], "reward.env_weight has no effect"),
        (["algorithm.name=grpo", "algorithm.reward.match_weight=0"], "reward.match_weight has no effect"),
        (["algorithm.name=sft", "algorithm.reward.env_weight=1"], "env_weight has no effect.*no rollouts"),
        (["algorithm.name=sft", "algorithm.reward.functions=[a.py:f]"], "functions has no effect.*no rollouts"),
        (["rollout.top_k=1"], "rollout.top_k=1 with algorithm.name=pact: all rollouts of a prompt are the greedy one"),
        (["data.eval=held_out.jsonl"], "data.eval is set without data.train"),
        (["data.expert=traces.jsonl"], "data.expert is set without data.train"),
        (["data.train=rows.jsonl", "trainer.eval_steps=5"], "trainer.eval_steps=5 .*set data.eval"),
    ],
)
def test_pointless_settings_are_one_line_before_data_or_model(overrides, words):
    config = settings(*overrides)
    with pytest.raises(PactError, match=words) as caught:
        check_settings(config, make_algorithm(config.algorithm))
    assert "\n" not in str(caught.value)


def test_sft_needs_no_group():
    config = settings("algorithm.name=sft", "rollout.num_generations=1")
    check_settings(config, make_algorithm(config.algorithm))


@pytest.mark.parametrize(
    ("given", "overrides", "words"),
    [
        ([{}, {}], ["algorithm.name=grpo"], "no task has anything to reward.*reference_calls"),
        ([{"answer": ""}, {"answer": None}], ["algorithm.name=matchtir"], "no task has anything to reward"),
        ([{"answer": "7", "env_args": {**CODES, "scoring": "toolhop"}}, {}], ["algorithm.reward.env_weight=1"],
         "env_weight counts the environment's 'success', and its row has none"),
        ([{"env_args": {**CODES, "scoring": "ftrl", "unsolved_set": {"weather": ["7"]}}}], [],
         "nothing would be learned.*env_weight=1"),
    ],
)  # fmt: skip
def test_rows_without_anything_to_reward_are_refused(tmp_path, given, overrides, words):
    with pytest.raises(PactError, match=words) as caught:
        checked(settings(rows(tmp_path, *given), *overrides))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "overrides"),
    [
        ({"answer": "7"}, []),
        ({"expert_trace": TRACE}, []),
        ({"reference_calls": [{"name": "weather", "arguments": {}}]}, ["algorithm.name=matchtir"]),
        ({"answer": "7", "env_args": {**CODES, "scoring": "toolhop"}}, ["algorithm.name=grpo"]),
        ({}, ["algorithm.reward.functions=[math:sqrt]"]),
    ],
)
def test_rows_with_something_to_reward_pass(tmp_path, given, overrides):
    assert not any("reward" in note for note in checked(settings(rows(tmp_path, given), *overrides)))


def test_some_rows_without_a_reward_are_counted(tmp_path):
    (note,) = checked(settings(rows(tmp_path, {"answer": "7"}, {"id": "x"}, {})))
    assert note.startswith("2 of 3 tasks have nothing to reward, the first is x")


def test_ignored_settings_are_those_that_an_algorithm_says_it_does_not_read():
    def ignored(**algorithm):
        config = parse_config({"model": {"path": "x"}, "algorithm": algorithm})
        return ignored_settings(config, make_algorithm(config.algorithm))

    assert ignored(name="grpo") == []
    assert ignored(name="grpo", anchor={"q": 0.1}, reward={"gamma": 0.5}) == [
        "algorithm.anchor.q",
        "algorithm.reward.gamma",
    ]
    assert ignored(name="matchtir", reward={"gamma": 0.5}) == []
    assert ignored(name="pact", anchor={"q": 0.1}) == []


# resume


def test_every_key_of_the_table_exists():
    of_llm = {f"rollout.user_llm.{key}" for key in known_keys(LLMConfig)}
    assert set(MAY_CHANGE) <= {*known_keys(), *of_llm}


@pytest.mark.parametrize(
    "override",
    [
        "trainer.prompts_per_step=8", "seed=1", "rollout.num_generations=4", "model.lora={r: 8}", "algorithm.name=grpo",
        "rollout.temperature=0.5", "model.random_init.hidden_size=64", "env.args.hops=[2, 3]", "data.shuffle=false",
        "algorithm.beta=0.1", "pretrain=null", "trainer.prompts_per_update=4", "model.dtype=bfloat16",
    ],
)  # fmt: skip
def test_settings_that_earlier_steps_depend_on_may_not_change(tmp_path, override):
    old = settings(f"output_dir={tmp_path}")
    new = settings(f"output_dir={tmp_path}", "resume=auto", override)
    save_config(old)
    before = (tmp_path / "config.yaml").read_text()
    (tmp_path / "checkpoints/step_1").mkdir(parents=True)
    for resumed in (True, False):  # not False: a damaged checkpoint
        with pytest.raises(PactError, match="cannot be resumed with other settings") as caught:
            open_run(new, resumed=resumed)
        key = override.split("=")[0]
        assert f"{key} (was " in str(caught.value) and "output_dir=" in str(caught.value)
    assert (tmp_path / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    "override",
    [
        "trainer.max_steps=500", "trainer.learning_rate=1e-5", "trainer.save_steps=1", "trainer.eval_steps=3", "threads=2",
        "rollout.engine=vllm", "rollout.vllm_mode=server", "rollout.tool_timeout=1", "trainer.deepspeed={stage: 3}",
        "rollout.max_prompt_length=512", "trainer.log_completions=0", "output_dir=elsewhere", "device=cpu",
    ],
)  # fmt: skip
def test_settings_that_may_change(override):
    assert fixed_changes(settings(), settings(override)) == []


def test_a_data_file_may_be_moved_but_not_changed(tmp_path):
    old = settings(rows(tmp_path, {"answer": "1"}))
    copied = settings(rows(tmp_path, {"answer": "1"}, name="copy.jsonl"))
    changed = settings(rows(tmp_path, {"answer": "2"}, name="other.jsonl"))
    assert fixed_changes(old, copied) == []
    assert [key for key, *_ in fixed_changes(old, changed)] == ["data.train"]
    (tmp_path / "rows.jsonl").unlink()
    assert fixed_changes(old, settings(f"data.train={tmp_path}/moved/rows.jsonl")) == []
    assert [key for key, *_ in fixed_changes(old, changed)] == ["data.train"]


def test_the_refusal_names_key_old_and_new_value_and_the_cure(tmp_path):
    save_config(settings(f"output_dir={tmp_path}"))
    with pytest.raises(PactError) as caught:
        open_run(settings(f"output_dir={tmp_path}", "resume=auto", "seed=7", "data.shuffle=false"), resumed=True)
    assert str(caught.value) == (
        f"{tmp_path} cannot be resumed with other settings: seed (was 0, now 7), data.shuffle (was true, now false); give "
        "the old values (seed=0), or start a new run in another output_dir="
    )


# leftovers of a failed start


def leftovers(run: Path) -> None:
    save_config(settings(f"output_dir={run}"))
    for name in ("tokenizer", "base", "rollouts"):
        (run / name).mkdir()
        (run / name / "old").write_text("")
    (run / "max_tokens_per_pack").write_text("128")


def test_leftovers_of_a_start_without_metrics_are_removed(tmp_path):
    leftovers(tmp_path)
    open_run(settings(f"output_dir={tmp_path}"), resumed=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "rollouts"]
    assert not any((tmp_path / "rollouts").iterdir())


def test_a_start_with_metrics_and_other_settings_is_replaced(tmp_path):
    leftovers(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    open_run(settings(f"output_dir={tmp_path}", "resume=auto"), resumed=False)  # the same settings: all is kept
    assert (tmp_path / "base/old").exists() and (tmp_path / "max_tokens_per_pack").exists()
    open_run(settings(f"output_dir={tmp_path}", "resume=auto", "pretrain.steps=1"), resumed=False)
    assert not (tmp_path / "base").exists() and not (tmp_path / "metrics.jsonl").exists()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["pretrain"]["steps"] == 1


def test_a_folder_of_the_users_is_not_removed(tmp_path):
    (tmp_path / "base").mkdir()
    with pytest.raises(PactError, match="was not made by a run"):
        open_run(settings(f"output_dir={tmp_path}"), resumed=False)
    leftover = tmp_path / "run"
    leftover.mkdir()
    leftovers(leftover)
    for setting in ("model.tokenizer", "model.chat_template"):
        with pytest.raises(PactError, match="which a new run replaces"):
            open_run(settings(f"output_dir={leftover}", f"{setting}={leftover}/tokenizer"), resumed=False)
    assert (leftover / "tokenizer/old").exists()


def test_a_checkpoint_is_a_run_even_without_metrics(tmp_path):
    leftovers(tmp_path)
    (tmp_path / "checkpoints/step_1").mkdir(parents=True)
    with pytest.raises(PactError, match="already holds a run"):
        open_run(settings(f"output_dir={tmp_path}"), resumed=False)
    assert (tmp_path / "base/old").exists()


# evaluation labels


def test_conditions_of_an_evaluation_stand_in_the_table():
    rate = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 250}
    summary = {
        "base_success": {**rate, **Sampling(0.4).to_json()}, "success": {**rate, "temperature": 0.4, "n": 100},
        "base_greedy": {**rate, "temperature": 0.0}, "greedy": {**rate, "temperature": 0.0},
    }  # fmt: skip
    conditions = [row.conditions for row in comparisons(summary)]
    assert conditions == ["temperature 0.4, unfiltered, 250 and 100 samples", "250 samples"]
    filters = Sampling(0.4, SamplingFilters(0.9, 20, 0.05)).to_json()
    summary["success"] = {**rate, **filters, "top_p": 0.8}
    summary["base_success"] = {**rate, **filters}
    (sampled, _) = comparisons(summary)
    assert sampled.conditions == "temperature 0.4, top-p 0.9 and 0.8, top-k 20, min-p 0.05, 250 samples"
    assert comparisons({"success": {**rate, "temperature": 0.4}})[0].conditions == "temperature 0.4, 250 samples"
    assert comparisons({"success": 0.5})[0].conditions == ""


def test_an_evaluation_says_how_it_sampled():
    kinds = evaluation_kinds(settings("rollout.temperature=0.4", "rollout.top_p=0.9", "rollout.min_p=0.05"))
    assert str(kinds["sampled"]) == "sampled at temperature 0.4, top-p 0.9, min-p 0.05"
    assert kinds["sampled"].to_json() == {"temperature": 0.4, "top_p": 0.9, "top_k": 0, "min_p": 0.05}
    assert str(kinds["greedy"]) == "greedy"
    assert kinds["greedy"].to_json() == {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    assert str(evaluation_kinds(settings())["sampled"]) == "sampled at temperature 1, unfiltered"
    (job,) = evaluation_jobs([object()], kinds["sampled"], 0)
    assert (job.temperature, job.filters) == (0.4, SamplingFilters(0.9, 0, 0.05))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.top_p=0", "rollout.top_p.*greater than 0"),
        ("rollout.top_p=1.1", "rollout.top_p.*less than or equal to 1"),
        ("rollout.top_k=-1", "rollout.top_k.*greater than or equal to 0"),
        ("rollout.top_k=0.5", "rollout.top_k"),
        ("rollout.min_p=2", "rollout.min_p.*less than or equal to 1"),
        ("rollout.topp=0.9", "did you mean.*top_p"),
    ],
)
def test_filters_out_of_bounds_are_refused(override, words):
    with pytest.raises(PactError, match=words):
        settings(override)


def test_a_resumed_run_keeps_its_filters():
    changes = fixed_changes(settings(), settings("rollout.top_p=0.9", "rollout.top_k=9", "rollout.min_p=0.1"))
    assert [key for key, *_ in changes] == ["rollout.top_p", "rollout.top_k", "rollout.min_p"]


# whole runs


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY_RUN, "output_dir": str(tmp_path / "run")}))
    return path


@pytest.mark.slow
def test_a_run_evaluates_as_it_samples_and_says_so(tiny, capsys):
    run = tiny.parent / "run"
    sampling = ["rollout.temperature=0.4", "rollout.top_p=0.7", "rollout.top_k=40", "algorithm.anchor.mode=blend"]
    assert main(["train", str(tiny), *sampling]) == 0
    output = capsys.readouterr()
    assert "sampled at temperature 0.4, top-p 0.7, top-k 40" in output.out + output.err
    summary = json.loads((run / "summary.json").read_text())
    assert [summary[key]["temperature"] for key in ("base_success", "success", "greedy")] == [0.4, 0.4, 0.0]
    assert [summary[key]["top_p"] for key in ("base_success", "success", "greedy")] == [0.7, 0.7, 1.0]
    record, *steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert record["eval/temperature"] == 0.4 and record["eval/tasks"] == 3
    assert (record["eval/top_p"], record["eval/top_k"], record["eval/min_p"]) == (0.7, 40, 0)
    mismatch = [step["mismatch/max"] for step in steps if "mismatch/max" in step]
    assert mismatch and max(mismatch) < 1e-4  # of log-probs over the tokens that the filters keep
    assert "temperature 0.4, top-p 0.7, top-k 40, 3 samples" in (run / "report.html").read_text()
    assert main(["eval", str(run), "--out", str(run / "eval.json")]) == 0
    result = json.loads((run / "eval.json").read_text())
    assert (result["sampled"]["temperature"], result["greedy"]["temperature"]) == (0.4, 0.0)
    assert (result["sampled"]["top_k"], result["greedy"]["top_k"]) == (40, 0)
    assert result["sampled"]["samples"] == 3 and len(result["sampled"]["interval"]) == 2
    # resumed with another seed: refused, and config.yaml is as it was
    before = (run / "config.yaml").read_text()
    assert main(["train", str(tiny), *sampling, "resume=auto", "seed=3"]) == 2
    assert "seed (was 0, now 3)" in capsys.readouterr().err
    assert (run / "config.yaml").read_text() == before
    assert main(["train", str(tiny), *sampling, "resume=auto", "trainer.max_steps=2"]) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 2


@pytest.mark.slow
def test_after_a_failed_start_the_new_tokenizer_and_base_are_the_runs_own(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    small = ["model.random_init.vocab_size=400", "model.tokenizer=null", "pretrain={steps: 1, batch_size: 1}"]
    bad = tmp_path / "bad.py"
    bad.write_text("def score(**kwargs):\n    raise ValueError('no')\n")
    small.append(f"algorithm.reward.functions=['{bad}:score']")  # fails in the first step
    assert main(["train", str(tiny), *small]) == 2
    assert (run / "metrics.jsonl").exists() and (run / "base").exists() and not (run / "checkpoints").exists()
    first = (run / "tokenizer/tokenizer.json").read_bytes()
    assert main(["train", str(tiny)]) == 2
    assert "resume=auto" in capsys.readouterr().err
    assert main(["train", str(tiny), "resume=auto"]) == 0  # the cure, with another model
    assert (run / "tokenizer/tokenizer.json").read_bytes() != first and not (run / "base").exists()
    config = json.loads((run / "checkpoints/step_1/model/config.json").read_text())
    assert config["vocab_size"] > 400
    assert (run / "checkpoints/step_1/model/tokenizer.json").read_bytes() == (
        run / "tokenizer/tokenizer.json"
    ).read_bytes()


@pytest.mark.slow
def test_a_template_that_is_corrected_between_two_starts_counts(tiny, tmp_path, capsys):
    assert main(["train", str(tiny), f"output_dir={tmp_path / 'first'}"]) == 0
    model = next((tmp_path / "first/checkpoints").glob("step_*/model"))
    good = (model / "chat_template.jinja").read_text()
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}")
    command = ["train", str(tiny), "model.random_init=null", f"model.path={model}", f"model.chat_template={template}"]
    assert main(command) == 2
    assert "model.chat_template" in capsys.readouterr().err
    template.write_text(good)
    assert main(command) == 0


def test_file_tasks_list_all_training_tasks(tmp_path):
    config = settings(rows(tmp_path, {"answer": "1"}, {"answer": "2"}))
    tasks = make_tasks(config)
    assert isinstance(tasks, FileTasks) and [task.answer for task in tasks.training()] == ["1", "2"]
