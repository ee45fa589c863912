"""Ids of calls and results, for chat templates that render no conversation without them."""

from __future__ import annotations

from collections.abc import Sequence

from pact_fast.data.types import Message


def with_call_ids(messages: Sequence[Message], named: bool = False) -> list[Message]:
    """The messages, with an id for every call and its result.

    Call n of an assistant turn is "call" and five digits, which also fits Mistral's templates (nine letters or digits).
    Numbering restarts in every turn, so that a template's text after a turn does not depend on the turns before it.
    Results are paired by the ids that they have already, else by position. `named`: ids that hold the tool's name, as
    Kimi K2's templates write them in place of it.
    """
    done: list[Message] = []
    ids: dict[str, str] = {}  # of the last turn with calls: id that it had -> id given
    made: list[str] = []  # ids of the last turn with calls
    position = 0  # of the next result after that turn
    for message in messages:
        if message.get("tool_calls"):
            made = [
                named_call_id(str(call.get("function", call).get("name")), n) if named else call_id(n)
                for n, call in enumerate(message["tool_calls"])
            ]
            calls = [{**call, "id": one} for call, one in zip(message["tool_calls"], made, strict=True)]
            had = [call.get("id") for call in message["tool_calls"]]
            paired = None not in had and len(set(had)) == len(had)
            ids = {str(old): new["id"] for old, new in zip(had, calls, strict=True)} if paired else {}
            position = 0
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool":
            by_position = made[position] if position < len(made) else call_id(position)
            found = ids.get(str(message.get("tool_call_id")), by_position)
            position += 1
            message = {**message, "tool_call_id": found}
        done.append(message)
    return done


def call_id(position: int) -> str:
    """The id of the call at this position of a turn."""
    return f"call{position:05d}"


def named_call_id(name: str, position: int) -> str:
    """The id of a call that holds the tool's name."""
    return f"functions.{name}:{position}"
