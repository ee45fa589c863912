"""ToolBackend, the protocol of backends that answer calls of simulated tools, and its request.

A backend sees one call at a time: the tool with its output schema, the arguments (which fit the input schema already),
the facts of the row, the earlier calls if the tool is stateful, and what was wrong with its earlier outputs for this call.
It is never told the gold answer, nor a reference trajectory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from pact_fast.envs.simulated.world import ToolSpec, ToolWorld

ERROR_KINDS = (
    "unknown_tool",  # the task has no such tool
    "invalid_arguments",  # the arguments do not fit the input schema
    "not_found",  # the row states nothing about it
    "invalid_output",  # the backend gave no valid output, repairs included
    "unavailable",  # the backend failed
    "not_recorded",  # replay: the call is not in the store
    "timeout",  # injected
    "rate_limited",  # injected
)


class ToolFailure(Exception):
    """A call that a backend answers with a typed error. `kind`: one of ERROR_KINDS; the message repeats no argument."""

    def __init__(self, kind: str, message: str):
        assert kind in ERROR_KINDS, kind
        self.kind, self.message = kind, message
        super().__init__(message)


@dataclass(frozen=True)
class PastCall:
    """An earlier call of the episode."""

    tool: str
    arguments: dict[str, Any]
    observation: str


@dataclass(frozen=True)
class ToolRequest:
    """One call for a backend.

    task_id    id of the task
    tool       name, description, input and output schema
    arguments  JSON data that fits `tool.parameters`
    world      facts and passages of the row; without answers
    history    earlier calls of the episode; empty unless the tool is stateful
    rejected   (output as text, problem) of earlier outputs for this call, oldest first
    """

    task_id: str
    tool: ToolSpec
    arguments: dict[str, Any]
    world: ToolWorld
    history: tuple[PastCall, ...] = ()
    rejected: tuple[tuple[str, str], ...] = ()


@runtime_checkable
class ToolBackend(Protocol):
    """Answers calls. One instance serves all episodes of a process, from several threads if it is `blocking`.

    version        name and version; part of the key under which observations are stored
    deterministic  equal requests give equal outputs, on every machine. If not, a store on disk is required
    blocking       whether `respond` may take long
    """

    version: str
    deterministic: bool
    blocking: bool

    def respond(self, request: ToolRequest) -> Any:
        """The output of a call: JSON data, or its text, which must fit `request.tool.output`.

        Raises:
            ToolFailure: The call fails; the policy sees a typed error.
            PactError: The backend cannot be used at all; the run ends.
        """
