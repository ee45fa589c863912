"""Whether a trace is kept: its calls are valid, its execution is a success that repeats, and it leaks nothing."""

from __future__ import annotations

from collections.abc import Iterator

from pact_fast.chat.segments import prefix_ends
from pact_fast.data.absent import is_absent
from pact_fast.data.types import ExpertTrace, Task, ToolCall, Trajectory, text_of
from pact_fast.envs.simulated.leaks import mentions, plain_text
from pact_fast.rewards.answers import extract_answer, token_f1
from pact_fast.rewards.feedback import is_error, stated, trajectory_feedback
from pact_fast.rewards.ftrl import expected_parts
from pact_fast.rewards.trace import OBSERVATION_MARKUP
from pact_fast.synthesis.traces.reference import CLOSING

REASONS = {
    "unreadable": "the row cannot be read",
    "bad_row": "the row does not meet the requirements of its environment",
    "no_reference": "the row has neither reference calls nor an expert trace to make",
    "invalid_answer": "the teacher's answers could not be used",
    "limit": "a limit of turns or time ended the episode",
    "unfinished": "the episode continues after the last reference turn",
    "malformed_call": "a call could not be read, or does not fit its tool",
    "no_turns": "nothing was done before the answer, so there is nothing to learn from",
    "tool_error": "a reference call failed, and the environment has no verdict",
    "unsolved": "the environment's success, or the answer, is not 1",
    "no_verdict": "neither the environment nor an answer of the row can verify the teacher's episode",
    "no_evidence": "the answer was copied from the row, and no tool stated it",
    "answer_leak": "the answer is written before any tool stated it",
    "imitated_observation": "text that the agent wrote imitates an observation",
    "no_reasoning": "in no turn does any reasoning come before a preview of the call",
    "not_repeatable": "the same turns, played again, give other observations or no success",
}


def trace_of(trajectory: Trajectory) -> ExpertTrace | None:
    """Return the trace of an episode; None if it was cut, or a call was malformed."""
    if trajectory.stop_reason.is_truncated or any(turn.errors for turn in trajectory.turns):
        return None
    try:
        return ExpertTrace.from_messages(trajectory.to_messages())
    except ValueError:  # the user had the last word
        return None


def success_of(task: Task, trajectory: Trajectory) -> float | None:
    """The environment's success, else the token F1 of the answer; None if the row has neither."""
    if "success" in trajectory.env_rewards:
        return trajectory.env_rewards["success"]
    if not is_absent(task.answer):
        return token_f1(extract_answer(trajectory.answer), str(task.answer))
    return None


def rejection_reasons(task: Task, trajectory: Trajectory, *, copied: bool) -> list[str]:
    """Return the reasons against keeping an episode, keys of REASONS in their order; empty: it is kept.

    Args:
        task: The row.
        trajectory: What was done, with the environment's rewards.
        copied: The calls and the answer are the row's own, so that the answer itself proves nothing.
    """
    found = set(_reasons(task, trajectory, copied))
    return [reason for reason in REASONS if reason in found]


def _reasons(task: Task, trajectory: Trajectory, copied: bool) -> Iterator[str]:
    turns = trajectory.turns
    if any(turn.errors for turn in turns):
        yield "malformed_call"
    if trajectory.stop_reason.is_truncated:
        yield "limit"
        return
    if len(turns) < 2:
        yield "no_turns"
    success = success_of(task, trajectory)
    if success is not None and success < 1:
        yield "unsolved"
    failed = any(is_error(text) for turn in turns for text in turn.observations)
    if copied and failed and "success" not in trajectory.env_rewards:
        yield "tool_error"
    if success is None and not copied:
        yield "no_verdict"
    if copied and not is_absent(task.answer) and trajectory.answer != CLOSING and not _evidence(task, trajectory):
        yield "no_evidence"
    if any(OBSERVATION_MARKUP.search(f"{turn.reasoning}\n{turn.content}") for turn in turns):
        yield "imitated_observation"
    if _leaks(task, trajectory):
        yield "answer_leak"
    trace = trace_of(trajectory)
    if trace is not None and not any(prefix_ends(turn.reasoning, turn.calls)[-1] for turn in trace.turns):
        yield "no_reasoning"


def _evidence(task: Task, trajectory: Trajectory) -> bool:
    """Whether the tools stated every part of the row's answer, or the user did; a part of the question needs no tool."""
    said = "\n".join([_question(task), *(turn.user or "" for turn in trajectory.turns)]).lower().replace(",", "")
    feedback = trajectory_feedback(trajectory)
    parts = expected_parts(str(task.answer))
    return all(any(stated(feedback, part)) or part in said for part in parts)


def _leaks(task: Task, trajectory: Trajectory) -> bool:
    """Whether reasoning, text or arguments hold the row's answer before an observation or the user does.

    The last turn is the answer itself, and no part of h*. Answers that the question holds cannot leak.
    """
    if is_absent(task.answer):
        return False
    answer = str(task.answer)
    known = _question(task)
    for turn in trajectory.turns[:-1]:
        if mentions(known, answer):
            return False
        written = [turn.reasoning, turn.content, *(plain_text(call.arguments) for call in turn.calls)]
        if mentions("\n".join(written), answer):
            return True
        known = "\n".join([known, *turn.observations, turn.user or ""])
    return False


def _question(task: Task) -> str:
    return "\n".join(text_of(message.get("content")) for message in task.prompt)


def same_episode(first: Trajectory, second: Trajectory) -> bool:
    """Whether two episodes had the same calls, observations, replies and rewards."""

    def seen(trajectory: Trajectory) -> list[tuple[list[ToolCall | str], list[str], str | None]]:
        return [(turn.attempts, turn.observations, turn.user) for turn in trajectory.turns]

    return seen(first) == seen(second) and first.env_rewards == second.env_rewards
