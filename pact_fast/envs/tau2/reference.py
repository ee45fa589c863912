"""The tasks as the package ships them, their splits, and their reference ("gold") actions."""

from __future__ import annotations

import functools
from typing import Any, get_args

from pact_fast.data.types import ToolCall
from pact_fast.envs.tau2 import upstream
from pact_fast.envs.tau2.domains import Side, domain
from pact_fast.envs.tau2.episode import Episode
from pact_fast.errors import PactError
from pact_fast.text import short


@functools.cache
def tasks_by_id(name: str) -> dict[str, dict[str, Any]]:
    """{id: task} of a domain, in the order of the file. The values are shared: do not change them."""
    domain(name)
    return {str(task["id"]): task for task in upstream.read_json(name, "tasks.json")}


def task_by_id(name: str, task_id: str) -> dict[str, Any]:
    """A task of a domain. PactError if there is none with this id, or it starts in the middle of a dialogue."""
    found = tasks_by_id(name).get(task_id)
    if found is None:
        raise PactError(f"{upstream.PACKAGE} {upstream.version()} has no {name} task {short(task_id)}")
    initial = found.get("initial_state") or {}
    if initial.get("initialization_data") or initial.get("message_history"):
        raise PactError(
            f"tau2 task {short(task_id)} starts with data or messages of its own, which version {upstream.TESTED} has in no "
            "task; install that version"
        )
    return found


def split_ids(name: str, split: str) -> list[str]:
    """Ids of a split of the package: train, test, base, and for telecom small and full."""
    return [str(task_id) for task_id in upstream.read_json(name, "split_tasks.json")[split]]


def reference_actions(task: dict[str, Any]) -> list[tuple[Side, ToolCall]]:
    """(who acts, call) of the reference solution, in order."""
    actions = task["evaluation_criteria"].get("actions") or []
    assert all(action.get("requestor", "assistant") in get_args(Side) for action in actions)
    return [(action.get("requestor", "assistant"), ToolCall(action["name"], action["arguments"])) for action in actions]


@functools.cache
def reference_changes(name: str, task_id: str) -> dict[str, dict[str, str]]:
    """{table: {id: text}} of the records that the reference actions change. Actions that fail are passed over."""
    task = task_by_id(name, task_id)
    episode = Episode(domain(name), task)
    for side, call in reference_actions(task):
        try:
            episode.run_tool(side, call.name, call.arguments)
        except Exception:  # 23 reference actions of retail fail; the package logs them and goes on
            continue
    return episode.state.changes()
