"""The built-in environment: tasks, expert traces, splits."""

import random
from dataclasses import replace

import pytest

from pact_fast.envs.lookup_chain import BUSY, LookupChain, LookupChainTasks, TraceNoise, noisy_trace
from pact_fast.errors import PactError


def replay(task, trace):
    env = LookupChain()
    env.reset(task)
    return [tuple(env.call(call.name, call.arguments) for call in turn.calls) for turn in trace.turns]


def test_the_expert_reaches_the_answer_through_the_real_tools():
    for task in LookupChainTasks("train", 3, flaky=0.3, parallel=0.5).tasks(200):
        observations = replay(task, task.expert)
        assert observations == [turn.observations for turn in task.expert.turns]
        assert task.answer == task.expert.answer
        assert task.answer not in [turn.reasoning for turn in task.expert.turns]


def test_noisy_traces_show_real_observations_and_often_miss():
    rng = random.Random(0)
    right = 0
    tasks = LookupChainTasks("train", 3).tasks(400)
    for task in tasks:
        trace = noisy_trace(task, TraceNoise(0.35, 0.15), rng)
        assert replay(task, trace) == [turn.observations for turn in trace.turns]
        right += trace.answer == task.answer
    assert 0.15 < right / len(tasks) < 0.45


def test_tasks_repeat_for_a_seed_and_differ_between_seeds():
    first, again, other = (LookupChainTasks("train", seed).tasks(20) for seed in (0, 0, 1))
    assert first == again
    assert [t.prompt for t in first] != [t.prompt for t in other]


@pytest.mark.slow
def test_train_and_held_out_tasks_never_overlap_whatever_the_seed():
    def keys(split, seed):
        return {(t.prompt[-1]["content"], t.answer) for t in LookupChainTasks(split, seed).tasks(600)}

    train = keys("train", 0) | keys("train", 1)
    held_out = keys("eval", 0) | keys("eval", 1)
    assert len(train) > 1000 and not train & held_out


def test_hops_flaky_tools_and_parallel_calls_occur_as_asked():
    tasks = LookupChainTasks("eval", 0, hops=(2, 4), flaky=0.5, parallel=0.5).tasks(100)
    hops = [len(t.env_args["relations"]) for t in tasks]
    assert set(hops) == {2, 3, 4}
    assert any(BUSY in turn.observations for t in tasks for turn in t.expert.turns)
    assert any(len(turn.calls) == 2 for t in tasks for turn in t.expert.turns)
    assert all(len(t.tools) == h + 2 for t, h in zip(tasks, hops, strict=True))


def test_a_row_with_the_former_name_of_flaky_is_refused_with_the_cure():
    task = LookupChainTasks("train", 0).task(0)
    args = {key: value for key, value in task.env_args.items() if key != "flaky"}
    with pytest.raises(PactError, match=r"lookup_chain-train-0-0: the key 'busy' of env_args is now called 'flaky'"):
        LookupChain().reset(replace(task, env_args={**args, "busy": []}))
