"""Algorithms: one file outside the package is enough to train with, and no other package knows an algorithm's name."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

from pact_fast.algorithms.registry import algorithm
from pact_fast.cli.main import main
from tests.support.runs import TINY_RUN

PACKAGE = Path(__file__).parent.parent / "pact_fast"
TOY = '''
from pact_fast.algorithms.base import Algorithm, PromptBatch, add_rollouts, prompt_tree
from pact_fast.algorithms.registry import algorithm
from pact_fast.components import LossContext


@algorithm("first_half")
class FirstHalf(Algorithm):
    """Prompt-only policy loss on the first half of each rollout's sampled tokens."""

    turn_advantages = False

    def prompt_batch(self, group, step):
        tree, x = prompt_tree(group)
        scored = add_rollouts(group, tree, x, LossContext.PROMPT, 1.0, step)
        for rollout in scored:
            rollout.rl_weight[len(rollout.index) // 2 :] = 0.0
        return PromptBatch(group, "prompt", [tree], scored)

    def schedule(self, step):
        return {"schedule/toy": float(self.config.args.get("scale", 1)) * (step.step + 1)}
'''


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    """The file of the algorithm; its registrations are removed after the test."""
    algorithm.names()  # the built-in ones are registered now
    monkeypatch.setattr(algorithm, "_classes", dict(algorithm._classes))
    path = tmp_path / "mine.py"
    path.write_text(TOY)
    return path


def train(tmp_path: Path, name: str) -> dict:
    """Train one step; its record in metrics.jsonl."""
    recipe, run = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump({**TINY_RUN, "output_dir": str(run)}))
    assert main(["train", str(recipe), f"algorithm.name={name}", "algorithm.args={scale: 3}"]) == 0
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return next(record for record in records if "loss" in record)


def test_a_file_outside_the_package_trains_a_step(toy, tmp_path):
    record = train(tmp_path, f"{toy}:FirstHalf")
    assert record["schedule/toy"] == 3.0 and record["routes/trace_fraction"] == 0.0
    assert record["tokens/supervised"] > 0


def test_a_registered_class_is_found_by_its_name(toy, tmp_path):
    spec = importlib.util.spec_from_file_location("mine", toy)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert "first_half" in algorithm.names()
    assert train(tmp_path, "first_half")["schedule/toy"] == 3.0


def test_an_unknown_name_names_the_nearest(tmp_path, capsys):
    assert main(["train", "quickstart", "algorithm.name=matchtr", f"output_dir={tmp_path / 'run'}"]) == 2
    assert "did you mean 'matchtir'?" in capsys.readouterr().err


def name_tests(source: str, names: set[str]) -> list[int]:
    """Lines that compare, match or look up an algorithm's name, or ask for its class."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            texts = [ast.unparse(operand) for operand in operands]
            constants = {c.value for o in operands for c in ast.walk(o) if isinstance(c, ast.Constant)}
            is_name = any(re.search(r"algorithm\w*(\.\w+)*\.name$|algorithm_name$", text) for text in texts)
            any_name = any(text.endswith((".name", "name")) for text in texts) and constants & names
            if is_name or any_name:
                lines.append(node.lineno)
        elif isinstance(node, ast.Match | ast.Subscript):
            subject = node.subject if isinstance(node, ast.Match) else node.slice
            if re.search(r"algorithm\w*\.name$", ast.unparse(subject)):
                lines.append(node.lineno)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("isinstance", "issubclass")
            and any(re.search(rf"\b{name}\b", ast.unparse(node.args[1]), re.IGNORECASE) for name in names)
        ):
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize(
    "line",
    [
        'if config.algorithm.name == "pact": pass',
        'x = 1 if name in ("pact", "sft") else 2',
        "if self.algorithm.name != other: pass",
        "z = {'pact': 1}[config.algorithm.name]",
        "match config.algorithm.name:\n    case _: pass",
        "isinstance(algorithm, SFT)",
    ],
)
def test_a_test_of_the_name_is_found(line):
    assert name_tests(line, {"pact", "sft"}) == [1]


@pytest.mark.slow
def test_no_package_but_algorithms_tests_an_algorithms_name():
    names = set(algorithm.names())
    assert {"pact", "grpo", "matchtir", "sft"} <= names
    found = [
        f"{path.relative_to(PACKAGE.parent)}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if PACKAGE / "algorithms" not in path.parents
        for line in name_tests(path.read_text(encoding="utf-8"), names)
    ]
    assert not found, (
        f"{', '.join(found)}: only pact_fast/algorithms/ may test an algorithm's name; let the algorithm state what it needs "
        "(Requirements, needs_rollouts, turn_advantages, routes in algorithms/base.py), and ask for that"
    )
