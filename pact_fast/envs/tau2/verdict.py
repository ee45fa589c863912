"""The reward of an episode, equal to that of the package's evaluator, from the records that it touched.

The evaluator builds two environments, replays the episode in one and the reference actions in the other, and hashes both
databases. Here the episode's own state is judged; the changes of the reference actions are a constant of the task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pact_fast.envs.tau2.episode import Call, Episode
from pact_fast.envs.tau2.reference import reference_changes
from pact_fast.errors import PactError

DEFAULT_BASIS = ("DB", "COMMUNICATE")  # of tasks that name none, in the package's data model
GREETING = "Hi! How can I help you today?"  # the agent's first message, which the package writes
COMPONENTS = ("DB", "ENV_ASSERTION", "ACTION", "COMMUNICATE")


@dataclass(frozen=True)
class Verdict:
    """Reward of an episode, and those components of it that the task's reward basis names, each 0 or 1."""

    reward: float
    components: dict[str, float] = field(default_factory=dict)


def judge(episode: Episode, texts: Sequence[str]) -> Verdict:
    """The verdict over a finished episode.

    Args:
        episode: An episode that neither side ended gets 0 in any state.
        texts: What the agent said, without its reasoning.

    Raises:
        PactError: The task's reward basis has a component that only a language model can decide.
    """
    components = {name: _component(name, episode, texts) for name in reward_basis(episode.task)}
    ended = episode.ending in ("agent_stop", "user_stop")
    return Verdict(float(ended and all(components.values())), components)


def reward_basis(task: dict[str, Any]) -> tuple[str, ...]:
    """Names of the components that make a task's reward.

    Raises:
        PactError: One of them is NL_ASSERTION, which a language model would have to judge.
    """
    basis = tuple(task["evaluation_criteria"].get("reward_basis") or DEFAULT_BASIS)
    unknown = [name for name in basis if name not in COMPONENTS]
    if unknown:
        raise PactError(
            f"tau2 task {task['id']}: its reward basis has {', '.join(unknown)}, which a language model would have to "
            "judge; leave the task out"
        )
    return basis


def _component(name: str, episode: Episode, texts: Sequence[str]) -> float:
    criteria = episode.task["evaluation_criteria"]
    if name == "DB":
        return float(_same_database(episode))
    if name == "ENV_ASSERTION":
        return float(all([_holds(episode, assertion) for assertion in criteria.get("env_assertions") or []]))
    if name == "ACTION":
        return float(all(any(_matches(call, gold) for call in episode.calls) for gold in criteria.get("actions") or []))
    said = [text.lower().replace(",", "") for text in (GREETING, *texts) if text.strip()]
    return float(all(any(info.lower() in text for text in said) for info in criteria.get("communicate_info") or []))


def _same_database(episode: Episode) -> bool:
    """Whether the episode changed exactly what the reference actions change.

    A record that no JSON can hold equals none. A task without reference actions and assertions accepts any state.
    """
    criteria = episode.task["evaluation_criteria"]
    if criteria.get("actions") is None and criteria.get("env_assertions") is None:
        return True
    try:
        return episode.state.changes() == reference_changes(episode.domain.name, episode.task["id"])
    except (TypeError, ValueError, RecursionError):
        return False


def _holds(episode: Episode, assertion: dict[str, Any]) -> bool:
    """Whether an assertion about the final state holds; one that fails on a damaged state does not."""
    try:
        return episode.state.run(assertion) == assertion.get("assert_value", True)
    except Exception:
        return False


def _matches(call: Call, gold: dict[str, Any]) -> bool:
    """The package compares only the arguments that the call has, and does not ask who made it."""
    names = gold.get("compare_args")
    compared = call.arguments.keys() if names is None else names
    if call.name != gold["name"]:
        return False
    return all(
        (key in call.arguments) == (key in gold["arguments"]) and call.arguments.get(key) == gold["arguments"].get(key)
        for key in compared
    )
