"""The backend `model`: a language model writes the output of a tool, only from the facts behind the call.

The actor has checked the arguments before, looks the call up in its store, and checks what the model writes; it asks
again with the error, twice at most. So this file has only to ask. The model sees neither the question nor the answers:
`ToolRequest` holds neither, and of the row's facts only those behind the call are shown, so that the first look-up of a
question cannot reveal what its last one finds.
"""

from __future__ import annotations

import functools
import hashlib
import json
from importlib.resources import files
from typing import Any

from pact_fast.envs.simulated.backend import ToolRequest
from pact_fast.envs.simulated.leaks import facts_behind
from pact_fast.llm import InvalidAnswer, LLMClient, LLMConfig
from pact_fast.llm.request import Request

PROMPT = "tool_actor.v1.txt"
MAX_HISTORY = 20  # earlier calls of a stateful tool that are shown
ROLE = "tool_actor"


class ModelBackend:
    """Asks a language model.

    Args:
        client: Its role names this backend in reports.
    """

    deterministic = False
    blocking = True

    def __init__(self, client: LLMClient):
        self._client = client
        # observations of another model, prompt or sampling are others
        sampling = client.config.model_dump_json(include={"temperature", "top_p", "max_tokens", "seed", "extra_body"})
        digest = hashlib.sha256(f"{prompt_text()}\n{sampling}".encode()).hexdigest()[:12]
        self.version = f"model-1/{client.config.model}/{digest}"

    @classmethod
    def from_args(cls, args: dict[str, Any]) -> ModelBackend:
        """`env.args.backend_args`: settings of the client (docs/llm.md). PactError for a wrong one."""
        return cls(LLMClient(LLMConfig.read(args, "env.args.backend_args"), ROLE))

    def respond(self, request: ToolRequest) -> Any:
        """Return the model's output. The actor validates it, so an invalid answer is returned as plain text.

        Raises:
            LLMError: The server fails, the budget is used up, or replay misses: the run ends, and nothing is stored.
        """
        try:
            return self._client.ask(Request(messages(request), schema=request.tool.output)).value
        except InvalidAnswer as error:
            return error.text


def messages(request: ToolRequest) -> list[dict[str, Any]]:
    """The conversation that asks for the output of a call."""
    tool = request.tool
    known = facts_behind(tool, request.arguments, request.world)
    parts: dict[str, Any] = {
        "tool": {"name": tool.name, "description": tool.description, "parameters": tool.parameters},
        "output schema": tool.output,
        "call": request.arguments,
        "known": known,
    }
    if request.history:
        past = request.history[-MAX_HISTORY:]
        parts["earlier calls"] = [[call.tool, call.arguments, call.observation] for call in past]
    # the outputs themselves are not shown again: they may hold markup, or an answer that the model has guessed
    parts |= {f"problem of answer {i + 1}": problem for i, (_, problem) in enumerate(request.rejected)}
    asked = "\n".join(f"{name}: {json.dumps(part, ensure_ascii=False)}" for name, part in parts.items())
    return [{"role": "system", "content": prompt_text()}, {"role": "user", "content": asked}]


@functools.cache
def prompt_text() -> str:
    """The instructions, a versioned file of the package."""
    return files("pact_fast.envs.simulated").joinpath(PROMPT).read_text(encoding="utf-8").strip()
