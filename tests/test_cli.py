"""The command line: first steps of a new user, mistakes included."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pact_fast.cli import commands, versions
from pact_fast.cli.doctor import embedded_engine_warning
from pact_fast.cli.main import main
from pact_fast.config import Config, known_keys, load_config, recipes
from pact_fast.errors import PactError
from pact_fast.train.run import Trainer
from tests.support.runs import TINY_RUN


@pytest.fixture
def tiny(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY_RUN, "output_dir": str(tmp_path / "run")}))
    return path


def error_of(capsys, *arguments: str) -> str:
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in captured if line.startswith("error:")]) == 1 and captured[-1].startswith("error:")
    return captured[-1]


@pytest.mark.timing
@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["-c", "import pact_fast"], ["-m", "pact_fast", "--help"]])
def test_importing_and_help_are_quick(arguments):
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.5


COMMANDS = ("train", "eval", "rollout", "doctor", "plan", "view", "export", "recipes", "data", "traces", "bench")


def test_help_lists_all_commands_and_first_steps(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert set(re.findall(r"^    (\w+) ", text, re.MULTILINE)) == set(COMMANDS)
    assert "pact-fast train quickstart" in text and "docs/configuration.md" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_says_what_it_does_and_shows_examples(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    description, _, examples = capsys.readouterr().out.partition("examples:")
    assert len(description.split()) > 20
    assert re.search(rf"^  pact-fast {command}", examples, re.MULTILINE)
    assert max(map(len, examples.splitlines())) <= 120


def test_every_shipped_recipe_is_valid():
    for name in recipes():
        assert load_config(name).output_dir.startswith("runs/")


def test_every_recipe_of_a_large_model_samples_with_vllm():
    for name in recipes():
        config = load_config(name)
        small = config.model.path is None or "135M" in config.model.path
        assert config.rollout.engine == ("transformers" if small else "vllm"), name


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("trainer.learning_rat=1", "trainer.learning_rate"),
        ("rollout.num_generation=1", "rollout.num_generations"),
        ("learning_rate=1", "trainer.learning_rate"),
        ("algorithm.trace.context_iss=token", "algorithm.trace.context_importance_weight"),
        ("rollout.temperature=hot", "rollout.temperature"),
        ("trainer.prompts_per_update=5", "multiple of trainer.prompts_per_update"),
        ("seed", "key=value"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_the_right_one(capsys, setting, hint):
    assert hint in error_of(capsys, "train", "quickstart", setting)


def test_a_misspelt_recipe_names_the_nearest(capsys):
    assert "did you mean 'quickstart'" in error_of(capsys, "train", "quickstrat")


def test_a_missing_data_file_is_named(capsys, tiny, tmp_path):
    message = error_of(capsys, "train", tiny, f"data.train={tmp_path / 'nothing.jsonl'}")
    assert "nothing.jsonl" in message


def test_a_bad_row_names_file_line_and_field(capsys, tiny, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "hi", "answer": "1"}\n{"prompt": 3}\n')
    message = error_of(capsys, "train", tiny, f"data.train={rows}", "env.name=lookup_chain")
    assert "rows.jsonl:2" in message and "prompt" in message


def test_a_prompt_longer_than_the_limit_says_so(capsys, tiny):
    assert "rollout.max_prompt_length" in error_of(capsys, "train", tiny, "rollout.max_prompt_length=20")


def test_lengths_beyond_the_models_context_say_so(capsys, tiny):
    assert "context of 1024" in error_of(capsys, "train", tiny, "rollout.max_completion_length=4000")


def test_a_chat_template_without_tools_is_refused_with_the_cure(capsys, tiny, tmp_path):
    template = tmp_path / "plain.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    assert main(["train", str(tiny)]) == 0
    model = next((tiny.parent / "run" / "checkpoints").glob("step_*/model"))
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({**TINY_RUN, "model": {"path": str(model)}, "output_dir": str(tmp_path / "run2")}))
    capsys.readouterr()
    assert "model.chat_template" in error_of(capsys, "train", own, f"model.chat_template={template}")


def test_a_second_run_does_not_mix_with_the_first(capsys, tiny):
    assert main(["train", str(tiny)]) == 0
    capsys.readouterr()
    assert "resume=auto" in error_of(capsys, "train", tiny)
    assert main(["train", str(tiny), "resume=auto"]) == 0


def test_a_run_leaves_what_the_docs_promise_and_can_be_looked_at(capsys, tiny):
    assert main(["train", str(tiny)]) == 0
    run = tiny.parent / "run"
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "rollouts",
        "checkpoints/step_1",
        "summary.json",
        "report.html",
        "tensorboard",
    ):
        assert (run / name).exists(), name
    Config.model_validate(yaml.safe_load((run / "config.yaml").read_text()))
    summary = json.loads((run / "summary.json").read_text())
    assert {"base_success", "success", "base_greedy", "greedy", "wall_seconds", "seed", "versions"} <= set(summary)
    capsys.readouterr()
    assert main(["view", str(run)]) == 0
    assert Path(capsys.readouterr().out.strip()).read_text().startswith("<!")
    assert main(["eval", str(run), "trainer.eval_tasks=2"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == 2
    out = run.parent / "rollouts.jsonl"
    assert main(["rollout", str(run), "--tasks", "2", "--out", str(out)]) == 0
    assert len(out.read_text().splitlines()) == 2


@pytest.mark.slow
def test_doctor_and_dry_run_pass_on_the_quickstart_and_train_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "quickstart"]) == 0
    assert main(["train", "quickstart", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "FAIL" not in shown and "max_steps" in shown
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_a_run_leaves_its_settings_as_they_were(tiny):
    config = load_config(str(tiny), ["trainer.max_tokens_per_pack=null"])
    before = config.model_copy(deep=True)
    Trainer(config).train()
    assert config == before


def test_the_embedded_engine_is_advised_for_small_models_and_few_tokens_only():
    quickstart = load_config("quickstart")
    assert embedded_engine_warning(quickstart, 1_000_000) is None
    assert "1,700 M parameters" in embedded_engine_warning(quickstart, 1_700_000_000)
    paper = load_config("pact-paper", ["rollout.engine=transformers"])
    assert "47,104,000 sampled tokens" in embedded_engine_warning(paper, 1_000_000)
    assert embedded_engine_warning(load_config("pact-paper"), 1_700_000_000) is None
    assert embedded_engine_warning(load_config("quickstart", ["algorithm.name=sft"]), 1_700_000_000) is None


@pytest.mark.slow
def test_doctor_warns_of_the_embedded_engine_and_does_not_fail(capsys, tiny):
    assert main(["doctor", str(tiny), "trainer.prompts_per_step=2000"]) == 0
    report = capsys.readouterr().out
    assert "warn  model: the embedded engine is for small models" in report and "set rollout.engine=vllm" in report


@pytest.mark.slow
def test_doctors_memory_line_is_the_estimate(capsys, tiny):
    assert main(["doctor", str(tiny), "device=cpu"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("ok    memory"))
    assert main(["doctor", str(tiny), "device=cpu", "--memory"]) == 0
    total = re.search(r"total\s*│\s*([\d.]+ [MG]iB)", capsys.readouterr().out)
    assert total and f"estimated to peak at {total[1]}:" in line


def test_doctor_warns_of_untested_versions_and_does_not_fail(capsys, tiny, monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda: {"torch": "3.0.1+cu140", "transformers": "5.24.0"})
    assert main(["doctor", str(tiny)]) == 0
    report = capsys.readouterr().out
    assert "ok    versions: torch 3.0.1+cu140, transformers 5.24.0" in report
    assert re.findall(r"warn  versions: (\S+ \S+)", report) == ["torch 3.0.1+cu140"]


@pytest.mark.parametrize(
    ("version", "tested"), [("2.13.0", True), ("2.13.1+cpu", True), ("2.9.1", False), ("2.14", False)]
)
def test_versions_are_compared_as_numbers(version, tested):
    assert (versions.untested({"torch": version}) == []) == tested


def test_the_versions_of_this_environment_are_among_the_tested_ones():
    assert "torch" in versions.installed()
    assert versions.untested(versions.installed()) == [], (
        "the tests pass here: widen TESTED in pact_fast/cli/versions.py"
    )


@pytest.mark.slow
def test_doctor_fails_with_the_reason(capsys):
    assert main(["doctor", "quickstart", "rollout.max_prompt_length=30"]) == 1
    assert "FAIL  rows" in capsys.readouterr().out


def test_overrides_read_numbers_and_lists(tmp_path):
    config = load_config(
        "quickstart", ["trainer.learning_rate=1e-5", "env.args.hops=[1, 2]", "algorithm.epsilon_high=0.28"]
    )
    assert config.trainer.learning_rate == 1e-5 and config.env.args["hops"] == [1, 2]
    assert "algorithm.sft.coef" in known_keys()


def test_an_empty_or_broken_config_file_is_one_line(tmp_path):
    bad = tmp_path / "bad.yaml"
    for text, hint in [("- a\n- b\n", "mapping"), ("a: [1\n", "not valid YAML"), ("", "model.path")]:
        bad.write_text(text)
        with pytest.raises(PactError, match=hint) as caught:
            load_config(str(bad))
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_bench_lists_what_can_be_run_and_passes_arguments_on():
    command = [sys.executable, "-m", "pact_fast", "bench"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = [line.split()[0] for line in listed.splitlines()]
    assert {"head", "gpu_suite", "quickstart", "update_step"} <= set(names) and "measure" not in names
    helped = subprocess.run([*command, "quickstart", "--help"], capture_output=True, text=True, check=True).stdout
    assert "--seeds" in helped


def test_bench_of_an_installed_package_says_where_the_benchmarks_are(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(commands, "__file__", str(tmp_path / "pact_fast" / "cli" / "commands.py"))
    error = error_of(capsys, "bench", "head")
    assert "in the repository" in error and "pip install -e ." in error
