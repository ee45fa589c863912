"""Registries: classes of one's own from one file outside the package, by name and by `file.py:Class`; env per row."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from pact_fast.chat.chat_template import ChatTemplate
from pact_fast.chat.formats.base import ToolFormat
from pact_fast.chat.formats.registry import detect_format, get_format, tool_format
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.config import Config
from pact_fast.data.types import Task, ToolCall
from pact_fast.envs.lookup_chain import LookupChain, LookupChainTasks
from pact_fast.envs.registry import EnvironmentFactory, environment, make_tasks
from pact_fast.errors import DataError, PactError
from pact_fast.model.tokenizer import train_tokenizer
from pact_fast.plugins import load_object
from pact_fast.registry import Registry
from pact_fast.rollout.agent import AgentLoop, Job
from pact_fast.rollout.engine import Completion

CALCULATOR = '''
from pact_fast.data.sources import TaskSource
from pact_fast.data.types import Task
from pact_fast.envs.registry import environment

SCHEMA = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@environment("calculator")
class Calculator:
    blocking = False

    def __init__(self, unit=""):
        self.unit = unit

    def reset(self, task):
        return "Use the tool."

    @property
    def tools(self):
        return [SCHEMA]

    def call(self, name, arguments):
        return f"{arguments['a'] + arguments['b']}{self.unit}"

    def reward(self, task, trajectory):
        return {"success": float(trajectory.answer == task.answer)}


class Doubler(Calculator):
    """Not registered: usable by file.py:Doubler only."""

    def call(self, name, arguments):
        return str(2 * arguments["a"])
'''

BRACKETS = '''
import json
import re

from pact_fast.chat.formats.base import ToolFormat
from pact_fast.chat.formats.json_calls import call_json, read_call
from pact_fast.chat.formats.registry import tool_format


@tool_format("brackets")
class Brackets(ToolFormat):
    """[[call {...}]], one per line."""

    def write_calls(self, calls):
        return "\\n".join(f"[[call {call_json(call.to_json(), self.markers)}]]" for call in calls)

    def find_calls(self, data, start, tools):
        found = re.compile(rb"\\[\\[call (.*?)\\]\\]").finditer(data, start)
        return [(match.start(), match.end(), read_call(match[1], tools, "arguments")) for match in found]
'''

TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}{{ '\n' if m.content }}[[call {"name": {{ c.function.name | tojson }}, \
"arguments": {{ c.function.arguments | tojson }}}]]{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(autouse=True)
def only_built_in_classes(monkeypatch):
    """Every test starts with the built-in classes, and leaves no others behind."""
    for registry in (environment, tool_format):
        built_in = {name: registry.get(name) for name in registry.names()}
        built_in = {name: cls for name, cls in built_in.items() if cls.__module__.startswith("pact_fast.")}
        monkeypatch.setattr(registry, "_classes", built_in)


@pytest.fixture
def calculator(tmp_path) -> str:
    path = tmp_path / "calculator.py"
    path.write_text(CALCULATOR, encoding="utf-8")
    return str(path)


@pytest.fixture
def brackets(tmp_path) -> str:
    path = tmp_path / "brackets.py"
    path.write_text(BRACKETS, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(LookupChainTasks("train", 0).tasks(50), 512)


def config_of(**sections) -> Config:
    return Config.model_validate({"model": {"path": "unused"}} | sections)


def write_rows(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps({"prompt": "How much?"} | row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def lookup_row() -> dict:
    [task] = LookupChainTasks("train", 0, flaky=0.0).tasks(1)
    return {"prompt": task.prompt, "answer": task.answer, "env": "lookup_chain", "env_args": task.env_args}


# --- environments ---


def test_an_environment_is_named_by_file_and_class(calculator):
    make = EnvironmentFactory(config_of(env={"name": f"{calculator}:Doubler", "args": {"unit": " m"}}))
    env = make(Task("t", []))
    assert env.call("add", {"a": 2, "b": 1}) == "4" and env.unit == " m"
    assert make(Task("t", [])) is not env


def test_an_environment_is_named_by_its_decorator_once_its_file_is_imported(calculator):
    config = config_of(env={"name": "calculator", "args": {"unit": " m"}})
    with pytest.raises(PactError, match=r"env\.name: unknown environment 'calculator'"):
        EnvironmentFactory(config)
    load_object(f"{calculator}:Calculator", "environment")
    assert EnvironmentFactory(config)(Task("t", [])).call("add", {"a": 2, "b": 1}) == "3 m"
    assert "calculator" in environment.names()


def test_an_environment_is_named_by_module_and_class(calculator, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(calculator).parent))
    try:
        assert environment.get("calculator:Doubler").__name__ == "Doubler"
    finally:
        del sys.modules["calculator"]


def test_a_file_imported_under_two_module_names_registers_one_class(calculator, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(calculator).parent))
    try:
        environment.get("calculator:Calculator")
        environment.get(f"{calculator}:Calculator")
    finally:
        del sys.modules["calculator"]
    assert environment.names().count("calculator") == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def Env(): pass", "it is a function; name a class"),
        (
            "class Env:\n    blocking = False\n    def reset(self, task): pass",
            "environment Env lacks tools, call, reward",
        ),
        ("class Env:\n    def __init__(self, size): pass", r"env\.args do not fit the environment Env: .*'size'"),
        ("import no_such_module\nclass Env: pass", "ModuleNotFoundError"),
        ("class Env: pass", r"Env lacks blocking, reset, tools, call, reward; see docs/environments\.md"),
    ],
)
def test_an_environment_that_cannot_work_is_refused_at_once(source, message, tmp_path):
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    with pytest.raises(PactError, match=message):
        EnvironmentFactory(config_of(env={"name": f"{tmp_path / 'mine.py'}:Env"}))


def test_an_attribute_set_in_the_constructor_counts(tmp_path):
    source = CALCULATOR.replace("    blocking = False\n", "").replace("self.unit = unit", "self.blocking = True")
    (tmp_path / "mine.py").write_text(source.replace('@environment("calculator")\n', ""), encoding="utf-8")
    assert EnvironmentFactory(config_of(env={"name": f"{tmp_path / 'mine.py'}:Calculator"}))(Task("t", [])).blocking


def test_a_subclass_of_the_lookup_chain_runs_the_tasks_that_it_generates(tmp_path):
    source = "from pact_fast.envs.lookup_chain import LookupChain\nclass Mine(LookupChain): pass"
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    config = config_of(env={"name": f"{tmp_path / 'mine.py'}:Mine"})
    tasks = make_tasks(config)
    for task in (*tasks.train(0, 1), *tasks.held_out(1)):
        assert type(EnvironmentFactory(config)(task)).__name__ == "Mine"


# --- tool formats ---


def test_a_tool_format_is_named_by_file_and_by_its_decorator(brackets):
    by_file = get_format(f"{brackets}:Brackets")
    assert type(get_format("brackets")) is type(by_file)
    call = ToolCall("add", {"a": 1})
    text = by_file.render("Think.", "Then:", [call])
    assert text.endswith('Then:\n[[call {"name": "add", "arguments": {"a": 1}}]]')
    tools = [{"type": "function", "function": {"name": "add"}}]
    turn = by_file.parse(text.encode(), tools)
    assert (turn.reasoning, turn.content, turn.attempts) == ("Think.", "Then:", [call])


def test_a_registered_tool_format_is_detected_from_the_template(brackets, tokenizer):
    import copy

    bracketed = copy.deepcopy(tokenizer)
    bracketed.chat_template = TEMPLATE
    with pytest.raises(PactError, match="none of the known formats"):
        detect_format(ChatTemplate(bracketed))
    get_format(f"{brackets}:Brackets")
    assert type(detect_format(ChatTemplate(bracketed))).__name__ == "Brackets"
    renderer = ChatRenderer(bracketed)
    ids, components = renderer.assistant_turn("", "", [ToolCall("add", {"a": 1})])
    assert renderer.parse(ids, [{"type": "function", "function": {"name": "add"}}]).calls
    assert set(components.tolist()) == {2}


def test_a_tool_format_must_extend_the_base(tmp_path):
    (tmp_path / "mine.py").write_text("class Mine: pass", encoding="utf-8")
    with pytest.raises(PactError, match=r"must extend pact_fast\.chat\.formats\.base\.ToolFormat"):
        get_format(f"{tmp_path / 'mine.py'}:Mine")
    with pytest.raises(PactError, match="must extend"):
        tool_format("mine")(type("Mine", (), {}))


# --- names ---


@pytest.mark.parametrize(
    ("registry", "name", "message"),
    [
        (
            environment,
            "lookup_chian",
            r"^env\.name: unknown environment 'lookup_chian' \(did you mean 'lookup_chain'\?\)",
        ),
        (tool_format, "hermess", r"^model\.tool_format: unknown tool format 'hermess' \(did you mean 'hermes'\?\)"),
        (environment, "zzz", r"'zzz'; registered: bfcl, .*lookup_chain, mcp, python_tools.*; write file\.py:Class"),
        (environment, "no.py:Env", r"no file no\.py"),
    ],
)
def test_an_unknown_name_is_an_error_that_names_the_nearest(registry, name, message):
    with pytest.raises(PactError, match=message):
        registry.get(name)


def test_a_name_clash_is_an_error_that_names_both_places(calculator, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CALCULATOR.replace('"calculator"', '"lookup_chain"'), encoding="utf-8")
    with pytest.raises(PactError) as caught:
        environment.get(f"{path}:Calculator")
    assert "'lookup_chain' is registered twice" in str(caught.value)
    assert "lookup_chain.py:LookupChain" in str(caught.value) and f"{path}:Calculator" in str(caught.value)
    assert environment.get("lookup_chain") is LookupChain


def test_a_name_clash_is_an_error_if_the_users_class_came_first(tmp_path, monkeypatch):
    make_package(tmp_path, monkeypatch, "clash_package", built_in="registry('taken')(type('BuiltIn', (), {}))")
    registry = sys.modules["builtins"].registry
    registry("taken")(type("Mine", (), {}))
    for _ in range(2):  # each look-up says so
        with pytest.raises(PactError, match=r"'taken' is registered twice, by .*Mine and by .*BuiltIn; rename one"):
            registry.names()


@pytest.mark.parametrize("name", ["", "a:b", "x.py:Class"])
def test_a_name_that_looks_like_a_file_cannot_be_registered(name):
    with pytest.raises(ValueError, match="cannot be the name of a registered environment"):
        environment(name)


def make_package(tmp_path: Path, monkeypatch, name: str, **modules: str) -> None:
    """A package whose modules register in `registry`, a builtin while the test runs."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    for module, source in modules.items():
        (tmp_path / name / f"{module}.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("builtins.registry", Registry("thing", "things", name), raising=False)


def test_threads_see_all_built_in_classes_or_wait(tmp_path, monkeypatch):
    slow = "import time; time.sleep(0.3); registry('late')(type('Late', (), {}))"
    make_package(tmp_path, monkeypatch, "slow_package", a="registry('early')(type('Early', (), {}))", b=slow)
    registry, seen = sys.modules["builtins"].registry, []
    threads = [threading.Thread(target=lambda: seen.append(registry.names())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [["early", "late"]] * 4


def test_a_built_in_module_that_cannot_be_imported_is_an_error_every_time(tmp_path, monkeypatch):
    make_package(tmp_path, monkeypatch, "broken_package", a="raise ImportError('no such library')")
    for _ in range(2):
        with pytest.raises(ImportError, match="no such library"):
            sys.modules["builtins"].registry.get("a")


# --- the column `env` ---


class Script:
    """An engine that generates the given turns, by session."""

    version, synchronous = 0, True

    def __init__(self, turns):
        self.turns, self.ready = turns, []

    def submit(self, request):
        self.ready.append(request.session)

    def step(self, timeout=None):
        done, self.ready = self.ready, []
        return [self._completion(session, self.turns[session].pop(0)) for session in done]

    def _completion(self, session, ids):
        return Completion(session, np.asarray(ids, np.int64), np.zeros(len(ids), np.float32), True, 0)

    def close(self, session):
        pass


def test_rows_of_one_file_run_in_several_environments(calculator, tokenizer, tmp_path):
    lookup = lookup_row()
    file = write_rows(tmp_path / "mixed.jsonl", {"id": "sum", "answer": "3 m"}, lookup | {"id": "chain"})
    config = config_of(
        data={"train": file, "shuffle": False}, env={"name": f"{calculator}:Calculator", "args": {"unit": " m"}}
    )
    tasks = make_tasks(config).train(0, 2)
    renderer = ChatRenderer(tokenizer)

    def turns(answer, calls):
        rounds = [renderer.assistant_turn("", "", [call])[0] for call in calls]
        return [*rounds, renderer.assistant_turn("", answer, [])[0]]

    args = lookup["env_args"]
    # one turn per relation, with a call for each start
    at, chain = args["starts"], []
    for relation in args["relations"]:
        chain.append(renderer.assistant_turn("", "", [ToolCall(f"get_{relation}", {"of": name}) for name in at])[0])
        at = [args["facts"][relation][name] for name in at]
    chain.append(renderer.assistant_turn("", " and ".join(at), [])[0])
    engine = Script([turns("3 m", [ToolCall("add", {"a": 1, "b": 2})]), chain])
    loop = AgentLoop(engine, renderer, EnvironmentFactory(config), config.rollout)

    (first, first_env), (second, second_env) = (loop.resolve_task(task) for task in tasks)
    assert type(first_env).__name__ == "Calculator" and type(second_env) is LookupChain
    assert [tool["function"]["name"] for tool in first.tools] == ["add"]
    assert first.prompt[-1]["content"] == "How much?\n\nUse the tool."
    assert {tool["function"]["name"] for tool in second.tools} == {f"get_{relation}" for relation in args["facts"]}

    summed, chained = loop.run([Job(task, (0, index)) for index, task in enumerate(tasks)])
    assert summed.turns[0].observations == ["3 m"]
    assert chained.turns[-2].observations == at
    assert summed.env_rewards == chained.env_rewards == {"success": 1.0}


def test_the_configured_class_has_its_arguments_under_its_registered_name_too(calculator, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", {"env": "calculator"})
    config = config_of(data={"train": file}, env={"name": f"{calculator}:Calculator", "args": {"unit": " m"}})
    [task] = make_tasks(config).train(0, 1)
    assert EnvironmentFactory(config)(task).unit == " m"


def test_another_environment_gets_no_arguments(calculator):
    load_object(f"{calculator}:Calculator", "environment")
    make = EnvironmentFactory(config_of(env={"name": "lookup_chain", "args": {"hops": [1, 2]}}))
    assert make(Task("t", [], env="calculator")).unit == ""
    assert type(make(Task("t", []))) is LookupChain


@pytest.mark.parametrize("split", ["train", "eval"])
def test_an_unknown_environment_in_a_row_is_an_error_when_the_file_is_read(split, tmp_path):
    good = write_rows(tmp_path / "good.jsonl", lookup_row())
    bad = write_rows(tmp_path / "bad.jsonl", lookup_row(), {"env": "lookup_chian"})
    with pytest.raises(DataError) as caught:
        make_tasks(config_of(data={"train": good} | {split: bad}))
    error = caught.value
    assert (error.file, error.line, error.field) == (bad, 2, "env")
    assert "'lookup_chian'; did you mean 'lookup_chain'?" in str(error)
    assert "lookup_chain, mcp, python_tools" in str(error)


def test_an_unknown_environment_of_a_task_is_an_error_that_names_the_task():
    make = EnvironmentFactory(config_of())
    with pytest.raises(
        PactError, match=r"task t7: .*'lookup_chian'.*did you mean 'lookup_chain'.*registered: .*lookup_chain"
    ):
        make(Task("t7", [], env="lookup_chian"))


@pytest.mark.parametrize("spec", ["{evil}:Calculator", "evil:Calculator", "evil.py:Calculator", "{configured}:Doubler"])
def test_a_row_can_never_name_a_file_or_module(spec, calculator, tmp_path, monkeypatch):
    evil, proof = tmp_path / "evil.py", tmp_path / "proof"
    evil.write_text(f"open({str(proof)!r}, 'w')\n{CALCULATOR}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = spec.format(evil=evil, configured=calculator)
    file = write_rows(tmp_path / "rows.jsonl", {"env": name})
    config = config_of(data={"train": file}, env={"name": f"{calculator}:Doubler"})
    with pytest.raises(DataError, match=r"rows\.jsonl:1: field 'env': a row cannot name a file or module"):
        make_tasks(config)
    with pytest.raises(PactError, match=r"task t: .*a row cannot name a file"):
        EnvironmentFactory(config)(Task("t", [], env=name))
    assert not proof.exists()


def test_registered_formats_are_classes_of_the_base():
    assert all(issubclass(tool_format.get(name), ToolFormat) for name in tool_format.names())
