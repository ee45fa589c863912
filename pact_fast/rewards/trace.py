"""The trace reward of MTR's second stage, ours (docs/mtr.md): the answer, and how well the trace supports it. No judge.

    R = (1 − w)·A + w·C          C = G · (S + E + N) / 3, in [0, 1]

A  the answer is right: exact match over the gold answers, or F1
G  grammar, 0 or 1: every turn parses, only the last one has no call, it answers once, nothing imitates an observation
S  share of the calls that fit their tool's input schema
E  evidence, 0 or 1: a tool stated the answer; for yes/no and answers from the question: every needed fact was observed
N  share of the calls that are new, and whose texts occur in the question or in an earlier observation
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pact_fast.data.types import ToolCall, TurnRecord
from pact_fast.rewards.answers import CLOSE, OPEN, extract_answer
from pact_fast.rewards.feedback import is_error
from pact_fast.rewards.qa import normalize_answer, qa_exact_match, qa_f1

# Markup of observations in chat templates: text that imitates a tool
OBSERVATION_MARKUP = re.compile(
    r"</?\s*(?:tool_response|information|observation|tool_result)s?\b|<\|(?:tool|ipython)", re.I
)
_ARITHMETIC = re.compile(r"[\d\s.,+\-*/()−×÷]+")
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
_POSSESSIVE = re.compile(r"['’][sS]\b")
YES_NO = frozenset(("yes", "no"))


@dataclass(frozen=True)
class TraceScore:
    """R and its parts; the names are those of the module's docstring."""

    reward: float
    answer: float
    consistency: float
    grammar: float
    schema: float
    evidence: float
    novelty: float

    def to_rewards(self) -> dict[str, float]:
        """The parts under the names in which they are logged."""
        parts = {name: value for name, value in vars(self).items() if name != "reward"}
        return {"trace_reward": self.reward} | {f"trace_{name}": value for name, value in parts.items()}


def trace_reward(
    turns: Sequence[TurnRecord],
    question: str,
    answers: Sequence[str],
    *,
    answered: bool,
    fits: Callable[[ToolCall], bool],
    evidence: Sequence[str] = (),
    tools: int = 1,
    weight: float = 0.2,
    metric: str = "em",
) -> TraceScore:
    """Score the turns of a trajectory.

    Args:
        turns: All assistant turns, with their observations.
        question: The user's question.
        answers: Every accepted answer.
        answered: The last turn is a final answer; no limit cut it.
        fits: Whether a call names a tool and fits its input schema.
        evidence: Texts that must be observed for a yes/no answer, or one from the question.
        tools: Number of tools that the task offers. Without any, C = G.
        weight: w.
        metric: `em` or `f1` (HotpotQA's), for A.
    """
    said = extract_answer(turns[-1].content).strip() if turns and answered else ""
    a = qa_f1(said, answers, "hotpotqa") if metric == "f1" else float(is_right(said, answers))
    g = float(_grammatical(turns, answered))
    if not tools:
        return TraceScore((1 - weight) * a + weight * g, a, g, g, 1.0, 1.0, 1.0)
    attempts = [attempt for turn in turns for attempt in turn.attempts]
    s = sum(isinstance(one, ToolCall) and fits(one) for one in attempts) / len(attempts) if attempts else 0.0
    e = float(bool(said) and has_evidence(turns, question, said, evidence))
    new = list(novel_calls(turns, question))
    n = sum(new) / len(new) if new else 0.0
    c = g * (s + e + n) / 3
    return TraceScore((1 - weight) * a + weight * c, a, c, g, s, e, n)


def is_right(said: str, answers: Sequence[str]) -> bool:
    """Exact match. An answer without a normal form, such as punctuation, must be equal as it is."""
    return qa_exact_match(said, answers) if normalize_answer(said) else bool(said) and said in answers


def _grammatical(turns: Sequence[TurnRecord], answered: bool) -> bool:
    """G: see the module's docstring. A text in <answer> tags counts as an answer, and there may be one."""
    if not answered or not turns or turns[-1].attempts or not extract_answer(turns[-1].content).strip():
        return False
    if any(turn.errors or not turn.attempts for turn in turns[:-1]):
        return False
    if any(OBSERVATION_MARKUP.search(text) for turn in turns for text in _written(turn)):
        return False
    *before, last = turns
    spans = last.content.count(OPEN), last.content.count(CLOSE)
    return spans in ((0, 0), (1, 1)) and not any(OPEN in turn.text or CLOSE in turn.text for turn in before)


def _written(turn: TurnRecord) -> Iterator[str]:
    """Yield the texts that the policy wrote in a turn, without the markup of calls.

    Some templates use the same markup for observations.
    """
    yield from (turn.reasoning, turn.content)
    yield from (text for call in turn.calls for text in texts_of(call.arguments))


def has_evidence(turns: Sequence[TurnRecord], question: str, answer: str, evidence: Sequence[str]) -> bool:
    """E: whether the observations support an answer.

    Args:
        turns: Turns of the agent, with their observations.
        question: The question.
        answer: The agent's answer.
        evidence: Texts that must have been observed where the question holds the answer, or it is yes or no.
    """
    sought = normalize_answer(answer)
    if sought in YES_NO or holds(question, answer):
        return bool(evidence) and all(_observed(turns, text) for text in evidence)
    return _observed(turns, answer)


def _observed(turns: Sequence[TurnRecord], text: str) -> bool:
    """Whether a tool stated the text, beyond repeating it from the arguments of the same turn."""
    for turn in turns:
        for attempt, observation in zip(turn.attempts, turn.observations, strict=False):
            if is_error(observation) or not holds(_json_text(observation), text):
                continue
            arguments = attempt.arguments if isinstance(attempt, ToolCall) else {}
            if not any(holds(argument, text) for argument in texts_of(arguments)):
                return True
    return False


def novel_calls(turns: Sequence[TurnRecord], question: str) -> Iterator[bool]:
    """For every attempt: whether it is a call that was not made before in a turn, and whose texts are grounded.

    A text is grounded if it occurs, as a whole, in the question or in an observation of an earlier turn; an arithmetic
    expression if all of its numbers do. A call is no repetition if the same call failed before.
    """
    seen, made = question, set[str]()
    for turn in turns:
        results = [*turn.observations, *[""] * (len(turn.attempts) - len(turn.observations))]
        for attempt, observation in zip(turn.attempts, results, strict=False):
            if not isinstance(attempt, ToolCall):
                yield False
                continue
            key = json.dumps(attempt.to_json(), sort_keys=True)
            yield key not in made and all(grounded(text, seen) for text in texts_of(attempt.arguments))
            if not is_error(observation):
                made.add(key)
        stated = [_json_text(o) for o in turn.observations if not is_error(o)]
        seen = "\n".join([seen, *stated])


def grounded(text: str, seen: str) -> bool:
    """Whether an argument occurs in the texts that the policy has seen."""
    if holds(seen, text):
        return True
    if _ARITHMETIC.fullmatch(text) and (numbers := _NUMBER.findall(text)):
        known = {one.replace(",", "") for one in _NUMBER.findall(seen)}
        return all(one.replace(",", "") in known for one in numbers)
    return not normalize_answer(text) and text.strip() in seen


def holds(text: str, part: str) -> bool:
    """Whether a text holds another one as whole words, both in normal form; the possessive of a name holds the name."""
    sought = normalize_answer(part)
    texts = (text, _POSSESSIVE.sub("", text))
    return bool(sought) and any(f" {sought} " in f" {normalize_answer(one)} " for one in texts)


def texts_of(value: Any) -> Iterator[str]:
    """Strings inside JSON data; numbers and booleans are values of enums and limits, and need no ground."""
    if isinstance(value, dict):
        for item in value.values():
            yield from texts_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)
    elif isinstance(value, str):
        yield value


def _json_text(observation: str) -> str:
    """The values of a JSON observation, one a line, so that no text runs over two of them; other text as it is."""
    try:
        value = json.loads(observation)
    except (ValueError, RecursionError):
        return observation
    return " \n · \n".join(_scalars(value)) if isinstance(value, dict | list) else observation


def _scalars(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _scalars(item)
    else:
        yield str(value)
