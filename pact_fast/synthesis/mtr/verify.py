"""Whether a trace is kept: grammar, calls, observations, answer, turns, grounded arguments, evidence, repeatability."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pact_fast.data.types import ExpertTrace, Task, ToolCall, TurnRecord, text_of
from pact_fast.envs.simulated.actor import ToolActor, error_kind
from pact_fast.envs.simulated.env import gold_answers
from pact_fast.envs.simulated.schemas import schema_error
from pact_fast.envs.simulated.world import ToolWorld
from pact_fast.rewards.answers import CLOSE, OPEN, extract_answer
from pact_fast.rewards.trace import OBSERVATION_MARKUP, has_evidence, is_right, novel_calls

MAX_TURNS = 8
REASONS = {
    "no_plan": "the row has neither decomposition nor triples",
    "no_tool": "no accepted tool can answer a step",
    "no_comparison": "what was observed does not decide the comparison",
    "tool_error": "a tool failed",
    "no_answer": "it does not end with one answer",
    "malformed_call": "a call could not be read, or a limit cut the trace",
    "imitated_observation": "text that the agent wrote imitates an observation",
    "invalid_call": "a call names no tool of the task, or does not fit its input schema",
    "invalid_observation": "an observation does not fit its output schema, and is not a typed error",
    "not_repeatable": "the same calls give other observations",
    "wrong_answer": "the answer is none of the gold answers (exact match)",
    "too_many_turns": "more assistant turns than allowed",
    "ungrounded_argument": "an argument occurs neither in the question nor in an earlier observation, or a call is repeated",
    "no_evidence": "the observations do not support the answer",
}


def rejection_reasons(task: Task, trace: ExpertTrace, actor: ToolActor, max_turns: int = MAX_TURNS) -> list[str]:
    """The reasons why a trace is not kept, keys of REASONS in their order; empty: it is kept.

    Args:
        task: The question with its tools.
        trace: The trace.
        actor: Plays the tools while the trace is executed.
        max_turns: Most assistant turns of a trace.
    """
    found = set(_reasons(task, trace, actor, max_turns))
    return [reason for reason in REASONS if reason in found]


def _reasons(task: Task, trace: ExpertTrace, actor: ToolActor, max_turns: int) -> Iterator[str]:
    question, answer = text_of(task.prompt[-1].get("content")), trace.answer or ""
    turns = turn_records(trace)
    if not answer.strip() or answer.count(OPEN) > 1 or answer.count(CLOSE) > 1:
        yield "no_answer"
    if any(OBSERVATION_MARKUP.search(f"{turn.reasoning}\n{turn.content}") for turn in turns):
        yield "imitated_observation"
    if len(turns) > max_turns:
        yield "too_many_turns"
    if not is_right(extract_answer(answer).strip(), gold_answers(task)):
        yield "wrong_answer"
    yield from _call_reasons(task, trace, actor)
    if not all(novel_calls(turns, question)):
        yield "ungrounded_argument"
    if not has_evidence(turns, question, extract_answer(answer), task.env_args.get("evidence", ())):
        yield "no_evidence"


def _call_reasons(task: Task, trace: ExpertTrace, actor: ToolActor) -> Iterator[str]:
    world = ToolWorld.from_task(task.tools, task.env_args)
    episode = actor.episode(task.id, world, gold_answers(task))
    for turn in trace.turns:
        for call, observation in zip(turn.calls, turn.observations, strict=True):
            tool = world.tools.get(call.name)
            if tool is None or schema_error(call.arguments, tool.parameters) is not None:
                yield "invalid_call"
                continue
            kind = error_kind(observation)
            if kind is None and not _fits(observation, tool.output):
                yield "invalid_observation"
            if kind not in (None, "timeout", "rate_limited"):
                yield "tool_error"
            if episode.call(call.name, call.arguments) != observation:
                yield "not_repeatable"


def _fits(observation: str, schema: dict) -> bool:
    try:
        return schema_error(json.loads(observation), schema) is None
    except (ValueError, RecursionError):
        return False


def turn_records(trace: ExpertTrace) -> list[TurnRecord]:
    """The turns of a trace as those of a trajectory, the final answer included."""
    records = []
    for turn in trace.turns:
        attempts: list[ToolCall | str] = list(turn.calls)
        text = f"{turn.reasoning}\n{turn.content}"
        records.append(TurnRecord(text, turn.reasoning, turn.content, attempts, list(turn.observations)))
    answer = trace.answer or ""
    return [*records, TurnRecord(f"{trace.answer_reasoning}\n{answer}", trace.answer_reasoning, answer)]
