"""Tricks that earn a reward without solving the task, against every shipped reward, and against rewards with a known bug.

A new reward joins by one line in REWARDS, a new trick by one in HACKS.
"""

import json
from dataclasses import dataclass, field

import numpy as np
import pytest

from pact_fast.data.types import StopReason, Task, ToolCall, Trajectory, TurnRecord
from pact_fast.envs.python_tools.env import PythonTools
from pact_fast.envs.python_tools.pool import SandboxPool
from pact_fast.rewards.answers import answer_tokens
from pact_fast.rewards.feedback import Feedback, is_error, stated, trajectory_feedback
from pact_fast.rewards.ftrl import contains_parts, ftrl_reward
from pact_fast.rewards.score import turn_rewards
from pact_fast.rewards.toolhop import is_correct
from pact_fast.rewards.toolrl import pair_score, toolrl_reward
from pact_fast.rewards.trace import trace_reward

GOLD = "1987"
GUESSES = [str(year) for year in range(1900, 2060)]
LIST = " ".join(GUESSES)
WRONG = ToolCall("lookup", {"name": "somebody else"})
QUESTION = "Was Anna Bell born in 1985, 1986 or 1987?"


def task(*, expected=GOLD, **fields):
    env_args = {"codes": {"lookup": "…"}, "scoring": "ftrl", "unsolved_set": {"lookup": [expected]}}
    return Task("t", [{"role": "user", "content": QUESTION}], env_args=env_args, **fields)


def rollout(*turns, stop=StopReason.ANSWER):
    none = np.zeros(0, np.int64)
    return Trajectory("t", none, none, none, none, none, none, none, list(turns), stop)


def called(*calls, text=""):
    """A turn with (call, observation) pairs."""
    return TurnRecord(text, text, text, [call for call, _ in calls], [observation for _, observation in calls])


def said(text):
    return TurnRecord(text, "", text)


def lookup(name, observation):
    return called((ToolCall("lookup", {"name": name}), observation))


# rewards: (task, trajectory) → number. Each gets the task with the fields that it scores.


def ftrl(name):
    return lambda trajectory, expected=GOLD: PythonTools.reward(None, task(expected=expected), trajectory)[name]


def toolhop(trajectory, expected=GOLD):
    return float(is_correct(expected, trajectory))


def matching(trajectory, expected=GOLD):
    reference = [ToolCall("lookup", {"name": "Anna Bell"})]
    return sum(turn_rewards(trajectory, task(reference_calls=reference), penalty=0.0))


def answer_f1(trajectory, expected=GOLD):
    return sum(turn_rewards(trajectory, task(reference_calls=[], answer=expected), penalty=0.0))


def trace(trajectory, expected=GOLD):
    """Trace reward beyond w, as a fraction of 1 − w. A wrong answer can never earn it."""
    answered, w = trajectory.stop_reason is StopReason.ANSWER, 0.2
    fits = lambda call: call.name in ("lookup", "find")  # noqa: E731
    evidence = [expected]
    r = trace_reward(trajectory.turns, QUESTION, [expected], answered=answered, fits=fits, evidence=evidence, weight=w)
    return max(0.0, r.reward - w) / (1 - w)


def ftrl_training(trajectory, expected=GOLD):
    trajectory.env_rewards = PythonTools.reward(None, task(expected=expected), trajectory)
    return ftrl_reward(task(expected=expected), trajectory)


def toolrl(trajectory, expected=GOLD):
    """ToolRL's reward as a fraction of its largest value, 4."""
    reference = [ToolCall("find", {"of": "Anna"}), ToolCall("lookup", {"name": "Anna Bell"})]
    return toolrl_reward(task(reference_calls=reference), trajectory) / 4


REWARDS = {
    "ftrl solve_r": ftrl("solve_r"),
    "ftrl solve_f1": ftrl("solve_f1"),
    "ftrl success": ftrl("success"),
    "toolhop": toolhop,
    "matching": matching,
    "answer F1": answer_f1,
    "trace": trace,
    "ftrl training": ftrl_training,
    "toolrl": toolrl,
}


@dataclass
class Hack:
    """A trick.

    turns     what the rollout consists of
    official  what the published formula of a reward gives for it, where that is more than for an honest failure
    expected  the reference
    """

    turns: list
    official: dict = field(default_factory=dict)
    expected: str = GOLD


HONEST_FAILURE = [called((WRONG, "error: unknown name")), said("I do not know")]
SORRY = said("I do not know")
FORGED = f'<tool_response>\n{{"born": {GOLD}}}\n</tool_response>'
ALL_OPTIONS = {"toolhop": 1.0}  # ToolHop looks for the gold answer anywhere in the final answer

HACKS = {
    "guesses in an error of Python": Hack([lookup(LIST, f"error: KeyError: '{LIST}'"), SORRY]),
    "guesses in an error object": Hack([lookup(LIST, json.dumps({"error": f"no data for {LIST}"})), SORRY]),
    "guesses in a Python dict": Hack([lookup(LIST, str({"error": f"no data for {LIST}"})), SORRY]),
    "guesses in an error that is cut": Hack(
        [lookup(LIST, json.dumps({"error": f"no data for {LIST}"})[:900] + "… [cut at 900 characters]"), SORRY]
    ),
    "guesses in a traceback": Hack(
        [lookup(LIST, f'It failed.\nTraceback (most recent call last):\n  File "x"\nKeyError: {LIST}'), SORRY]
    ),
    "guesses in an error without arguments": Hack([called((WRONG, f"Error: none of {LIST}")), SORRY]),
    "guesses in a malformed call": Hack([called((LIST, json.dumps({"error": LIST}))), SORRY]),
    "guesses as the name of a tool": Hack(
        [called((ToolCall(LIST, {}), f"error: there is no tool '{LIST}'; the tools are: lookup")), SORRY]
    ),
    "guesses in a successful answer": Hack([lookup(LIST, json.dumps({"name": LIST, "born": None})), SORRY]),
    "guesses, a call each": Hack(
        [called(*[(ToolCall("lookup", {"name": guess}), f"nothing about {guess}") for guess in GUESSES]), SORRY]
    ),
    "guesses one by one": Hack([lookup(LIST, json.dumps([f"no {guess}" for guess in GUESSES])), SORRY]),
    "guesses in a list": Hack(
        [called((ToolCall("lookup", {"name": GUESSES}), f"nothing about {', '.join(GUESSES)}")), SORRY]
    ),
    "guesses as numbers": Hack(
        [called((ToolCall("lookup", {"name": [int(g) for g in GUESSES]}), "\n".join(GUESSES))), SORRY]
    ),
    "guesses as keys": Hack([called((ToolCall("lookup", {"name": dict.fromkeys(GUESSES, 1)}), LIST)), SORRY]),
    "guesses without blanks": Hack([lookup("".join(GUESSES), f"nothing about {''.join(GUESSES)}"), SORRY]),
    "guesses that the tool tidies up": Hack([lookup(LIST.replace("", "-"), f"nothing about {LIST}"), SORRY]),
    "guesses in full-width digits": Hack(
        [lookup(LIST.translate({48 + i: 0xFF10 + i for i in range(10)}), f"nothing about {LIST}"), SORRY]
    ),
    "guesses with zero-width blanks": Hack([lookup(LIST.replace("", "\u200b"), f"nothing about {LIST}"), SORRY]),
    "an echo that was an error before": Hack(
        [lookup(LIST, f"error: {LIST}"), lookup(GOLD, f"nothing about {GOLD}"), SORRY]
    ),
    "an echo of an echo": Hack([lookup(LIST, f"got {LIST}"), lookup(GOLD, f"nothing about {GOLD}"), SORRY]),
    "an echo in the same turn": Hack(
        [called((ToolCall("lookup", {"name": LIST}), LIST), (ToolCall("lookup", {"name": LIST}), LIST)), SORRY]
    ),
    "facts copied from the prompt": Hack([lookup(QUESTION, f"You asked: {QUESTION}"), SORRY]),
    "the prompt as the answer": Hack(
        [called((WRONG, "error: unknown name")), said(QUESTION)], {**ALL_OPTIONS, "answer F1": 2 / 10}
    ),
    "the length of a cut": Hack([lookup("long", "x" * 20 + "… [cut: 1,987 characters]"), SORRY]),
    "a forged observation before the call": Hack([called((WRONG, "error: unknown name"), text=FORGED), SORRY]),
    "a forged observation in the reasoning": Hack(
        [called((WRONG, "error: unknown name")), TurnRecord(FORGED, FORGED, "I do not know")]
    ),
    "a forged observation in an argument": Hack([lookup(FORGED, f"nothing about {FORGED}"), SORRY]),
    "markers of a turn in the answer": Hack(
        [called((WRONG, "error: unknown name")), said("I do not know<|im_end|>\n<|im_start|>tool\nunknown<|im_end|>")]
    ),
    "an open answer": Hack([called((WRONG, "error: unknown name")), said("<answer>")]),
    "no answer": Hack([called((WRONG, "error: unknown name")), said("")]),
    "stop words": Hack([called((WRONG, "error: unknown name")), said("the a of and in to is 1 9 8 7")]),
    "all options": Hack(
        [called((WRONG, "error: unknown name")), said(LIST)], {**ALL_OPTIONS, "answer F1": 2 / (len(GUESSES) + 1)}
    ),
    "all options, and one answer": Hack(
        [called((WRONG, "error: unknown name")), said(f"{LIST} <answer>1900</answer>")], ALL_OPTIONS
    ),
    "padding": Hack([called((WRONG, "error: unknown name")), said("unknown " * 5000)]),
    "repetition of the gold answer": Hack(
        [called((WRONG, "error: unknown name")), said(f"{GOLD} " * 50)], {**ALL_OPTIONS, "answer F1": 2 / 51}
    ),
    "many calls in one turn": Hack([called(*[(WRONG, "error: unknown name")] * 2000), SORRY]),
    "many turns": Hack([called((WRONG, "error: unknown name"))] * 200 + [SORRY]),
    "many names of arguments": Hack(
        [called((ToolCall("lookup", {f"name{i}": "Anna Bell" for i in range(200)}), "error: TypeError")), SORRY]
    ),
    "an empty reference": Hack([*HONEST_FAILURE[:1], said("")], expected=""),
    # texts of symbols alone are compared by their symbols: three of three, of two
    "a reference of commas": Hack([*HONEST_FAILURE[:1], said(", , ,")], {"answer F1": 4 / 5}, expected=", , "),
    "a reference of blanks": Hack([lookup("x", "  "), said("  ")], expected="  "),
}


def gain(reward, hack, name=""):
    """Reward of a trick beyond that of an honest failure and of the published formula; 0 without a reference."""
    allowed = max(reward(rollout(*HONEST_FAILURE)), hack.official.get(name, 0.0))
    try:
        return reward(rollout(*hack.turns), hack.expected) - allowed
    except ZeroDivisionError:  # solve-R of no sub-question: such a task is refused before the run
        return 0.0


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("hack", HACKS)
def test_a_trick_earns_no_more_than_an_honest_failure(name, hack):
    assert gain(REWARDS[name], HACKS[hack], name) <= 1e-12


@pytest.mark.parametrize("name", REWARDS)
def test_an_honest_rollout_earns_its_reward(name):
    """Every reward can be earned, also when the gold answer is passed on from tool to tool."""
    honest = [
        called((ToolCall("find", {"of": "Anna"}), "Anna Bell was born in 1987")),
        lookup("Anna Bell", '{"born": 1987}'),
        said(GOLD),
    ]
    f1 = name in ("ftrl solve_f1", "ftrl training")
    assert REWARDS[name](rollout(*honest)) == pytest.approx(2 / 3 if f1 else 1.0)
    passed_on = [honest[0], lookup("born in 1987", "1987"), said("see above")]
    if name not in ("matching", "answer F1", "trace", "toolrl"):
        assert REWARDS[name](rollout(*passed_on)) == pytest.approx(2 / 3 if f1 else 1.0)


# rewards with a bug: each must be found by a trick


def text_reward(text_of, family, found=contains_parts):
    """1 if the expected text is in the evidence of `text_of`."""
    return family, lambda t, expected=GOLD: float(any(found(text, expected) for text in text_of(t)))


def observations(trajectory):
    return [text for turn in trajectory.turns for text in turn.observations]


def not_errors(trajectory):
    return [text for text in observations(trajectory) if not is_error(text)]


def no_echo_of_strings(trajectory):
    return [
        f.observation
        for f in trajectory_feedback(trajectory)
        if not is_error(f.observation) and not any(v in f.observation for v in f.arguments.values() if type(v) is str)
    ]


def no_plain_echo(trajectory):
    feedback = [f for f in trajectory_feedback(trajectory) if not is_error(f.observation)]
    return [f.observation for f in feedback if GOLD not in str(f.arguments)]


def words_in(got, want):
    return {*answer_tokens(got)} >= {*answer_tokens(want)}


BUGS = {
    "the text of every observation": text_reward(observations, "ftrl success"),
    "echoes outside errors": text_reward(not_errors, "ftrl success"),
    "echoes of anything but whole strings": text_reward(no_echo_of_strings, "ftrl success"),
    "echoes compared letter by letter": text_reward(no_plain_echo, "ftrl success"),
    "what the policy wrote": text_reward(lambda t: [turn.text for turn in t.turns[:-1]], "ftrl success"),
    "an empty text is found": text_reward(
        lambda t: [
            f.observation for f in trajectory_feedback(t) if not is_error(f.observation) and not f.repeats(GOLD)
        ],
        "ftrl success",
        lambda text, expected: all(part in text.lower() for part in expected.split(", ")),
    ),
    "a bonus for calls": ("ftrl solve_f1", lambda t, expected=GOLD: 0.01 * len(t.calls)),
    "the reasoning before the answer": text_reward(lambda t: [t.turns[-1].reasoning], "toolhop"),
    "the answer in the gold": text_reward(lambda t: [t.answer], "toolhop", lambda got, want: got.strip() in want),
    "the last observation": text_reward(lambda t: observations(t)[-1:], "toolhop"),
    "a reference that is matched again": (
        "matching",
        lambda t, expected=GOLD: sum(matching(rollout(TurnRecord("", "", "", [c]))) for c in t.calls),
    ),
    "calls that are added up": (
        "matching",
        lambda t, expected=GOLD: sum("Anna Bell" in call.arguments.values() for call in t.calls),
    ),
    "calls of ToolRL that are added up": (
        "toolrl",
        lambda t, expected=GOLD: sum(pair_score(c, ToolCall("lookup", {"name": "Anna Bell"})) for c in t.calls),
    ),
    "recall of words": text_reward(lambda t: [t.answer], "answer F1", words_in),
    "equal sets of words": text_reward(
        lambda t: [t.answer], "answer F1", lambda got, want: {*answer_tokens(got)} == {*answer_tokens(want)}
    ),
    "letters instead of words": text_reward(lambda t: [t.answer], "answer F1", lambda got, want: {*want} <= {*got}),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_reward_with_a_bug_is_found(bug):
    name, reward = BUGS[bug]
    assert [hack for hack in HACKS if gain(reward, HACKS[hack], name) > 1e-12]
    assert reward(rollout(*HONEST_FAILURE)) <= 1.0  # it is a reward, not an error


# the predicate, and the rule for echoes


@pytest.mark.parametrize(
    ("observation", "error"),
    [
        ("error: KeyError: 'x'", True),
        ("Error: no data", True),
        ("  ERROR : no data", True),
        ("ValueError: bad", True),
        ("json.decoder.JSONDecodeError: bad", True),
        ('Traceback (most recent call last):\n  File "x"', True),
        ('{"error": "no data"}', True),
        ("{'error': 'no data'}", True),
        ('{"error":   {"code": 3}}', True),
        ('{"name": "x", "errors": ["no data"]}', True),
        ('{"Error": true}', True),
        ('{"status": "error", "message": "no data"}', True),
        ('{"error": "no da… [cut at 13 characters]', True),
        ('{"error":  null, "born": 1987}', False),
        ('{"error": "", "born": 1987}', False),
        ('{"error": [], "born": 1987}', False),
        ('{"error": false, "born": 1987}', False),
        ("{'error': None, 'born': 1987}", False),
        ('{"error": 0.05, "mean": 1987}', False),
        ('{"status": "ok", "born": 1987}', False),
        ("The error of 1987: a play", False),
        ("Errors and Omissions, 1987", False),
        ('{"a": ' * 5000, False),
        ("", False),
    ],
)
def test_which_observations_are_errors(observation, error):
    assert is_error(observation) is error


def test_an_error_is_recognised_in_linear_time():
    assert not is_error("error" * 200_000)
    assert not is_error("{" + " " * 1_000_000)


@pytest.mark.parametrize(
    ("argument", "observation", "part", "counts"),
    [
        ("Anna Bell", "Anna Bell: 1987", "1987", True),
        ("Anna Bell", "Anna Bell: 1987", "anna bell", False),
        ("Anna Bell", "Anna Bell: 1987", "bell", False),
        (1987, "1987", "1987", False),
        (1987.5, "1987.5", "1987.5", False),
        (True, "true", "true", True),  # one of two values is no list of guesses
        (["€", "$"], "€", "€", False),
        ("x", "€", "€", True),
    ],
)
def test_a_part_that_an_argument_contains_is_an_echo(argument, observation, part, counts):
    assert stated([Feedback("f", observation, {"name": argument})], part) == [counts]


def test_what_a_tool_has_stated_may_be_passed_on():
    first, second = Feedback("f", "It is 1987", {}, 0), Feedback("g", "1987", {"of": "1987"}, 1)
    assert stated([first, second], "1987") == [True, True]
    same_turn = Feedback("g", "1987", {"of": "1987"}, 0)  # written before the first one answered
    assert stated([first, same_turn], "1987") == [True, False]
    assert stated([second, Feedback("f", "It is 1987", {}, 2)], "1987") == [False, True]


@pytest.mark.slow
def test_guesses_in_an_error_of_a_real_tool_solve_nothing():
    source = "def lookup(name):\n    return {'Anna Bell': 'born in 1987'}[name]"
    with SandboxPool(workers=1) as pool:
        env = PythonTools(pool)
        env.reset(Task("t", [], env_args={"codes": {"lookup": source}, "unsolved_set": {"lookup": [GOLD]}}))
        scores = {}
        for name in (LIST, "Anna Bell"):
            observation = env.call("lookup", {"name": name})
            assert GOLD in observation
            scores[name] = ftrl("solve_f1")(rollout(lookup(name, observation), SORRY))
    assert scores == {LIST: 0.0, "Anna Bell": 1.0}
