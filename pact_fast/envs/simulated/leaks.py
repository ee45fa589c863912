"""Whether an observation says more than the facts behind its call: a simulator must not let hop 1 reveal hop n."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from pact_fast.envs.simulated.facts import look_up, search
from pact_fast.envs.simulated.world import LOOKUP, MODEL, SEARCH, ToolSpec, ToolWorld, same_text
from pact_fast.rewards.qa import normalize_answer

TRIVIAL = frozenset(("yes", "no", "noanswer", ""))  # answers that any text may hold


def mentions(text: str, answer: str) -> bool:
    """Whether a text holds an answer as whole words, both in the normal form of QA metrics."""
    sought = normalize_answer(answer)
    return sought not in TRIVIAL and f" {sought} " in f" {normalize_answer(text)} "


def leaked(output: Any, tool: ToolSpec, arguments: dict[str, Any], world: ToolWorld, answers: Iterable[str]) -> bool:
    """Whether an output holds a gold answer that neither the facts behind the call nor its arguments hold.

    Args:
        output: What the simulator returned, JSON data.
        tool: The tool that was called.
        arguments: Those of the call.
        world: The facts that all tools know.
        answers: Gold answers, in all their spellings.
    """
    text = plain_text(output)
    found = [answer for answer in answers if mentions(text, answer)]
    if not found:
        return False
    known = "\n".join([plain_text(arguments), *facts_behind(tool, arguments, world)])
    return any(not mentions(known, answer) for answer in found)


def facts_behind(tool: ToolSpec, arguments: dict[str, Any], world: ToolWorld) -> list[str]:
    """Return the row's facts behind a call: the values that a look-up asks for, or the passages that a search finds.

    For a tool written by a model: the facts about the entities in the arguments, and the passages that a search for the
    arguments finds.
    """
    if tool.kind == LOOKUP:
        return look_up(world, tool.relation, arguments)
    if tool.kind == SEARCH:
        return _found(world, str(arguments.get("query", "")))
    if tool.kind == MODEL:
        named = [value for value in arguments.values() if isinstance(value, str)]
        return [*_facts_about(world, named), *(_found(world, " ".join(named)) if named else [])]
    return []


def _found(world: ToolWorld, query: str) -> list[str]:
    return [f"{p.title}. {p.text}" for p in search(world.passages, query)]


def _facts_about(world: ToolWorld, named: list[str]) -> list[str]:
    """The facts whose arguments are all among some texts, a line each: "director, Free Guy: Shawn Levy"."""
    about = [
        fact
        for fact in world.facts
        if fact.arguments and all(any(same_text(value, text) for text in named) for value in fact.arguments.values())
    ]
    return [f"{', '.join([fact.relation, *fact.arguments.values()])}: {', '.join(fact.values)}" for fact in about]


def plain_text(value: Any) -> str:
    """The strings, numbers and keys of JSON data, one a line."""
    if isinstance(value, dict):
        return "\n".join(f"{key}\n{plain_text(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "\n".join(map(plain_text, value))
    return value if isinstance(value, str) else json.dumps(value)
