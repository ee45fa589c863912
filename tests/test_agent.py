"""The agent loop with a scripted model: a real engine protocol, real environments, every way a trajectory can end."""

import time

import numpy as np
import pytest

from pact_fast.components import Component
from pact_fast.config import RolloutConfig
from pact_fast.data.types import Task
from pact_fast.envs.lookup_chain import LookupChain, LookupChainTasks
from pact_fast.errors import PactError
from pact_fast.rollout.agent import AgentLoop, Job
from tests.support.groups import lookup_chain_renderer
from tests.support.scripted_engine import Script, turn


@pytest.fixture(scope="module")
def renderer():
    return lookup_chain_renderer()


def expert_turns(renderer, task):
    turns = [renderer.assistant_turn(t.reasoning, t.content, t.calls)[0].tolist() for t in task.expert.turns]
    return [*turns, renderer.assistant_turn(task.expert.answer_reasoning, task.expert.answer, [])[0].tolist()]


def run(renderer, tasks, turns, env=LookupChain, **config):
    engine = Script(renderer, turns)
    loop = AgentLoop(engine, renderer, lambda task: env(), RolloutConfig(**config))
    trajectories = loop.run([Job(task, (0, i)) for i, task in enumerate(tasks)])
    loop.close()
    assert sorted(engine.closed) == list(range(len(tasks)))
    return trajectories, engine


def test_the_expert_solves_its_task_and_every_token_is_kept_as_sampled(renderer):
    tasks = LookupChainTasks("train", 1, flaky=0.3, parallel=0.5).tasks(20)
    trajectories, engine = run(renderer, tasks, [expert_turns(renderer, t) for t in tasks])
    for index, (task, trajectory) in enumerate(zip(tasks, trajectories, strict=True)):
        assert trajectory.stop_reason == "answer" and trajectory.env_rewards["success"] == 1.0
        assert trajectory.calls == task.expert.calls
        assert [tuple(t.observations) for t in trajectory.turns[:-1]] == [t.observations for t in task.expert.turns]
        seen = np.concatenate(engine.contexts[index])
        np.testing.assert_array_equal(np.concatenate([trajectory.prompt_ids, trajectory.ids]), seen)
        assert (trajectory.sampled == np.isin(trajectory.components, [1, 2, 3])).all()
        assert (np.isnan(trajectory.logprobs) == ~trajectory.sampled).all()
        assert (trajectory.versions == np.where(trajectory.sampled, 3, -1)).all()
        ends = np.flatnonzero(trajectory.sampled & (trajectory.ids == renderer.eot_id))
        assert len(ends) == len(trajectory.turns)  # end-of-turn is the policy's own token


def test_a_turn_that_stops_at_its_call_is_closed_for_it(renderer):
    """The context equals the template's rendering, but the end of turn was not sampled."""
    task = LookupChainTasks("train", 1, parallel=0.0).task(0)
    whole = expert_turns(renderer, task)
    stops = renderer.stop_ids(at_tool_call=True)
    assert stops[:-1] == renderer.stop_ids(at_tool_call=False) == renderer.eot_ids
    cut = [[*turn[: turn.index(stops[-1]) + 1]] if stops[-1] in turn else turn for turn in whole]
    assert all(len(a) == len(b) - 1 for a, b in zip(cut[:-1], whole[:-1], strict=True))
    (as_sampled,), _ = run(renderer, [task], [[list(turn) for turn in whole]])
    (stopped,), engine = run(renderer, [task], [[list(turn) for turn in cut]])
    np.testing.assert_array_equal(stopped.ids, as_sampled.ids)
    np.testing.assert_array_equal(stopped.ids, np.concatenate(engine.contexts[0])[len(stopped.prompt_ids) :])
    differ = stopped.sampled != as_sampled.sampled
    assert (stopped.ids[differ] == renderer.eot_id).all() and differ.sum() == len(cut) - 1
    assert stopped.calls == as_sampled.calls and stopped.env_rewards["success"] == 1.0


def test_malformed_calls_become_error_observations(renderer):
    task = LookupChainTasks("train", 1).task(0)
    bad = [
        "<tool_call>\n{not json}\n</tool_call>",
        '<tool_call>\n{"name": "get_nothing", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "%s", "arguments": {"of": 3}}\n</tool_call>'.replace(
            "%s", task.tools[0]["function"]["name"]
        ),
        "<tool_call>\n{",
        "done",
    ]
    (trajectory,), _ = run(renderer, [task], [[turn(renderer, text) for text in bad]])
    assert trajectory.stop_reason == "answer" and trajectory.answer == "done"
    assert [len(t.errors) for t in trajectory.turns] == [1, 1, 1, 1, 0]
    assert all("error" in t.observations[0] for t in trajectory.turns[:4])
    assert not trajectory.calls


def test_limits_end_a_trajectory_with_the_reason(renderer):
    task = LookupChainTasks("train", 1, hops=(4, 4), parallel=0.0).task(0)
    script = expert_turns(renderer, task)
    (two,), _ = run(renderer, [task], [list(script)], max_turns=2)
    assert two.stop_reason == "max_turns" and len(two.turns) == 2 and two.turns[1].observations
    (cut,), _ = run(renderer, [task], [list(script)], max_turn_tokens=10)
    assert cut.stop_reason == "max_turn_tokens" and len(cut.ids) == 10 and not cut.calls
    budget = len(script[0]) + 30
    (full,), _ = run(renderer, [task], [list(script)], max_completion_length=budget)
    assert full.stop_reason == "max_completion_length" and len(full.ids) <= budget


def test_a_call_in_a_cut_turn_is_neither_run_nor_rewarded(renderer):
    task = LookupChainTasks("train", 1).task(0)
    whole = expert_turns(renderer, task)[0]
    (cut,), _ = run(renderer, [task], [[whole]], max_turn_tokens=len(whole) - 1)
    assert cut.stop_reason == "max_turn_tokens" and not cut.calls and not cut.turns[0].observations


def test_long_observations_are_cut_with_a_note(renderer):
    class Chatty(LookupChain):
        def call(self, name, arguments):
            return "value " * 5000

    task = LookupChainTasks("train", 1).task(0)
    (trajectory,), _ = run(renderer, [task], [expert_turns(renderer, task)], env=Chatty, max_observation_tokens=40)
    observed = trajectory.turns[0].observations[0]
    assert "cut" in observed and len(observed) < 400
    first = trajectory.turn_ids == 0
    calls = len(trajectory.turns[0].calls)
    assert (trajectory.components[first] == Component.OBSERVATION).sum() <= 41 * calls


@pytest.mark.timing
def test_slow_tools_run_while_others_generate_and_the_order_stays(renderer):
    class Slow(LookupChain):
        blocking = True

        def call(self, name, arguments):
            time.sleep(0.05)
            return super().call(name, arguments)

    tasks = LookupChainTasks("train", 1, parallel=0.0).tasks(12)
    started = time.monotonic()
    trajectories, _ = run(renderer, tasks, [expert_turns(renderer, t) for t in tasks], env=Slow)
    seconds = time.monotonic() - started
    assert all(t.env_rewards["success"] == 1.0 for t in trajectories)
    serial = 0.05 * sum(len(t.calls) for t in trajectories)
    assert seconds < serial / 2


def test_a_prompt_that_is_too_long_names_the_task_and_the_cure(renderer):
    task = Task(
        id="row-7",
        prompt=[{"role": "user", "content": "word " * 500}],
        env_args={"facts": {}, "flaky": [], "starts": []},
    )
    with pytest.raises(PactError, match=r"row-7.*max_prompt_length=64"):
        run(renderer, [task], [[]], max_prompt_length=64)


def test_the_first_of_every_group_are_kept_and_the_others_cancelled(renderer):
    """Two turns for one call, one turn without: the group's shortest end first, in any order."""
    task, long = LookupChainTasks("train", 1).task(0), '<tool_call>\n{"name": "x"}\n</tool_call>'
    turns = {i: [turn(renderer, long)] * n + [turn(renderer, "done")] for i, n in enumerate((3, 0, 1, 1, 0, 2))}
    engine = Script(renderer, turns)
    loop = AgentLoop(engine, renderer, lambda task: LookupChain(), RolloutConfig())
    ended = []
    jobs = [Job(task, (0, i), group=i // 3) for i in range(6)]
    trajectories = loop.run(jobs, lambda index, trajectory: ended.append(index), keep=2)
    assert sorted(ended) == [1, 2, 3, 4] and sorted(engine.closed) == list(range(6))
    assert [len(t.turns) for t in trajectories] == [1, 2, 2, 1]  # in the order of their jobs


def test_of_several_that_end_in_the_same_step_no_more_than_wanted_are_kept(renderer):
    engine = Script(renderer, {i: [turn(renderer, "done")] for i in range(4)})
    loop = AgentLoop(engine, renderer, lambda task: LookupChain(), RolloutConfig())
    jobs = [Job(LookupChainTasks("train", 1).task(0), (0, i)) for i in range(4)]
    assert len(loop.run(jobs, keep=3)) == 3 and sorted(engine.closed) == [0, 1, 2, 3]
