"""Prompts and later messages to the policy, with the wording of the official runner."""

from __future__ import annotations

import json
from typing import Any

from pact_fast.data.types import Message
from pact_fast.envs.bfcl.calls import PythonCall
from pact_fast.envs.bfcl.entries import INSTALL, Entry, Function
from pact_fast.envs.bfcl.schemas import HINT, tool_schema
from pact_fast.errors import PactError

RECORDED = "ok"  # the result of a single-turn call, which nothing executes


def first_messages(entry: Entry, format: str) -> list[Message]:
    """The prompt. In the format `python`, functions stand in the official system prompt instead of the tools."""
    messages = [dict(message) for message in entry.question[0]]
    if format == "json":
        return messages
    system = system_prompt(entry.functions)
    if messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{system}\n\n{messages[0]['content']}"}, *messages[1:]]
    return [{"role": "system", "content": system}, *messages]


def user_message(entry: Entry, turn: int, format: str) -> str:
    """The user's message of a later turn; where functions are added, their documents and the official sentence.

    The prompt stands once it is sampled from, so late functions are shown in the message, in either format. The official
    runner does so for prompted models; for others it renders the prompt again.
    """
    late = entry.late.get(turn)
    if late is None:
        return "\n".join(message["content"] for message in entry.question[turn])
    shown: list[Any] = [tool_schema(function)["function"] for function in late] if format == "json" else late
    return official().DEFAULT_USER_PROMPT_FOR_ADDITIONAL_FUNCTION_PROMPTING.format(functions=shown)


def results_message(calls: list[PythonCall], results: list[str]) -> str:
    """The results of a step in the format `python`: one user message, as in the official runner."""
    return repr(
        [{"role": "tool", "name": str(call), "content": text} for call, text in zip(calls, results, strict=True)]
    )


def system_prompt(functions: list[Function]) -> str:
    """The official default system prompt: how to write calls, and the function documents as JSON."""
    texts = official()
    style = texts.PROMPT_STYLE_TEMPLATES["classic"]
    hinted = [{**function, "description": function["description"] + HINT} for function in functions]
    return texts.PROMPT_TEMPLATE_MAPPING["plaintext"].format(
        persona=style["persona"],
        task=style["task"],
        tool_call_format=style["tool_call_no_tag"].format(
            output_format=texts.OUTPUT_FORMAT_MAPPING["python"], param_types=texts.PARAM_TYPE_MAPPING["python"]
        ),
        multiturn_behavior=style["multiturn_behavior"],
        available_tools=style["available_tools"].format(format="json", functions=json.dumps(hinted, indent=4)),
    )


def official() -> Any:
    """The module of the official texts, which imports nothing. PactError if the package is missing."""
    try:
        from bfcl_eval.constants import default_prompts
    except ModuleNotFoundError:
        raise PactError(f"BFCL needs the package bfcl-eval, which carries its prompts: {INSTALL}") from None
    return default_prompts
