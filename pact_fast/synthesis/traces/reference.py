"""An actor that makes the reference calls of a row, for real, with reasoning from a template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pact_fast.chat.formats.base import ParsedTurn
from pact_fast.chat.segments import prefix_ends
from pact_fast.data.absent import is_absent
from pact_fast.data.types import Task, ToolCall, ToolSchema
from pact_fast.synthesis.traces.transcript import CannotAct, Context

CLOSING = "I have done what was asked."  # the answer of a row that names none
ANSWERING = "The results hold what was asked for."
_FIRST_SENTENCE = re.compile(r"(.{8,200}?[.!?])(?:\s|$)", re.DOTALL)


@dataclass(frozen=True)
class ReferenceTurns:
    """The turns of an episode, the answer included. `templates`: how many are to have reasoning from a template."""

    turns: tuple[ParsedTurn, ...]
    templates: int


def reference_turns(task: Task) -> ReferenceTurns | None:
    """The turns of a row's expert trace, else one turn per reference call; None if it has neither.

    An expert's reasoning is kept; where there is none, and for reference calls, a template takes its place when the turn
    is played: the environment may say which tools there are.
    """
    answer = "" if is_absent(task.answer) else str(task.answer)
    if task.expert is not None:
        turns = [ParsedTurn("", turn.reasoning, turn.content, list(turn.calls)) for turn in task.expert.turns]
        last = ParsedTurn("", task.expert.answer_reasoning, task.expert.answer or answer or CLOSING)
    elif task.reference_calls:
        turns = [ParsedTurn("", "", "", [call]) for call in task.reference_calls]
        last = ParsedTurn("", "", answer or CLOSING)
    else:
        return None
    last.reasoning = last.reasoning or ANSWERING
    return ReferenceTurns((*turns, last), sum(bool(turn.calls) and not turn.reasoning for turn in turns))


def template_reasoning(number: int, calls: Sequence[ToolCall], tools: Sequence[ToolSchema]) -> str:
    """Reasoning before calls: the purpose of their tools, in the words of the descriptions, if that previews no call.

    Args:
        number: Turns before this one.
        calls: The calls that follow.
        tools: Schemas of the task.
    """
    so_far = "Nothing is known yet." if number == 0 else "The results so far are not enough."
    described = [text for call in calls if (text := _purpose(call.name, tools))]
    for wanted in dict.fromkeys((" ".join(dict.fromkeys(described)), "")):
        text = f"{so_far} What I need next: {wanted}" if wanted else f"{so_far} I have to look further."
        if prefix_ends(text, calls)[-1] == len(text):
            return text
    return so_far


def _purpose(name: str, tools: Sequence[ToolSchema]) -> str:
    """The first sentence of a tool's description; empty if it has none."""
    for tool in tools:
        if tool["function"]["name"] == name:
            text = " ".join(str(tool["function"].get("description") or "").split())
            text = text.partition("Tool description: ")[2] or text  # BFCL's say first which API a function is of
            found = _FIRST_SENTENCE.match(text)
            return found[1] if found else f"{text[:200]}." if text else ""
    return ""


class ReferenceActor:
    """Plays the reference turns of rows; `references`: first number of a key → the turns of its row."""

    workers = 1

    def __init__(self, references: dict[int, ReferenceTurns]):
        self._references = references

    def act(self, context: Context) -> ParsedTurn:
        turns = self._references[context.key[0]].turns
        if context.turns >= len(turns):
            raise CannotAct("unfinished", "the episode continues after the last reference turn")
        turn = turns[context.turns]
        if turn.reasoning or not turn.calls:
            return turn
        return replace(turn, reasoning=template_reasoning(context.turns, turn.calls, context.tools))
