"""Renders a tokenizer's chat template, and finds its end of turn and the text between turns by rendering probes."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pact_fast.chat.call_ids import call_id, with_call_ids
from pact_fast.chat.named_templates import NamedTemplates
from pact_fast.chat.template_variables import CLOCK, fix_date, template_variables
from pact_fast.data.types import Message, ToolCall, ToolSchema, text_of
from pact_fast.errors import PASSED_ON, PactError, error_line
from pact_fast.limits import time_limit

RENDER_SECONDS = 2.0  # for a rendering, which takes milliseconds
QUESTION: Message = {"role": "user", "content": "Go on."}
# On offer in every probe, as in the conversations that are trained on: some templates cannot render a call without.
PROBE_NAME = "look_up"
PROBE_TOOL: ToolSchema = {
    "type": "function",
    "function": {
        "name": PROBE_NAME,
        "description": "Look something up.",
        "parameters": {
            "type": "object",
            "properties": {"key": {"type": "string", "description": "What to look up."}},
            "required": ["key"],
        },
    },
}
_MARKER, _TURN = "Zq0Zmark", "Zq0Zturn"  # words that no template contains or changes
# How templates transform the content of a message. Llama writes tool results as JSON strings, others strip them.
_TRANSFORMS: tuple[Callable[[str], str], ...] = (str, str.strip, lambda text: json.dumps(text, ensure_ascii=False))
_PROBES = ("  two spaces\n", 'say "hi" \\ {"a": [1]}\nnext', "<b>é</b> & 中 {{ x }} 'q'", "7")

Pattern = tuple[tuple[str, str], ...]  # (role, name of the tool) of consecutive messages
Ends = tuple[str, str]  # end-of-turn token of an answer, and of a turn with calls


class ChatTemplate:
    """Renders messages to text with the tokenizer's template, or with the one of several that fits (NamedTemplates).

    Args:
        tokenizer: With the template.
        variables: `model.chat_template_kwargs`, passed to the template at every rendering.
        write_calls: Writes the calls of a turn, for a template that shows none: they are then part of the turn's text (the
            first template of LFM2 is used so).

    Raises:
        PactError: There is no template, it fails, or it has no such variable.
    """

    def __init__(
        self,
        tokenizer,
        variables: Mapping[str, Any] | None = None,
        write_calls: Callable[[Sequence[ToolCall]], str] | None = None,
    ):
        self._tokenizer, self._write_calls = tokenizer, write_calls
        self._named = NamedTemplates(tokenizer)
        self._variables = template_variables(variables or {}, self._named.sources)
        self._date = (variables or {}).get(CLOCK)
        self._source = functools.cache(self._find_source)
        self.skeleton = functools.lru_cache(maxsize=4096)(self._skeleton)
        self._transform_of = functools.cache(self._find_transform)

    def render(
        self, messages: Sequence[Message], tools: Sequence[ToolSchema] = (), *, generate: bool = False, **variables: Any
    ) -> str:
        """The text of a conversation; with `generate`, followed by the generation prompt.

        Calls and results have the ids of their row, unless the template needs ids: then they have those of `call_ids`.
        """
        if self._needs_ids or self._ids_name_calls:
            messages = with_call_ids(messages, self._ids_name_calls)
        return self._render(self._fitting(messages), tools, generate, **variables)

    def _render(
        self, messages: Sequence[Message], tools: Sequence[ToolSchema], generate: bool = False, **variables: Any
    ) -> str:
        try:
            with time_limit(
                RENDER_SECONDS, "the chat template (a loop without end? set model.chat_template to another one)"
            ):
                return self._tokenizer.apply_chat_template(
                    [{**m, "content": text_of(m.get("content"))} for m in messages],
                    chat_template=self._source(bool(tools)),
                    tools=list(tools) or None,
                    tokenize=False,
                    add_generation_prompt=generate,
                    **{**self._variables, **variables},
                )
        except PASSED_ON:
            raise
        except Exception as error:  # a template is a program: it may raise anything
            roles = ", ".join(str(m.get("role")) for m in messages)
            reason = error_line(error) or type(error).__name__
            raise PactError(
                f"the chat template cannot render a conversation of {roles}: {reason}; set "
                "model.chat_template to one that can"
            ) from None

    def _find_source(self, tools: bool) -> str:
        source = self._named.choose([PROBE_TOOL] if tools else [])
        return source if self._date is None else fix_date(source, self._date)

    def render_call(self, call: ToolCall) -> str:
        """The text of a conversation with one tool call."""
        return self.render([QUESTION, call_message(call)], [PROBE_TOOL])

    @functools.cached_property
    def _needs_ids(self) -> bool:
        """Whether the template renders calls and their results only with call ids (Mistral's do)."""
        conversation = self._fitting(_probe_calls(1))
        return not self._renders(conversation) and self._renders(with_call_ids(conversation))

    @functools.cached_property
    def _ids_name_calls(self) -> bool:
        """Whether the template writes the id of a call in place of the tool's name (Kimi K2's do)."""
        question, turn, *_ = with_call_ids(self._fitting(_probe_calls(1)))
        try:
            shown, asked = (self._render(m, [PROBE_TOOL]) for m in ([question, turn], [question]))
        except PactError:
            return False
        written = shown[len(asked) :]
        return shown.startswith(asked) and call_id(0) in written and PROBE_NAME not in written

    @functools.cached_property
    def _needs_text(self) -> bool:
        """Whether the template takes the arguments of a call as JSON text alone (DeepSeek's add them to a string)."""
        conversation = with_call_ids(_probe_calls(1))
        return not self._renders(conversation) and self._renders(_with_text_arguments(conversation))

    @functools.cached_property
    def _drops_calls(self) -> bool:
        """Whether the template shows no calls."""
        text = _with_text_arguments(with_call_ids(_probe_calls(1))), with_call_ids(_probe_calls(1))
        return not any(self._renders(conversation) for conversation in text)

    def _fitting(self, messages: Sequence[Message]) -> Sequence[Message]:
        if self._write_calls is not None and self._drops_calls:
            return [_with_calls_as_text(message, self._write_calls) for message in messages]
        return _with_text_arguments(messages) if self._needs_text else messages

    @functools.cached_property
    def several_calls(self) -> bool:
        """Whether the template renders turns with more than one call (Llama 3.1's and gpt-oss's do not)."""
        conversation = self._fitting(_probe_calls(2))
        return self._renders(with_call_ids(conversation) if self._needs_ids else conversation, calls=2)

    def _renders(self, messages: Sequence[Message], calls: int = 1) -> bool:
        """Whether the template takes the messages, and writes that many calls of them."""
        try:
            text = self._render(messages, [PROBE_TOOL], generate=True)
        except PactError:
            return False
        return all(f"{_MARKER}{n}k" in text for n in range(calls))

    @functools.cached_property
    def written(self) -> str:
        """All text that the template is known to write: its source, and a conversation of every role."""
        conversation = [
            {"role": "system", "content": _MARKER},
            *_probe_calls(1),
            {"role": "assistant", "content": _MARKER},
        ]
        texts = [*self._named.sources]
        for messages in (conversation, conversation[1:]):  # some templates know no system message
            with contextlib.suppress(PactError):
                texts.append(self.render(messages, [PROBE_TOOL], generate=True))
        return "\n".join(texts)

    @functools.cached_property
    def after_turn(self) -> str:
        """The text that the template writes after an assistant turn; starts with the end-of-turn token."""
        turns: list[Message] = [QUESTION, {"role": "assistant", "content": _MARKER}]
        text = self.render(turns, [PROBE_TOOL])
        if text.endswith(_MARKER):  # a turn ends where the next begins, as GLM's do
            text = self.render([*turns, QUESTION], [PROBE_TOOL])
        if text.count(_MARKER) != 1:
            raise PactError(
                "the chat template does not show the assistant's text; set model.chat_template to one that does"
            )
        return text.split(_MARKER)[1]

    def after_calls(self, call: ToolCall, written: str) -> str:
        """The text that the template writes after `call`, which it writes as `written`, if a result follows."""
        result: Message = {"role": "tool", "name": call.name, "content": _MARKER}
        return self.render([QUESTION, call_message(call), result], [PROBE_TOOL], generate=True).partition(written)[2]

    @functools.cached_property
    def generation_prompt(self) -> str:
        """The text that the template writes for `add_generation_prompt`; empty if a turn follows a question at once."""
        shown, asked = (self.render([QUESTION], [PROBE_TOOL], generate=generate) for generate in (False, True))
        answered = self.render([QUESTION, {"role": "assistant", "content": _MARKER}], [PROBE_TOOL])
        if not asked.startswith(shown) or (asked == shown and not answered.startswith(shown + _MARKER)):
            raise PactError(
                "the chat template has no generation prompt (add_generation_prompt changes nothing); set "
                "model.chat_template to one that has"
            )
        return asked[len(shown) :]

    def bridge_tokens(self, messages: Sequence[Message], ends: Ends) -> tuple[tuple[str, ...], list[str]]:
        """(n + 1 texts of the template, n contents): interleaved, the text after the end-of-turn token."""
        pattern = tuple((m["role"], m.get("name") or "") for m in messages)
        contents = [self._transform_of(m["role"], ends)(text_of(m.get("content"))) for m in messages]
        return self.skeleton(pattern, ends), contents

    def _skeleton(self, pattern: Pattern, ends: Ends) -> tuple[str, ...]:
        """The template's text around the contents of the messages, checked by a second rendering."""
        marks = [f"{_MARKER}{i}x" for i in range(len(pattern))]
        transforms = [self._transform_of(role, ends) for role, _ in pattern]
        pieces = _split(
            self._after(pattern, marks, ends), [transform(m) for transform, m in zip(transforms, marks, strict=True)]
        )
        probes = [_PROBES[i % len(_PROBES)] for i in range(len(pattern))]
        transformed = [transform(probe) for transform, probe in zip(transforms, probes, strict=True)]
        if pieces is None or _join(pieces, transformed) != self._after(pattern, probes, ends):
            roles = ", ".join(role for role, _ in pattern)
            raise PactError(
                f"the chat template renders the messages ({roles}) differently depending on their contents, so "
                "turns cannot be appended; set model.chat_template to one that does not"
            )
        return pieces

    def _find_transform(self, role: str, ends: Ends) -> Callable[[str], str]:
        """Find the transform that the template applies to the content of a `role` message, by rendering probes.

        Raises PactError if none of _TRANSFORMS explains the rendering.
        """
        pattern: Pattern = ((role, "f" if role == "tool" else ""),)
        if role != "tool" and not self._keeps_end(ends):  # gpt-oss ends an earlier answer by another token
            pattern = (("tool", "f"), *pattern)

        def shown(content: str) -> str:
            return self._after(pattern, ["7"] * (len(pattern) - 1) + [content], ends)

        marked = shown(_MARKER + "0x")
        for transform in _TRANSFORMS:
            pieces = _split(marked, [transform(_MARKER + "0x")])
            if pieces and all(_join(pieces, [transform(p)]) == shown(p) for p in _PROBES):
                return transform
        raise PactError(
            f"the chat template does not show the content of a '{role}' message as it is; set model.chat_template to "
            "one that does"
        )

    def _keeps_end(self, ends: Ends) -> bool:
        """Whether an answer that a message follows ends as the last one does."""
        conversation: list[Message] = [QUESTION, {"role": "assistant", "content": _TURN}, QUESTION]
        return ends[0] in self.render(conversation, [PROBE_TOOL]).rpartition(_TURN)[2]

    def _after(self, pattern: Pattern, contents: Sequence[str], ends: Ends) -> str:
        """The template's text from the end of an assistant turn, followed by these messages, to the generation prompt."""
        messages: list[Message] = []
        for (role, name), content in zip(pattern, contents, strict=True):
            messages.append({"role": role, "content": content, **({"name": name} if name else {})})
        turn: Message = {"role": "assistant", "content": _TURN}
        eot = ends[pattern[0][0] == "tool"]
        if pattern[0][0] == "tool":  # as many calls as results, as in a real conversation
            calls = sum(1 for _ in itertools.takewhile(lambda message: message[0] == "tool", pattern))
            names = [name or "f" for _, name in pattern[: calls if self.several_calls else 1]]
            turn = call_message(*(ToolCall(name, {"x": _TURN}) for name in names))
        # with ids, since some templates (Gemma's) name a result after the call that has its id
        text = self.render(with_call_ids([QUESTION, turn, *messages]), [PROBE_TOOL], generate=True)
        start = text.rfind(_TURN)
        end = text.find(eot, start)
        if start < 0 or end < 0:
            raise PactError(
                f"the chat template does not end an assistant turn with {eot!r} before a '{pattern[0][0]}' message; "
                "set model.chat_template to one that does"
            )
        return text[end + len(eot) :]


def call_message(*calls: ToolCall) -> Message:
    """An assistant message with these tool calls."""
    entries = [{"type": "function", "function": call.to_json()} for call in calls]
    return {"role": "assistant", "content": "", "tool_calls": entries}


def _with_calls_as_text(message: Message, write_calls: Callable[[Sequence[ToolCall]], str]) -> Message:
    """The message, with its calls at the end of its text."""
    if not message.get("tool_calls"):
        return message
    written = write_calls([ToolCall.from_message(call) for call in message["tool_calls"]])
    others = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**others, "content": text_of(message.get("content")) + written}


def _with_text_arguments(messages: Sequence[Message]) -> list[Message]:
    """The messages, with the arguments of every call as JSON text."""
    return [
        {**message, "tool_calls": [_with_text(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = call["function"].get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": text}}


def _probe_calls(count: int) -> list[Message]:
    """A question, a turn with calls, and their results."""
    calls = [ToolCall(PROBE_NAME, {"key": f"{_MARKER}{n}k"}) for n in range(count)]
    results = [{"role": "tool", "name": PROBE_NAME, "content": "7"} for _ in calls]
    return [QUESTION, call_message(*calls), *results]


def _split(text: str, contents: Sequence[str]) -> tuple[str, ...] | None:
    """The pieces of text around the contents, which occur in this order; None if one is missing."""
    pieces: list[str] = []
    for content in contents:
        piece, found, text = text.partition(content)
        if not found:
            return None
        pieces.append(piece)
    return (*pieces, text)


def _join(pieces: Sequence[str], contents: Sequence[str]) -> str:
    return pieces[0] + "".join(content + piece for content, piece in zip(contents, pieces[1:], strict=True))
