"""The environment of tools that come with the task."""

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pact_fast.data.types import Task, ToolCall, Trajectory, TurnRecord
from pact_fast.envs.base import Environment
from pact_fast.envs.python_tools.env import PythonTools
from pact_fast.envs.python_tools.pool import SandboxPool
from pact_fast.envs.python_tools.protections import PROTECTIONS, describe
from pact_fast.errors import PactError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox needs Linux")

CODES = {
    "find": "import json\ndef find(place):\n    return {'place': place, 'height': '3,776 m'}",
    "slow": "def slow():\n    import time; time.sleep(60)",
    "count": "n = 0\ndef count():\n    global n; n += 1; return n",
}
SCHEMAS = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in CODES]


@pytest.fixture(scope="module")
def pool():
    with SandboxPool(workers=2) as pool:
        yield pool


@pytest.fixture
def env(pool):
    env = PythonTools(pool, timeout=0.5)
    env.reset(ftrl_task())
    return env


def ftrl_task(**changes):
    env_args = {"codes": CODES, "unsolved_set": {"find": ["3,776"], "count": ["1"]}, "scoring": "ftrl"} | changes
    return Task("t", [{"role": "user", "content": "How high?"}], SCHEMAS, answer="3776", env_args=env_args)


def trajectory(*turns, stop_reason="answer"):
    empty = np.zeros(0, np.int64)
    return Trajectory("t", empty, empty, empty, empty, empty, empty, empty, list(turns), stop_reason)


def turn(*pairs, content=""):
    return TurnRecord("", "", content, [attempt for attempt, _ in pairs], [text for _, text in pairs])


def test_it_is_a_blocking_environment_that_offers_the_tasks_tools(env):
    assert isinstance(env, Environment) and env.blocking
    assert env.tools == SCHEMAS


def test_calls_run_the_tools_source(env):
    assert env.call("find", {"place": "Fuji"}) == '{"place": "Fuji", "height": "3,776 m"}'
    assert [env.call("count", {}) for _ in range(2)] == ["1", "1"]


def test_failures_are_observations(env):
    assert env.call("find", {}).startswith("error: TypeError: find() missing 1 required")
    assert env.call("find", {"site": "Fuji"}).startswith("error: TypeError")
    assert env.call("fnid", {}) == "error: there is no tool 'fnid'; the tools are: find, slow, count"
    assert env.call("slow", {}) == "error: the tool did not finish within 0.5 s"


@pytest.mark.slow
def test_environments_share_the_pool_from_several_threads(pool):
    def run(n):
        env = PythonTools(pool)
        env.reset(ftrl_task(codes=CODES | {"double": "def double(n): return 2 * n"}))
        return env.call("double", {"n": n})

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(run, range(20))) == [str(2 * n) for n in range(20)]


def ours(rewards):
    """Without the official scores, which are the same here: no call repeats its argument."""
    mine = {name: value for name, value in rewards.items() if not name.startswith(("official_", "answer_"))}
    assert all(rewards[f"official_{name}"] == mine[name] for name in ("solve_p", "solve_r", "solve_f1"))
    return mine


def test_ftrl_rewards_count_every_call_malformed_ones_too(env):
    task = ftrl_task()
    find, count = (ToolCall("find", {}), "3776 m"), (ToolCall("count", {}), "1")
    full = env.reward(task, trajectory(turn(find, count), turn(content="3776")))
    assert ours(full) == {"solve_p": 1.0, "solve_r": 1.0, "solve_f1": 1.0, "success": 1.0}

    partly = env.reward(task, trajectory(turn(find), turn(("not JSON", "error: not JSON")), stop_reason="max_turns"))
    assert ours(partly) == {"solve_p": 0.5, "solve_r": 0.5, "solve_f1": 0.5, "success": 0.0}

    # calls of a last turn that was cut off were never answered
    cut = env.reward(
        task, trajectory(turn(find), TurnRecord("", "", "", [ToolCall("count", {})]), stop_reason="max_turns")
    )
    assert cut["solve_p"] == 1.0

    silent = env.reward(task, trajectory(turn(content="3776")))
    assert ours(silent) == {"solve_p": 1.0, "solve_r": 0.0, "solve_f1": 0.0, "success": 0.0}
    assert [rewards["answer_correct"] for rewards in (full, partly, silent)] == [1.0, 0.0, 1.0]


def test_toolhop_reward_reads_the_answer(env):
    task = ftrl_task(scoring="toolhop")
    assert env.reward(task, trajectory(turn(content="It is 3,776."))) == {"success": 1.0, "official_success": 1.0}
    assert env.reward(task, trajectory(turn(content="It is 3,777."))) == {"success": 0.0, "official_success": 0.0}


def test_a_task_without_scoring_has_no_outcome_reward(env):
    assert env.reward(ftrl_task(scoring=None), trajectory(turn(content="3776"))) == {}


def test_a_task_that_cannot_run_or_be_scored_is_an_error_with_its_id(env):
    with pytest.raises(PactError, match="task t: env_args has no 'codes'"):
        env.reset(ftrl_task(codes={}))
    with pytest.raises(PactError, match=r"task t: env_args\.unsolved_set is empty"):
        env.reset(ftrl_task(unsolved_set={"find": []}))


@pytest.mark.slow
def test_the_factory_makes_environments_of_one_pool():
    make = PythonTools.factory({"timeout": 0.4, "workers": 1}, 10.0)
    one, other = make(), make()
    assert one is not other and one._pool is other._pool
    one.reset(ftrl_task())
    assert one.call("slow", {}) == "error: the tool did not finish within 0.4 s"
    one.close()
    other.close()
    with pytest.raises(PactError, match="the tool pool is closed"):
        one.call("slow", {})


def test_the_factory_names_the_nearest_known_key():
    with pytest.raises(PactError, match=r"env\.args: unknown key 'worker'; did you mean 'workers'\?"):
        PythonTools.factory({"worker": 1}, 10.0)
    with pytest.raises(PactError, match="python_tools takes workers, timeout, memory_mb, max_output, sandbox, require"):
        PythonTools.factory({"zzz": 1}, 10.0)


def test_the_page_on_environments_has_the_words_of_the_protections():
    page = (Path(__file__).parents[1] / "docs" / "environments.md").read_text(encoding="utf-8")
    table = page[page.index("| name | protection |") :].split("\n\n")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.MULTILINE))
    assert rows == PROTECTIONS


def test_what_holds_and_what_does_not_is_a_line_each():
    lines = describe(["identity", "network"])
    assert len(lines) == len(PROTECTIONS)
    assert lines[0] == "network: in force: no network at all" and lines[-1] == "identity: in force: an unused user id"
    assert lines[1].startswith("files: NOT in force: the file system is read-only")


@pytest.mark.slow
def test_doctor_says_which_protections_hold():
    from pact_fast.cli.doctor import _Checks
    from pact_fast.config import load_config

    checks = _Checks(load_config("quickstart", ["env.name=python_tools", "env.args={workers: 1}"]))
    checks.sample = [ftrl_task()]
    lines = checks.environment().splitlines()
    assert lines[0].startswith("3 tools in the first 1 tasks")
    names = [re.fullmatch(r" +(\w+): (?:NOT )?in force: .*", line) for line in lines[1:]]
    assert [name and name[1] for name in names] == list(PROTECTIONS)
