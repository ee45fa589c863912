"""A policy or a model plays the user: its prompt, and the task from its side, on which a policy is trained.

The environment says who the user is, by optional methods:

    user_prompt() -> str                            its system prompt; valid after `reset`
    user_tools -> list of schemas                   tools of its own, if it has any
    call_as_user(name, arguments) -> str            runs one of them, in the way of `call`
    user_stops -> list of words                     by which it ends the dialogue, beside rollout.user_stop
    judge_user(task, trajectory) -> {name: value}   flaws of the user's side, for the metrics
    user_messages(task) -> list of messages         the user's side of the task's expert dialogue, after the question
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from pact_fast.chat.rendering import ChatRenderer
from pact_fast.data.types import ExpertTrace, Message, Task, ToolSchema, split_reasoning, text_of
from pact_fast.envs.base import Environment
from pact_fast.errors import PactError
from pact_fast.users.model import GREETING


def user_tools(env: Environment) -> list[ToolSchema]:
    """Schemas of the tools that only the user has."""
    return list(getattr(env, "user_tools", ()))


def user_stops(env: Environment) -> tuple[str, ...]:
    """Words by which the user ends the dialogue, beside rollout.user_stop."""
    return tuple(getattr(env, "user_stops", ()))


def user_call(env: Environment) -> Callable[[str, dict[str, Any]], str]:
    """Runs a tool of the user's."""
    call: Callable[[str, dict[str, Any]], str] = env.call_as_user  # type: ignore[attr-defined]
    return call


def user_view(task: Task, env: Environment) -> Task:
    """The task from the user's side: the roles of its dialogue are exchanged.

    What the environment tells the agent alone (system prompt, tools, expert trace, reference calls, answer) is left out.
    Raises PactError if the environment does not say who the user is.
    """
    if not callable(getattr(env, "user_prompt", None)):
        raise PactError(
            f"rollout.user: the environment {type(env).__name__} has no method user_prompt, which says who the user is "
            "(docs/conversations.md); add it, or set rollout.user=environment"
        )
    messages: list[Message] = []
    for message in task.prompt:
        content = split_reasoning(message)[1] if message["role"] == "assistant" else text_of(message.get("content"))
        role = {"user": "assistant", "assistant": "user"}.get(message["role"])
        if role and content:
            messages.append({"role": role, "content": content})
    if messages[0]["role"] == "assistant":
        messages = [{"role": "user", "content": GREETING}, *messages]
    system: Message = {"role": "system", "content": env.user_prompt()}  # type: ignore[attr-defined]
    return replace(
        task, prompt=[system, *messages], tools=user_tools(env), expert=None, reference_calls=None, answer=None
    )


def user_example(task: Task, env: Environment) -> Task:
    """The task from the user's side with its expert trace, as SFT of a user model takes it.

    What the agent says first is part of the prompt. PactError if the environment does not know the user's side.
    """
    view = user_view(task, env)
    messages: list[Message] = env.user_messages(task) if callable(getattr(env, "user_messages", None)) else []  # type: ignore[attr-defined]
    if len(messages) < 2:
        raise PactError(
            f"task {task.id}: there is no dialogue to train the user on; it needs an expert trace, and its environment "
            f"({type(env).__name__}) a method user_messages (docs/conversations.md)"
        )
    return replace(view, prompt=[*view.prompt, messages[0]], expert=ExpertTrace.from_messages(messages[1:]))


def user_prompt_ids(
    renderer: ChatRenderer, view: Task, render: Callable[[list[Message], list[ToolSchema]], np.ndarray]
) -> np.ndarray:
    """[n] int64: the prompt of the user's side. It ends with the task's question, as a turn that the user has ended.

    Args:
        renderer: Renders that turn.
        view: See `user_view`; its last message is the question.
        render: `renderer.prompt_ids`, or a cache of it, for the messages before.
    """
    before = render(view.prompt[:-1], view.tools)
    ids, components = renderer.assistant_turn("", text_of(view.prompt[-1]["content"]), [])
    if not isinstance(renderer, ChatRenderer):  # a stand-in has no template
        return np.concatenate([before, ids])
    return renderer.history.asked(before, ids, components)
