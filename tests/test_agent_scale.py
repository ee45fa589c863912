"""The agent loop's own cost grows with the number of trajectories, not with its square."""

import time
from collections import Counter
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest

from pact_fast.components import Component
from pact_fast.config import RolloutConfig
from pact_fast.data.types import Task, ToolCall
from pact_fast.rollout.agent import AgentLoop, Job
from pact_fast.rollout.engine import Completion
from pact_fast.rollout.pending import TOOL_STEPS, PendingToolCalls

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALL, END = 1, 2


class Words:
    """As little of a renderer as the agent loop needs, so that its own cost shows. A turn is one token."""

    eot_ids, eot_id, call_eot_id = [CALL, END], END, CALL

    def __init__(self):
        self.rendered = []

    def prompt_ids(self, messages, tools):
        self.rendered.append(messages[-1]["content"])
        return np.frombuffer(repr((messages, tools)).encode(), np.uint8).astype(np.int64)

    def parse(self, ids, tools):
        attempts = [ToolCall("look", {})] if ids[-1] == CALL else []
        components = np.full(len(ids), Component.ANSWER, np.uint8)
        return SimpleNamespace(text="", reasoning="", content="", attempts=attempts, components=components)

    def bridge_tokens(self, messages):
        return np.array([3]), np.full(1, Component.OBSERVATION, np.uint8)


class OneAtATime:
    """Finishes one turn a step, as a server does, and the last that was asked for first."""

    synchronous, version, name = False, 0, "one at a time"

    def __init__(self, calls=0):
        self._calls, self._ready, self._turns = calls, {}, Counter()

    def submit(self, request):
        self._ready[request.session] = True

    def step(self, timeout=None):
        if not self._ready:
            return []
        session, _ = self._ready.popitem()
        self._turns[session] += 1
        ids = np.array([CALL if self._turns[session] <= self._calls else END])
        return [Completion(session, ids, np.zeros(1, np.float32), True)]

    def close(self, session):
        self._ready.pop(session, None)


class Looks:
    blocking, tools = False, [TOOL]

    def reset(self, task):
        return None

    def call(self, name, arguments):
        return "seen"

    def reward(self, task, trajectory):
        return {}


class CountedGroup(int):
    """The number of a group that counts how often it is looked at."""

    looks = 0

    def __eq__(self, other):
        CountedGroup.looks += 1
        return int(self) == int(other)

    def __hash__(self):
        CountedGroup.looks += 1
        return hash(int(self))


class CountedTime(float):
    """A time that counts how often it is compared with a start."""

    looks = 0

    def __sub__(self, other):
        CountedTime.looks += 1
        return float(self) - other


def looks(count, monkeypatch, keep=None, **config):
    """Count how often the loop looks at groups and at start times."""
    monkeypatch.setattr(time, "monotonic", lambda: CountedTime(1.0))
    CountedGroup.looks = CountedTime.looks = 0
    loop = AgentLoop(OneAtATime(), Words(), lambda task: Looks(), RolloutConfig(**config))
    task = Task(id="t", prompt=[{"role": "user", "content": "look"}], tools=[TOOL], env_args={})
    trajectories = loop.run([Job(task, (0, i), group=CountedGroup(i // 4)) for i in range(count)], keep=keep)
    assert len(trajectories) == (count if keep is None else count // 4 * keep)
    return CountedGroup.looks + CountedTime.looks


@pytest.mark.parametrize("options", [{"trajectory_timeout": 600.0}, {"keep": 3}], ids=["timeout", "oversampling"])
def test_work_grows_linearly_with_the_number_of_trajectories(options, monkeypatch):
    few, many = (looks(count, monkeypatch, **options) for count in (200, 800))
    assert 0 < many < 4.5 * few, (few, many)


def test_a_prompt_is_rendered_once_for_all_its_rollouts_and_forgotten():
    tasks = [Task(id=text, prompt=[{"role": "user", "content": text}], tools=[TOOL], env_args={}) for text in "ab"]
    renderer = Words()
    loop = AgentLoop(OneAtATime(), renderer, lambda task: Looks(), RolloutConfig())
    jobs = [Job(tasks[i // 8], (0, i), group=i // 8) for i in range(16)]
    trajectories = loop.run(jobs)
    assert renderer.rendered == ["a", "b"]
    for job, trajectory in zip(jobs, trajectories, strict=True):
        np.testing.assert_array_equal(trajectory.prompt_ids, Words().prompt_ids(job.task.prompt, job.task.tools))
    loop.prompt_ids(tasks[0])
    loop.run(jobs[:3])
    assert renderer.rendered == ["a", "b", "a", "a"]


def test_prompts_that_only_compare_equal_are_rendered_apart():
    """1 == True, but a template writes them differently."""

    def task(value):
        parameters = {"type": "object", "properties": {"x": {"default": value}}}
        tool = {"type": "function", "function": {"name": "look", "parameters": parameters}}
        return Task(id="t", prompt=[{"role": "user", "content": "look"}], tools=[tool], env_args={})

    loop = AgentLoop(OneAtATime(), Words(), lambda task: Looks(), RolloutConfig())
    one, true = loop.run([Job(task(1), (0, 0)), Job(task(True), (0, 1))])
    assert task(1).tools == task(True).tools and one.prompt_ids.tolist() != true.prompt_ids.tolist()


def test_a_synchronous_engine_gets_results_after_a_fixed_number_of_steps_in_the_order_of_the_calls():
    calls, late = PendingToolCalls(True), Future()
    calls.add(7, [late], True)
    calls.tick(idle=False)
    calls.add(3, ["now"], False)
    assert calls.due() == [(3, ["now"])]
    calls.add(5, ["later"], True)
    calls.add(4, ["dropped"], True)
    assert calls.drop(4) and not calls.drop(4) and len(calls) == 2
    for _ in range(TOOL_STEPS - 2):
        calls.tick(idle=False)
        assert calls.due() == []
    calls.tick(idle=False)
    assert calls.due() == [(7, [late])]  # not done: the loop waits for it
    calls.add(6, ["beside"], True)
    calls.tick(idle=True)  # the engine has nothing to do: the clock goes to the next call that is due
    assert calls.due() == [(5, ["later"])]
    calls.tick(idle=True)
    assert calls.due() == [(6, ["beside"])] and len(calls) == 0


def test_other_engines_get_results_when_the_last_of_a_turn_arrives():
    calls, first, second, other = PendingToolCalls(False), Future(), Future(), Future()
    calls.add(0, [first, "text", second], True)
    calls.add(1, [other], True)
    first.set_result("a")
    calls.tick(idle=True)
    assert calls.due() == []
    assert calls.drop(1)
    other.set_result("of a trajectory that is over")
    second.set_result("b")
    calls.tick(idle=True)
    assert calls.due() == [(0, [first, "text", second])] and len(calls) == 0
    calls.tick(idle=True)
    assert calls.due() == []
