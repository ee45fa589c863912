"""README.md and docs/ are true: examples run, commands and settings exist, links lead somewhere, pages are fresh."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from pact_fast.cli.main import main
from pact_fast.cli.parser import make_parser
from pact_fast.config import AlgorithmConfig, load_config, parse_config, recipes
from pact_fast.config.docs import configuration_page
from pact_fast.data.readers import read_tasks
from pact_fast.data.types import Task
from pact_fast.envs.base import Environment
from pact_fast.rewards.functions import load_reward_function
from pact_fast.train.learner import loss_table_to_tensors
from pact_fast.tree import pack

ROOT = Path(__file__).parent.parent
PAGES = [
    *sorted(ROOT.glob("*.md")),
    ROOT / "examples" / "README.md",
    ROOT / "benchmarks" / "LOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PACKAGES = {path.name for path in (ROOT / "pact_fast").iterdir() if (path / "__init__.py").exists()}


@dataclass
class Block:
    """A fenced block: ```language flags."""

    page: Path
    line: int  # of its first line of text, from 1
    language: str
    flags: list[str]
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(language: str, pages: list[Path] = PAGES) -> list[Block]:
    found = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w+)([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start(3)) + 1
            found.append(Block(page, line, match[1], match[2].split(), match[3]))
    return [block for block in found if block.language == language]


def run(block: Block) -> dict[str, Any]:
    """The names that the example defines. Its own line numbers appear in a traceback."""
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(compile("\n" * (block.line - 1) + block.text, str(block.page), "exec"), namespace)
    return namespace


def defining(name: str) -> Block:
    return next(block for block in blocks("python") if name in block.text)


def test_configuration_page_is_fresh():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == configuration_page(), "run: python -m pact_fast.config.docs > docs/configuration.md"


@pytest.mark.parametrize("block", [b for b in blocks("python") if "no-run" not in b.flags], ids=str)
def test_python_example_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(block)


@pytest.mark.parametrize("block", [b for b in blocks("python") if "no-run" in b.flags], ids=str)
def test_imports_of_python_fragment_work(block):
    """A fragment needs values that the reader has; its imports must still work."""
    imports = [node for node in ast.parse(block.text).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports
    exec(compile(ast.Module(imports, []), str(block), "exec"), {})


def test_algorithm_of_the_guide_makes_batches_that_can_be_trained():
    from tests.support.groups import lookup_chain_renderer, make_groups, step_context_of

    renderer, config = lookup_chain_renderer(), AlgorithmConfig(name="grpo")
    groups = make_groups(renderer, config, prompts=2, rollouts=4, use_turns=False)
    algorithm = run(defining("class BetterHalf"))["BetterHalf"](config)
    prompt_batches = [algorithm.prompt_batch(group, step_context_of(renderer, config, groups)) for group in groups]
    [batch] = pack([tree for one in prompt_batches for tree in one.trees], max_tokens=1 << 20)
    tokens, _ = loss_table_to_tensors(batch, [s for one in prompt_batches for s in one.scored])
    assert np.array_equal(tokens.rl_weight > 0, tokens.advantage > 0)
    assert (tokens.rl_weight > 0).any()


def test_environment_of_the_guide_is_one():
    env = run(defining("class Calculator"))["Calculator"]()
    assert isinstance(env, Environment)
    env.reset(Task("t", [{"role": "user", "content": "2+3?"}]))
    assert env.tools[0]["function"]["parameters"]["required"] == ["a", "b"]
    assert env.call("add", {"a": 2, "b": 3}) == "5"
    assert env.call("sub", {"a": 2, "b": 3}).startswith("error")


def test_reward_function_of_the_guide_can_be_loaded_and_called(tmp_path):
    (tmp_path / "rewards.py").write_text(defining("def short_answer").text, encoding="utf-8")
    score = load_reward_function(f"{tmp_path / 'rewards.py'}:short_answer")
    completions = [[{"role": "assistant", "content": text}] for text in ("it is 7", "it is 8", "7")]
    assert score(completions=completions, answer=["7", "7", None], prompts=[]) == [1.0, 0.0, None]


@pytest.mark.slow
def test_own_data_of_the_readme_passes_the_doctor(tmp_path, monkeypatch, capsys):
    """With random weights in place of the model that the example names."""
    monkeypatch.chdir(tmp_path)
    [rows], [settings] = blocks("jsonl", [ROOT / "README.md"]), blocks("yaml", [ROOT / "README.md"])
    data = yaml.safe_load(settings.text)["data"]
    for name in data.values():
        Path(name).write_text(rows.text, encoding="utf-8")
    Path("mine.yaml").write_text(settings.text, encoding="utf-8")
    tiny = {
        "model_type": "qwen3",
        "vocab_size": 512,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    status = main(["doctor", "mine.yaml", "model.path=null", f"model.random_init={json.dumps(tiny)}"])
    report = capsys.readouterr().out
    assert status == 0, report
    assert re.search(r"[1-9]\d* expert calls run, 0 returned an error", report), report


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_example_is_a_configuration(block):
    parse_config(yaml.safe_load(block.text), str(block))


@pytest.mark.parametrize("block", [b for b in blocks("json") + blocks("jsonl") if "[…]" not in b.text], ids=str)
def test_data_example_is_read(block, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(block.text, encoding="utf-8")
    assert read_tasks(path)


def commands() -> Iterator[tuple[str, str]]:
    """(place, command line) of every `pact-fast …` in a code block, an indented line or inline code.

    Inline `pact-fast train` only mentions a command; it is checked by name, with whatever it needs left out.
    """
    for page in PAGES:
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
            place = f"{page.name}:{number}"
            if line.startswith(("pact-fast ", "    ")):
                for part in re.split(r"&&|;", line):
                    if part.strip().startswith("pact-fast "):
                        yield place, part.strip()
            else:
                yield from ((place, code) for code in re.findall(r"`(pact-fast [^`]+)`", line))


@pytest.mark.parametrize(("place", "command"), list(commands()), ids=lambda value: value)
def test_command_and_its_settings_exist(place, command, capsys):
    words = shlex.split(command, comments=True)[1:]
    if len(words) == 1 and words[0] not in ("recipes", "bench"):
        words.append("quickstart")
    arguments = make_parser().parse_args(words)
    if hasattr(arguments, "settings"):
        source = arguments.source if arguments.source in recipes() else "quickstart"
        load_config(source, arguments.settings)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        assert "://" not in target, f"{target}: pages link only to each other"
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        assert not anchor or anchor in headings(linked), target


def headings(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_code_exist(page):
    """`kernels/head/loss.py` and the like, from the root, from pact_fast/ or from the page's folder."""
    for name in re.findall(r"`([\w/]+/[\w.]*)`", page.read_text(encoding="utf-8")):
        if name.split("/")[0] in PACKAGES | {"pact_fast", "docs", "tests", "examples", "benchmarks", "csrc"}:
            assert any((base / name).exists() for base in (ROOT, ROOT / "pact_fast")), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_private_paths(page):
    found = re.findall(r"(?:^|[\s`(\"'])(/(?:work|opt|home|root|Users)/\S*)", page.read_text(encoding="utf-8"))
    assert not found
