"""The records that pass through the trainer: tasks, expert traces and trajectories. No torch, no tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from pact_fast.data.branching import Branching
from pact_fast.data.keys import CALL

Message = dict[str, Any]  # OpenAI chat message: role, content; optional: tool_calls, reasoning_content, tool_call_id
ToolSchema = dict[str, Any]  # {"type": "function", "function": {"name", "description", "parameters"}}


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool; `arguments` is parsed JSON."""

    name: str
    arguments: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "arguments": self.arguments}

    @classmethod
    def from_message(cls, call: dict[str, Any]) -> ToolCall:
        """From an OpenAI `tool_calls` entry or a bare {"name", "arguments"}; arguments may be a JSON string.

        Other projects' names of the keys are read, too (data/keys.py). Raises ValueError if the call is malformed.
        """
        body = call_keys(call)
        name = body.get("name")
        if not isinstance(name, str):
            raise ValueError("a tool call needs a string 'name'")
        arguments = body.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError) as error:
                raise ValueError(f"the arguments of '{name}' are not JSON: {error}") from None
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            raise ValueError(f"the arguments of '{name}' must be an object, not {type(arguments).__name__}")
        return cls(name, arguments)


def call_keys(call: Any) -> dict[str, Any]:
    """The entries of a tool call under our names: id, name, arguments. ValueError if it has others.

    `function` is OpenAI's wrapper, or the name of the tool.
    """
    if not isinstance(call, dict):
        raise ValueError(f"a tool call must be an object, not {type(call).__name__}")
    function = call.get("function")
    if function is None:
        return CALL.read(call)
    outside = {key: item for key, item in call.items() if key != "function"}
    if isinstance(function, str):
        return CALL.read({"name": function, **outside})
    if not isinstance(function, dict):
        raise ValueError("a tool call needs a string 'name'")
    return CALL.read(outside) | CALL.read(function)


@dataclass(frozen=True)
class ExpertTurn:
    """One turn of an expert. It has calls, or the user says something after it, or both.

    reasoning     text before the calls, hidden
    calls         the tool calls
    observations  their results, one per call
    content       visible text before the calls; usually empty where there are calls
    user          the user's message after the turn; None: there is none
    segments      ends of the reasoning's segments, in characters; None: by the rules of `chat/segments.py`
    """

    reasoning: str
    calls: tuple[ToolCall, ...]
    observations: tuple[str, ...]
    content: str = ""
    user: str | None = None
    segments: tuple[int, ...] | None = None

    def following(self) -> list[Message]:
        """The messages after the turn: one per observation, and the user's."""
        messages: list[Message] = [
            {"role": "tool", "name": call.name, "content": text}
            for call, text in zip(self.calls, self.observations, strict=True)
        ]
        return messages if self.user is None else [*messages, {"role": "user", "content": self.user}]


@dataclass(frozen=True)
class ExpertTrace:
    """The expert trace h*. The final answer is kept apart from `turns`, since h* must not leak it (docs/method.md)."""

    turns: tuple[ExpertTurn, ...]
    answer: str | None = None
    answer_reasoning: str = ""

    @property
    def calls(self) -> list[ToolCall]:
        return [call for turn in self.turns for call in turn.calls]

    @classmethod
    def from_messages(cls, messages: Sequence[Message]) -> ExpertTrace:
        """From the assistant, tool and user messages after the prompt.

        A last assistant message without tool calls is the final answer. Tool messages are paired with calls by id where
        both have ids, else by position. Reasoning: see `split_reasoning`. Raises ValueError that names the message that
        is wrong.
        """
        turns: list[ExpertTurn] = []
        answer, answer_reasoning = None, ""
        index = 0
        while index < len(messages):
            message = messages[index]
            if not isinstance(message, dict) or message.get("role") != "assistant":
                role = message.get("role") if isinstance(message, dict) else type(message).__name__
                raise ValueError(f"message {index}: expected an assistant turn, found {role!r}")
            reasoning, content = split_reasoning(message)
            calls = tuple(_calls(message, index))
            index += 1
            first = index
            while index < len(messages) and isinstance(messages[index], dict) and messages[index].get("role") == "tool":
                index += 1
            observations = messages[first:index]
            if len(observations) != len(calls):
                raise ValueError(
                    f"message {first - 1}: {len(calls)} tool calls but {len(observations)} tool messages after them"
                )
            user = _user_text(messages, index)
            index += user is not None
            if user is not None and index >= len(messages):
                raise ValueError(f"message {index - 1}: the last message is the user's; add the assistant's answer")
            if not calls and user is None:
                if index < len(messages):
                    raise ValueError(
                        f"message {first - 1}: an assistant turn without tool calls must be the last message, or the user "
                        "must speak after it"
                    )
                answer, answer_reasoning = content, reasoning
                break
            paired = _pair_observations(message["tool_calls"], calls, observations, first) if calls else []
            texts = tuple(text_of(observation.get("content")) for observation in paired)
            turns.append(ExpertTurn(reasoning, calls, texts, content, user, _segments(message, reasoning, first - 1)))
        return cls(tuple(turns), answer, answer_reasoning)

    def to_messages(self) -> list[Message]:
        """The inverse of `from_messages`; reasoning becomes `reasoning_content`."""
        messages: list[Message] = []
        for turn in self.turns:
            message: Message = {"role": "assistant", "content": turn.content}
            if turn.reasoning:
                message["reasoning_content"] = turn.reasoning
                if turn.segments is not None:
                    message["reasoning_segments"] = list(turn.segments)
            if turn.calls:
                message["tool_calls"] = [{"type": "function", "function": call.to_json()} for call in turn.calls]
            messages.append(message)
            messages += turn.following()
        if self.answer is not None:
            last: Message = {"role": "assistant", "content": self.answer}
            if self.answer_reasoning:
                last["reasoning_content"] = self.answer_reasoning
            messages.append(last)
        return messages


def _segments(message: Message, reasoning: str, index: int) -> tuple[int, ...] | None:
    """`reasoning_segments` of a message. ValueError unless they are ascending ends, the last one that of the reasoning."""
    ends = message.get("reasoning_segments")
    if ends is None or ends == []:
        return None
    fits = isinstance(ends, list) and all(type(end) is int for end in ends)
    if not fits or ends[-1] != len(reasoning) or any(a >= b for a, b in zip([0, *ends], ends, strict=False)):
        raise ValueError(
            f"message {index}: 'reasoning_segments' must be ascending ends in characters, the last one "
            f"{len(reasoning)}, the length of the reasoning; correct or remove them"
        )
    return tuple(ends)


def _user_text(messages: Sequence[Message], index: int) -> str | None:
    """The text of a message, if it is the user's."""
    message = messages[index] if index < len(messages) else None
    return text_of(message.get("content")) if isinstance(message, dict) and message.get("role") == "user" else None


def text_of(content: Any) -> str:
    """The text of a message's content: a string, None, or a list of typed parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(part.get("text", "") if isinstance(part, dict) else str(part) for part in content)
    return json.dumps(content, ensure_ascii=False)


# Start and end tags of reasoning in the text of a message, for several model families.
_THINK = re.compile(r"<think(?:ing)?>|\[THINK\]|◁think▷", re.IGNORECASE)
_END_THINK = re.compile(r"</think(?:ing)?>|\[/THINK\]|◁/think▷", re.IGNORECASE)


def split_reasoning(message: Message) -> tuple[str, str]:
    """(reasoning, visible content) of an assistant message.

    Reasoning is `reasoning_content` (also called `reasoning` or `thinking`) and the marked text of the content. A closing
    marker alone ends reasoning that began with the message (the template has opened it); an opening marker alone begins
    reasoning that the end of the message ends.
    """
    given = message.get("reasoning_content") or message.get("reasoning") or message.get("thinking") or ""
    marked, content = _split_marked(text_of(message.get("content")))
    parts = [part for part in (str(given).strip(), *marked) if part]
    return "\n".join(dict.fromkeys(parts)), content.strip()


def _split_marked(text: str) -> tuple[list[str], str]:
    """(texts of the reasoning blocks, the text outside of them)."""
    reasoning: list[str] = []
    visible = ""
    while (begin := _THINK.search(text)) or _END_THINK.search(text):
        end = _END_THINK.search(text, begin.end() if begin else 0)
        alone = _END_THINK.search(text, 0, begin.start() if begin else len(text))
        if alone and not visible and not reasoning:  # closes a block that the template has opened
            begin, end = None, alone
        elif alone:  # a stray marker
            visible, text = visible + text[: alone.start()], text[alone.end() :]
            continue
        start, inside = (begin.start(), begin.end()) if begin else (0, 0)
        visible += text[:start]
        reasoning.append(text[inside : end.start() if end else len(text)].strip())
        text = text[end.end() :] if end else ""
    return reasoning, visible + text


def _pair_observations(
    entries: Sequence[dict[str, Any]], calls: Sequence[ToolCall], observations: Sequence[Message], first: int
) -> list[Message]:
    """The tool messages of a turn, one per call, in the order of the calls.

    Args:
        entries: The calls as they stand in the message, with their ids.
        calls: The calls.
        observations: As many tool messages.
        first: Index of the first of them, for messages.

    Raises:
        ValueError: Ids or names do not fit each other.
    """
    ids = [call_id(call_keys(entry).get("id")) for entry in entries]
    answered = [call_id(observation.get("tool_call_id")) for observation in observations]
    paired = list(observations)
    if None not in ids and None not in answered and len(set(ids)) == len(ids):
        for index, found in enumerate(answered):
            if found not in ids:
                raise ValueError(f"message {first + index} answers {found!r}, which is the id of no call before it")
            if found in answered[:index]:
                raise ValueError(f"message {first + index} answers {found!r}, which has an answer already")
        paired = [observations[answered.index(found)] for found in ids]
    for call, observation, found, expected in zip(
        calls, paired, (call_id(observation.get("tool_call_id")) for observation in paired), ids, strict=True
    ):
        for given, wanted in ((found, expected), (observation.get("name"), call.name)):
            if given is not None and wanted is not None and given != wanted:
                at = first + next(i for i, message in enumerate(observations) if message is observation)
                raise ValueError(f"message {at} answers {given!r} where {wanted!r} was called; give both the call's id")
    return paired


def call_id(value: Any) -> str | None:
    """The id of a call as text: 1, 1.0 and "1" are the same id; None: it has none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return None if value is None or value == "" else str(value)


def _calls(message: Message, index: int) -> list[ToolCall]:
    try:
        return [ToolCall.from_message(call) for call in message.get("tool_calls") or []]
    except ValueError as error:
        raise ValueError(f"message {index}: {error}") from None


@dataclass
class Task:
    """One prompt, with its tools and its training signal.

    id               unique in its file
    prompt           system and user messages; x together with `tools`
    tools            OpenAI schemas; empty: those of the environment
    expert           expert trace; training only, never shown to the sampler
    reference_calls  calls for the matching reward; training only
    answer           reference answer; training only
    env              name of a registered environment; None: that of the configuration
    env_args         arguments of the environment for this task
    columns          all further columns of the data row, for the user's reward functions
    source           (file, line or row number from 1) that the task was read from, for messages
    """

    id: str
    prompt: list[Message]
    tools: list[ToolSchema] = field(default_factory=list)
    expert: ExpertTrace | None = None
    reference_calls: list[ToolCall] | None = None
    answer: str | None = None
    env: str | None = None
    env_args: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)
    source: tuple[str, int] | None = field(default=None, compare=False, repr=False)


@dataclass
class TurnRecord:
    """One assistant turn of a trajectory, parsed.

    text          the whole turn, without its end-of-turn token
    reasoning     text of the think block
    content       visible text
    attempts      the calls in order; a malformed one is the text of its error
    observations  results of the attempts, in their order
    user          the user's message after the turn; None: there is none, or no user
    """

    text: str
    reasoning: str
    content: str
    attempts: list[ToolCall | str] = field(default_factory=list)
    observations: list[str] = field(default_factory=list)
    user: str | None = None

    @property
    def calls(self) -> list[ToolCall]:
        return [a for a in self.attempts if isinstance(a, ToolCall)]

    @property
    def errors(self) -> list[str]:
        return [a for a in self.attempts if isinstance(a, str)]


class StopReason(StrEnum):
    """Why a trajectory ended."""

    ANSWER = "answer"  # a turn without calls, where there is no user
    ENVIRONMENT = "environment"  # it has ended the dialogue
    USER = "user"  # a policy or a model that plays the user has ended the dialogue
    MAX_TURNS = "max_turns"
    MAX_USER_TURNS = "max_user_turns"
    MAX_USER_TOKENS = "max_user_tokens"  # of a policy that plays the user
    USER_FAILED = "user_failed"  # a model behind an endpoint gave no message that can be used
    MAX_COMPLETION_LENGTH = "max_completion_length"
    MAX_TURN_TOKENS = "max_turn_tokens"
    TIMEOUT = "timeout"

    @property
    def is_truncated(self) -> bool:
        """Whether a limit or a failure ended the trajectory, not the policy or the user."""
        return self not in (StopReason.ANSWER, StopReason.ENVIRONMENT, StopReason.USER)


@dataclass
class Trajectory(Branching):
    """One rollout τ: token ids as sampled, never tokenised again. Arrays [n] have one entry per response token.

    If the chat template rewrites earlier turns (docs/conversations.md), the rollout branches.

    task_id       id of the task
    prompt_ids    int64, the prompt x
    ids           [n] int64
    components    [n] uint8, see Component
    turn_ids      [n] int16: index of the assistant turn; observations and user text have that of the turn before them
    sampled       [n] bool: the policy generated this token (M_k of the method)
    logprobs      [n] float32: log-prob of the sampler, after temperature and filters; NaN where not sampled
    versions      [n] int32: version of the weights that sampled the token; -1 where not sampled
    turns         the assistant turns, parsed
    stop_reason   why the trajectory ended
    opening       the other side's message before the first turn, if a policy plays the user; else None
    branches      [b, 2] int64, see Branching
    env_rewards   returned by the environment
    turn_rewards, reward_parts, reward
                  set by rewards/score.py
    extra         values that reward functions logged for this rollout with `log_extra`, by column
    metrics       values that they logged with `log_metric`, mean over the call that scored this rollout
    """

    task_id: str
    prompt_ids: np.ndarray
    ids: np.ndarray
    components: np.ndarray
    turn_ids: np.ndarray
    sampled: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    turns: list[TurnRecord]
    stop_reason: StopReason
    opening: str | None = None
    turn_rewards: list[float] = field(default_factory=list)
    reward: float = 0.0
    reward_parts: dict[str, float] = field(default_factory=dict)
    env_rewards: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    branches: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))

    def __post_init__(self) -> None:
        self.stop_reason = StopReason(self.stop_reason)

    @property
    def calls(self) -> list[ToolCall]:
        return [call for turn in self.turns for call in turn.calls]

    def to_messages(self) -> list[Message]:
        """The messages after the prompt: of assistant, tools and user. A malformed call has only a tool message, its error.

        Tool messages have the `name` of their tool, as in TRL; that of a malformed call is "unknown".
        """
        messages: list[Message] = [] if self.opening is None else [{"role": "user", "content": self.opening}]
        for turn in self.turns:
            message: Message = {"role": "assistant", "content": turn.content}
            if turn.reasoning:
                message["reasoning_content"] = turn.reasoning
            if turn.calls:
                message["tool_calls"] = [{"type": "function", "function": call.to_json()} for call in turn.calls]
            messages.append(message)
            # not strict: calls of the last turn may have no observations
            for attempt, text in zip(turn.attempts, turn.observations, strict=False):
                name = attempt.name if isinstance(attempt, ToolCall) else "unknown"
                messages.append({"role": "tool", "name": name, "content": text})
            if turn.user is not None:
                messages.append({"role": "user", "content": turn.user})
        return messages

    @property
    def answer(self) -> str:
        """The visible text of the last turn, unless a limit ended the trajectory: then empty."""
        return self.turns[-1].content if self.turns and not self.stop_reason.is_truncated else ""
