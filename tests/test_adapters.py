"""Adapters: functions, TRL's classes and Gymnasium's environments, and hostile calls to every adapter."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shlex
import signal
import sys
import threading
from pathlib import Path

import pytest

from pact_fast.cli.main import main
from pact_fast.config import RolloutConfig
from pact_fast.data.types import StopReason, Task
from pact_fast.envs.base import has_user
from pact_fast.envs.registry import environment
from pact_fast.errors import PactError
from pact_fast.rollout.agent import AgentLoop, Job
from tests.support import adapters
from tests.support.faults import at_call
from tests.support.groups import lookup_chain_renderer
from tests.support.models import TINY
from tests.support.runs import TOKENIZERS, RunProcess, metrics
from tests.support.scripted_engine import Script, turn
from tests.support.trajectories import rollout

ROOT = Path(__file__).parent.parent
TOOLS = "tests.support.adapters"


def tiny_settings(steps: int) -> list[str]:
    """A tiny model in place of the quickstart's."""
    model = {**TINY, "max_position_embeddings": 4096}
    sizes = ["num_generations=2", "max_turn_tokens=8", "max_prompt_length=1500", "max_completion_length=64"]
    return [
        *("model.path=null", f"model.random_init={json.dumps(model)}", "model.dtype=float32", "threads=1"),
        f"model.tokenizer={TOKENIZERS['tiny']}",
        *(f"rollout.{size}" for size in sizes),
        *(f"trainer.{size}" for size in ("max_tokens_per_pack=4096", f"max_steps={steps}", "prompts_per_step=2")),
        "trainer.eval_tasks=2",
    ]


def task(id="t", **fields) -> Task:
    return Task(id, [{"role": "user", "content": "Go."}], **fields)


def make(name, args, timeout=5.0):
    return environment.get(name).factory(args, timeout)


def started(name, args, at=None, timeout=5.0):
    """(environment after reset, result of reset)."""
    env = make(name, args, timeout)()
    return env, env.reset(at or task())


def functions(*names, **args):
    return started("functions", {"tools": [f"{TOOLS}:{name}" for name in names], **args})[0]


def says(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def play(texts, make_env, at=None, **config):
    """The trajectory of these turns."""
    renderer = lookup_chain_renderer()
    engine = Script(renderer, [[turn(renderer, text) for text in texts]])
    loop = AgentLoop(
        engine, renderer, make_env, RolloutConfig(max_completion_length=4000, max_turn_tokens=500, **config)
    )
    (trajectory,) = loop.run([Job(copy.deepcopy(at or task()), (0, 0))])
    loop.close()
    return trajectory


# functions


def test_functions_are_tools_with_the_schemas_of_their_hints_and_docstrings():
    env = functions("echo", "wait", "count")
    assert [tool["function"]["name"] for tool in env.tools] == ["echo", "wait", "count"]
    assert env.tools[0]["function"] == {
        "name": "echo",
        "description": "Say it again.",
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string", "description": "What."}},
            "required": ["text"],
        },
    }
    assert "state" not in json.dumps(env.tools[2])


def test_results_are_text_json_or_errors():
    env = functions("echo", "wait", "broken", "changes")
    assert env.call("echo", {"text": "é\n"}) == "é\n"
    assert env.call("wait", {"seconds": 0}) == '{"waited": 0}'
    assert env.call("broken", {"text": "k"}) == "error: KeyError: 'k'"
    given = {"items": ["a"]}
    assert env.call("changes", given) == '["a", "changed"]' and given == {"items": ["a"]}
    assert len(env.call("echo", {"text": "x" * 100_000})) < 66_000


def test_state_is_that_of_the_episode_and_begins_with_the_tasks():
    make_env = make("functions", {"tools": [f"{TOOLS}:count", f"{TOOLS}:Log"]})
    at = task(env_args={"state": {"calls": 4}})
    for env in (make_env(), make_env()):
        env.reset(at)
        assert [env.call("count", {}), env.call("count", {}), env.call("write", {"line": "a"})] == ["5", "6", "1"]
        env.reset(task())
        assert [env.call("count", {}), env.call("write", {"line": "b"})] == ["1", "1"]
    assert at.env_args == {"state": {"calls": 4}}


def test_an_async_function_runs_in_a_thread_and_has_a_deadline():
    env, _ = started("functions", {"tools": [f"{TOOLS}:wait"]}, timeout=0.05)
    assert env.blocking and not functions("echo").blocking and functions("echo", blocking=True).blocking
    assert functions("Slow").blocking and functions("Slow").call("look", {}) == "seen"
    assert env.call("wait", {"seconds": 60}) == "error: the tool did not finish within 0.05 s"


@pytest.mark.slow
def test_functions_run_in_the_sandbox_if_asked():
    env = functions("evaluate", sandbox=True)
    try:
        assert env.call("evaluate", {"expression": "6 * 7"}) == "42"
        adapters.RAN.clear()
        env.call("evaluate", {"expression": "RAN.append('here')"})
        assert adapters.RAN == []  # it happened in another process
        assert "takes no argument" in env.call("evaluate", {"expression": "1", "globals": {}})
        assert env.machine_report() != functions("echo").machine_report()
    finally:
        env.close()


# TRL


def trl(at=None, **args):
    return started("trl", {"factory": f"{TOOLS}:Trl", **args}, at)


def test_a_class_of_trl_gets_the_row_and_answers_as_in_trl():
    at = task(columns={"level": 3}, answer="7", env_args={"x": 1})
    env, observation = trl(at)
    assert env._now.row == {"prompt": at.prompt, "level": 3, "answer": "7"} and observation == "There are 3 columns."
    assert sorted(tool["function"]["name"] for tool in env.tools) == ["blocks", "fail", "later", "write"]
    assert env.call("write", {"line": "a"}) == "1" and env.call("later", {}) == "later"
    assert env.call("blocks", {}) == "a cat: [image: not shown]"
    assert env.call("fail", {}) == "{'error': 'it failed'}"
    assert env.reward(at, rollout()) == {"success": 0.5}
    env.reset(at)
    assert env.reward(at, rollout()) == {"success": 0.0}


def test_a_row_chooses_among_several_classes_and_functions_read_the_environment():
    args = {"factory": {"a": f"{TOOLS}:Trl", "b": f"{TOOLS}:TrlOther"}, "reward": [f"{TOOLS}:pushed"]}
    at = task(columns={"environment": "b"}, answer="7")
    env, _ = started("trl", args, at)
    assert env._now.row == {"prompt": at.prompt, "answer": "7"}
    assert env.call("push", {}) == "None"  # as TRL writes it
    assert env.reward(at, rollout()) == {"pushed": 1.0, "success": 1.0}
    with pytest.raises(PactError, match=r"column 'environment' is 'c'; env\.args\.factory has a, b"):
        env.reset(task(columns={"environment": "c"}))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trl_itself_finds_the_same_tools(tmp_path):
    """GRPOTrainer of the installed TRL, with the class of the example."""
    trl_package = pytest.importorskip("trl", reason="pip install trl")
    from transformers.utils import get_json_schema

    from examples.trl_environment import Guess
    from tests.support.chat_tokenizers import qwen3_like
    from tests.support.trl_trainers import settings, tiny_model

    options = settings(tmp_path, max_steps=1, per_device_train_batch_size=8, max_completion_length=4)
    rows = [{"prompt": [{"role": "user", "content": "Find it."}], "seed": n} for n in range(8)]
    datasets = pytest.importorskip("datasets")
    trainer = trl_package.GRPOTrainer(
        model=tiny_model(),
        args=trl_package.GRPOConfig(**options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=qwen3_like(),
        environment_factory=Guess,
    )
    theirs = [get_json_schema(tool) for tool in trainer._env_tools[None]]
    for schema in theirs:
        schema["function"].pop("return", None)
    env, _ = started("trl", {"factory": "examples/trl_environment.py:Guess"})
    assert env.tools == theirs
    game = Guess()
    assert game.reset(**rows[3]) == env.reset(task(columns={"seed": 3}))
    for number in (5, 2, 7, 1):
        try:
            expected = str(game.guess(number))
        except ValueError as error:
            expected = str({"error": str(error)})  # the form of TRL's tool message
        assert env.call("guess", {"number": number}) == expected
    assert env.reward(task(), rollout()) == {"success": game.get_reward()}


# Gymnasium

GYM = "tests/support/gymnasium_envs.py"


@pytest.fixture
def in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def gymnasium(in_the_checkout):
    return pytest.importorskip("gymnasium", reason="pip install gymnasium")


def gym(name="Words", at=None, **args):
    return started("gymnasium", {"id": f"{GYM}:{name}", **args}, at)


def test_messages_are_actions_until_the_environment_terminates(gymnasium):
    env, seen = gym()
    trajectory = play(["one", "end", "never"], lambda _: env)
    assert [turn.user for turn in trajectory.turns] == ["seen one", None]
    assert trajectory.stop_reason is StopReason.ENVIRONMENT and trajectory.env_rewards == {
        "success": 1.0,
        "return": 1.0,
    }
    assert seen == env.reset(task()) and seen != env.reset(task("other"))


def test_calls_are_actions_and_end_the_episode(gymnasium):
    trajectory = play([says("act", action="one"), says("act", action="end"), "never"], lambda _: gym(action="tool")[0])
    assert [turn.observations for turn in trajectory.turns] == [["seen one"], ["seen end"]]
    assert trajectory.stop_reason is StopReason.ENVIRONMENT and trajectory.env_rewards["success"] == 1.0
    assert not has_user(gym(action="tool")[0]) and has_user(gym()[0])


def test_what_is_no_action_takes_no_step_and_an_error_of_the_environment_is_text(gymnasium):
    env, _ = gym()
    assert env.respond("§").startswith("error: '§' is not among the actions, Text(1, 40, ")
    assert env.respond("x" * 41).startswith("error") and env._env.steps == 0
    assert env.respond("fail").startswith("error: ValueError: it failed")
    assert env.respond("two") == "seen two" and env.respond("three") is None and env.respond("four") is None
    assert env.reward(task(), rollout()) == {"success": 0.0, "return": 0.0}


def test_discrete_actions_are_numbers_and_info_may_state_the_outcome(gymnasium):
    env, _ = gym("Doors", action="tool")
    assert env.call("act", {"action": "left"}) == "error: 'left' is no action; say a number from 1 to 3"
    assert env.call("act", {"action": "4"}).startswith("error: '4' is not among the actions")
    assert env.call("act", {"action": " 2 "}) == "open" and env.finished()
    assert env.reward(task(), rollout()) == {"success": 1.0, "return": -2.0}


def test_the_seed_is_the_rows_and_reaches_reset(gymnasium):
    first = [gym(at=task(env_args={"seed": 5}))[1] for _ in range(2)]
    assert first[0] == first[1] == gym(at=task("u", columns={"seed": 5}))[1] and first[0].startswith("5 ")
    source = environment.get("gymnasium").tasks({"id": f"{GYM}:Words"}, 3)
    drawn = [t.env_args["seed"] for t in source.train(0, 8) + source.train(1, 8)]
    held_out = [t.env_args["seed"] for t in source.held_out(8)]
    assert len({*drawn, *held_out}) == 24 and drawn[8:] == [t.env_args["seed"] for t in source.train(1, 8)]


def test_a_registered_environment_is_made_by_its_id_with_its_limit_of_steps(gymnasium):
    gymnasium.register("pact_fast_words-v0", entry_point="tests.support.gymnasium_envs:Words", max_episode_steps=2)
    env, _ = started("gymnasium", {"id": "pact_fast_words-v0"})
    assert env.respond("one") == "seen one" and env.respond("two") is None


# the agent loop


class InOrder:
    """The first call of a turn is slower than the second."""

    blocking, ordered = True, True
    tools = ()

    def __init__(self):
        self.seen, self.second = [], threading.Event()

    def reset(self, task):
        return None

    def call(self, name, arguments):
        if arguments["n"] == 0:
            self.second.wait(0.3)
        self.second.set()
        self.seen.append(arguments["n"])
        return str(len(self.seen))

    def reward(self, task, trajectory):
        return {}


def test_calls_of_a_turn_run_in_order_where_the_environment_says_so():
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    text = "\n".join(says("f", n=n) for n in range(20))
    env = InOrder()
    trajectory = play([text, "done"], lambda _: env, task(tools=tools))
    assert env.seen == list(range(20)) and trajectory.turns[0].observations == [str(n + 1) for n in range(20)]
    env = InOrder()
    env.ordered = False
    play([text, "done"], lambda _: env, task(tools=tools))
    assert env.seen[0] != 0


# errors that `doctor` shows

BAD = [
    ("functions", {}, "env.args.tools: Field required"),
    ("functions", {"tools": []}, "env.args.tools"),
    ("functions", {"tools": [f"{TOOLS}:echo"], "sandbx": True}, "env.args.sandbx.*known keys: tools, sandbox"),
    ("functions", {"tools": ["nowhere.py:f"]}, "no file nowhere.py"),
    ("functions", {"tools": [f"{TOOLS}:ecko"]}, "did you mean 'echo'"),
    ("functions", {"tools": [f"{TOOLS}:no_docstring"]}, "'no_docstring'.*docstring"),
    ("functions", {"tools": [f"{TOOLS}:no_hints"]}, "'no_hints'.*type hint"),
    ("functions", {"tools": [f"{TOOLS}:anything"]}, "'arguments' cannot be given by name"),
    ("functions", {"tools": [f"{TOOLS}:Silent"]}, "no public methods"),
    ("functions", {"tools": [f"{TOOLS}:echo", f"{TOOLS}:echo"]}, "two tools are called 'echo'"),
    ("functions", {"tools": [f"{TOOLS}:wait"], "sandbox": True}, "wait is a class or async"),
    ("functions", {"tools": [f"{TOOLS}:count"], "sandbox": True}, "count keeps state"),
    ("trl", {"factory": f"{TOOLS}:TrlWithoutReset"}, "has no method 'reset'"),
    ("trl", {"factory": f"{TOOLS}:echo"}, "cannot be called without arguments"),
    ("trl", {"factory": "nowhere.py:f"}, "no file nowhere.py"),
    ("gymnasium", {"id": "nowhere.py:f"}, "no file nowhere.py"),
    ("gymnasium", {"id": "NoSuch-v0"}, "'NoSuch-v0' cannot be made: .*NoSuch"),
    ("gymnasium", {"id": f"{GYM}:Arrays"}, "the actions of Arrays are Box"),
    ("mcp", {"servers": {}}, "env.args.servers"),
    ("mcp", {"servers": {"a": {}}}, "either a command or a url"),
    ("mcp", {"servers": {"a": {"command": "python", "env": ["NO_SUCH_VARIABLE"]}}}, "NO_SUCH_VARIABLE is not set"),
    ("verifiers", {}, "env.args.id: Field required"),
]


@pytest.mark.parametrize(("name", "args", "message"), BAD, ids=str)
def test_mistakes_in_the_settings_are_one_line(name, args, message, in_the_checkout):
    if name in ("mcp", "gymnasium"):
        pytest.importorskip(name)
    with pytest.raises(PactError, match=message) as caught:
        make(name, args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("gymnasium", {"id": "x"}),
        ("mcp", {"servers": {"a": {"command": "x"}}}),
        ("verifiers", {"id": "x"}),
    ],
)
def test_a_missing_package_is_named_with_what_to_install(name, args, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PactError, match=f"the package {name} cannot be imported.*pip install .*{name}"):
        make(name, args)


def test_observations_must_be_text(gymnasium):
    with pytest.raises(PactError, match="observation of type int; wrap the environment"):
        gym("Numbers")


# hostile calls

DEEP: object = 1
for _ in range(5000):
    DEEP = [DEEP]
NAMES = [
    *("__init__", "__class__", "__globals__", "_secret", "reset", "get_reward", "reward", "close", "lines", "RAN"),
    *("echo.__globals__", "os.system", "act.__self__", "write\n", "", "é", "\ud800", "a" * 100_000, "__import__('os')"),
]
VALUES = [
    *(
        "__import__('os')._exit(1)",
        "');raise SystemExit#",
        "{0.__class__.__globals__}",
        "${HOME}",
        "%(x)s",
        "\x00\x1b[2J",
    ),
    *("\ud800", "\u202e\U000e0041", "x" * 2_000_000, 10**5000, float("nan"), -1, True, None, [], {}, DEEP),
    {"__class__": {"__init__": {"__globals__": {}}}},
    {"$ref": "#/definitions/x"},
]
KEYS = ["self", "state", "cls", "__class__", "args", "kwargs", "**", "", "a" * 100_000, "\ud800"]


def hosts():
    """name → (adapter, arguments, an allowed call)"""
    gym_args = {"id": f"{GYM}:Words", "action": "tool"}
    return {
        "functions": ("functions", {"tools": [f"{TOOLS}:echo", f"{TOOLS}:count", f"{TOOLS}:Log"]}, ("echo", "text")),
        "trl": ("trl", {"factory": f"{TOOLS}:Trl"}, ("write", "line")),
        "gymnasium": ("gymnasium", gym_args, ("act", "action")),
        "mcp": (
            "mcp",
            {"servers": {"s": {"command": sys.executable, "args": ["tests/support/mcp_server.py"]}}},
            ("put", "text"),
        ),
        "verifiers": ("verifiers", {"id": "tests/support/verifiers_envs.py:tools"}, ("echo", "text")),
    }


@pytest.mark.parametrize(
    "host",
    [
        name if name in ("functions", "trl", "gymnasium") else pytest.param(name, marks=pytest.mark.slow)
        for name in hosts()
    ],
)
def test_hostile_calls_run_nothing_but_the_tools(host, in_the_checkout):
    name, args, (tool, argument) = hosts()[host]
    if name not in ("functions", "trl"):
        pytest.importorskip(name)
    make_env = make(name, args)
    env = make_env()
    at = task(answer="1")
    env.reset(at)
    allowed = {schema["function"]["name"] for schema in env.tools} | {"act"}
    strict = name in ("functions", "trl", "gymnasium")  # others leave it to the environment or the server
    adapters.RAN.clear()
    calls = [(wrong, {}) for wrong in NAMES] + [(wrong, {argument: "x"}) for wrong in NAMES]
    calls += [(tool, {argument: value}) for value in VALUES]
    calls += [(tool, {argument: "x", key: "y"}) for key in KEYS] + [(tool, {key: "x"}) for key in KEYS] + [(tool, {})]
    for wrong, given in calls:
        seen = env.call(wrong, given)
        assert isinstance(seen, str) and len(seen) < 70_000
        if wrong not in allowed:
            assert "there is no tool" in seen
        elif set(given) != {argument} and strict:
            assert "takes no argument" in seen or "needs the argument" in seen
    assert set(adapters.RAN) <= allowed
    env.reset(at)
    if name != "gymnasium":
        assert env.call(tool, {argument: "still here"})  # the environment has survived all of it
    close = getattr(env, "close", None)
    if close:
        close()


# the examples: the doctor, and two steps


EXAMPLES = {
    "function_tools": "functions",
    "trl_environment": "trl",
    "gymnasium_environment": "gymnasium",
    "verifiers_environment": "verifiers",
    "mcp_server": "mcp",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_passes_the_doctor_and_trains_by_the_command_in_its_text(
    example, tmp_path, in_the_checkout, monkeypatch, capsys
):
    if EXAMPLES[example] != "functions":
        pytest.importorskip(EXAMPLES[example])
    monkeypatch.setenv(
        "PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )  # the server is started as `python`
    text = (ROOT / "examples" / f"{example}.py").read_text("utf-8")
    [command] = re.findall(r"^ +pact-fast train quickstart (.*)$", text, re.M)
    settings = [*tiny_settings(steps=2), *shlex.split(command), f"output_dir={tmp_path / 'run'}"]
    status = main(["doctor", "quickstart", *settings])
    said = capsys.readouterr().out
    assert status == 0 and "ok    environment" in said, said
    assert main(["train", "quickstart", *settings]) == 0
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [step["step"] for step in steps if "loss" in step] == [1, 2], steps
    graded = EXAMPLES[example] in ("trl", "gymnasium", "verifiers")
    assert graded == any("reward/success" in step for step in steps)


FUNCTIONS = (
    "env.args={tools: [examples/function_tools.py:add, examples/function_tools.py:wait]}"  # in threads: one is async
)


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(
    "told",
    [
        ["env.name=functions", FUNCTIONS, "data.train=examples/function_tools.jsonl"],
        ["env.name=gymnasium", f"env.args={{id: {GYM}:Words}}", "algorithm.name=grpo"],
    ],
    ids=["functions", "gymnasium"],
)
def test_a_killed_run_resumes_bit_for_bit(told, tmp_path, in_the_checkout):
    if "env.name=gymnasium" in told:
        pytest.importorskip("gymnasium")
    recipe = ["quickstart", *tiny_settings(steps=2), *told, "pretrain=null", "trainer.save_steps=1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    RunProcess(whole, recipe=recipe).succeed()
    inject = functools.partial(at_call, "pact_fast.train.learner:Learner.update", 2, die)
    assert RunProcess(killed, recipe=recipe, inject=inject).exit_code() == -signal.SIGKILL
    RunProcess(killed, recipe=recipe).succeed()
    assert metrics(whole) == metrics(killed)
    assert [step["step"] for step in metrics(whole) if "loss" in step] == [1, 2]
    rollouts = [
        [path.read_bytes() for path in sorted((run / "rollouts").glob("*.jsonl.gz"))] for run in (whole, killed)
    ]
    assert rollouts[0] and rollouts[0] == rollouts[1]
