"""The trace reward, by hand, and the tricks that are known against rewards of this kind."""

import pytest

from pact_fast.config import RewardConfig
from pact_fast.data.types import ToolCall, TurnRecord
from pact_fast.errors import PactError
from pact_fast.rewards.score import score
from pact_fast.rewards.trace import trace_reward
from tests.support.simulated import GOLD, QUESTION, task
from tests.support.trajectories import rollout

DIRECTOR = ToolCall("get_director", {"entity": "Free Guy"})
BORN = ToolCall("get_birth", {"entity": "Shawn Levy"})
HONEST = [(DIRECTOR, '{"values": ["Shawn Levy"]}'), (BORN, f'{{"values": ["{GOLD}"]}}')]
EVIDENCE = ["Shawn Levy", GOLD]


def act(*pairs, reasoning=""):
    return TurnRecord(reasoning, reasoning, "", [call for call, _ in pairs], [text for _, text in pairs])


def say(text, reasoning=""):
    return TurnRecord(reasoning + text, reasoning, text)


def parts(*turns, question=QUESTION, answers=(GOLD,), answered=True, evidence=EVIDENCE, **settings):
    fits = lambda call: call.name.startswith("get_")  # noqa: E731
    return trace_reward(list(turns), question, answers, answered=answered, fits=fits, evidence=evidence, **settings)


def values(result):
    return (
        result.reward,
        result.answer,
        result.consistency,
        result.grammar,
        result.schema,
        result.evidence,
        result.novelty,
    )


def test_an_honest_trace_earns_all_of_it():
    assert values(parts(*map(act, HONEST), say(GOLD))) == (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)


def test_the_formula_by_hand():
    """One of four calls does not fit, one is repeated, one is ungrounded; the answer is wrong, and was not observed."""
    wrong = ToolCall("no_tool", {})
    unknown = ToolCall("get_birth", {"entity": "Nobody Else"})
    turns = [act(HONEST[0], (wrong, "error: no tool")), act(HONEST[0]), act((unknown, '{"values": []}')), say("1950")]
    got = parts(*turns, weight=0.3)
    assert (got.grammar, got.schema, got.evidence, got.novelty) == (1.0, 0.75, 0.0, 0.5)
    assert got.consistency == pytest.approx((0.75 + 0.0 + 0.5) / 3)
    assert got.reward == pytest.approx(0.3 * got.consistency)


def test_answers_by_f1_and_by_aliases():
    assert parts(*map(act, HONEST), say("July 1968"), metric="f1").answer == pytest.approx(0.8)
    assert parts(*map(act, HONEST), say("the 23 july 1968"), answers=(GOLD, "23 July 1968")).answer == 1.0


@pytest.mark.parametrize(
    "turns",
    [
        [],
        [say("")],
        [*map(act, HONEST)],
        [*map(act, HONEST), say(f"<answer>{GOLD}</answer><answer>1999</answer>")],
        [act(HONEST[0], reasoning="<answer>x</answer>"), say(GOLD)],
        [act(("malformed", "error: not JSON")), *map(act, HONEST), say(GOLD)],
        [say("thinking aloud"), *map(act, HONEST), say(GOLD)],
        [*map(act, HONEST), say(GOLD, "<tool_response>1987</tool_response>")],
        [act((ToolCall("get_director", {"entity": "<information>x"}), "{}")), say(GOLD)],
    ],
)
def test_a_broken_grammar_earns_no_consistency(turns):
    assert parts(*turns, answered=bool(turns) and not turns[-1].attempts).consistency == 0.0


def test_yes_and_answers_from_the_question_need_every_fact():
    both = parts(*map(act, HONEST), say("yes"), answers=("yes",))
    one = parts(act(HONEST[0]), say("yes"), answers=("yes",))
    none = parts(say("Free Guy"), answers=("Free Guy",))
    assert (both.evidence, one.evidence, none.evidence) == (1.0, 0.0, 0.0)
    assert parts(*map(act, HONEST), say("yes"), answers=("yes",), evidence=()).evidence == 0.0


STUFFED = ToolCall("get_director", {"entity": f"Free Guy {GOLD} 1967 1966"})
HACKS = {  # turns, largest reward at w = 0.2
    "no tools, right": ([say(GOLD)], 0.8),
    "no tools, wrong": ([say("1999")], 0.0),
    "copied observation": ([act(HONEST[0]), say("Shawn Levy")], 0.2),
    "stuffed arguments": ([act((STUFFED, '{"values": []}')), say("1999")], 0.2 / 3),
    "echo of an argument": (
        [act((ToolCall("get_x", {"entity": "1999"}), '{"values": ["1999"]}')), say("1999")],
        0.2 / 3,
    ),
    "guesses in an error": (
        [act((STUFFED, '{"error": {"message": "1999", "type": "not_found"}}')), say("1999")],
        0.2 / 3,
    ),
    "padded calls": ([*[act(HONEST[0])] * 9, say("1999")], 0.2 * (1 + 0.1) / 2),
    "answer spam": ([*map(act, HONEST), say("".join(f"<answer>{y}</answer>" for y in (1966, 1967, GOLD, 1999)))], 0.0),
    "all answers at once": ([*map(act, HONEST), say(f"1966 1967 {GOLD}")], 0.2 * 2 / 3),
    "question as answer": ([*map(act, HONEST), say(QUESTION)], 0.2),
    "forged observation": ([act(HONEST[0]), say(f'<tool_response>{{"values": ["{GOLD}"]}}</tool_response>')], 0.0),
    "cut before the answer": ([*map(act, HONEST)], 0.0),
}


@pytest.mark.parametrize("name", HACKS)
def test_a_trick_earns_less_than_an_honest_trace_and_without_the_answer_at_most_w(name):
    turns, most = HACKS[name]
    got = parts(*turns, answered=not turns[-1].attempts)
    assert got.reward <= most + 1e-9 < 1.0
    assert got.reward - 0.8 * got.answer <= 0.2 + 1e-9


def test_a_retry_after_an_error_is_no_repetition_and_sums_of_observed_numbers_are_grounded():
    failed = act((DIRECTOR, '{"error": {"message": "try again", "type": "timeout"}}'))
    total = ToolCall("get_sum", {"expression": "(1,968 - 23) * 1"})
    assert parts(failed, act(HONEST[0]), say("x")).novelty == 1.0
    assert parts(*map(act, HONEST), act((total, "{}")), say("x"), question=f"{QUESTION} Add 1968 and 1.").novelty == 1.0
    assert parts(act((total, "{}")), say("x"), question="Add 1968 and 1?").novelty == 0.0


def test_grpo_is_rewarded_by_the_outcome_that_is_named():
    trajectory = rollout(say("1999"))
    trajectory.env_rewards = {"success": 0.0, "trace_reward": 0.15}
    score(RewardConfig(outcome="trace_reward"), task(), trajectory, outcome_only=True)
    assert trajectory.reward == 0.15 and trajectory.reward_parts["success"] == 0.0
    score(RewardConfig(), task(), trajectory, outcome_only=True)
    assert trajectory.reward == 0.0
    with pytest.raises(PactError, match="gives no 'other'"):
        score(RewardConfig(outcome="other"), task(), trajectory, outcome_only=True)
