"""Messages to token ids and back. Append only: ids that were sampled or rendered are never tokenised again."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from pact_fast.chat.chat_template import ChatTemplate
from pact_fast.chat.encoding import Encoded, Encoder, Part
from pact_fast.chat.formats.base import ParsedTurn, ToolFormat
from pact_fast.chat.formats.layout import PROBE_CALL
from pact_fast.chat.formats.registry import detect_format, get_format
from pact_fast.chat.history import History, LabelledTokens
from pact_fast.chat.segments import prefix_ends
from pact_fast.chat.structure import OTHER_ENDS, structure_tokens
from pact_fast.chat.token_bytes import TokenBytes
from pact_fast.chat.trace_context import NO_LEVEL, TraceContext, TraceWriter
from pact_fast.components import Component
from pact_fast.config import ModelConfig
from pact_fast.data.types import ExpertTrace, ExpertTurn, Message, Task, ToolCall, ToolSchema, text_of
from pact_fast.errors import PactError
from pact_fast.limits import memory_limit


class ChatRenderer:
    """Renders prompts, turns and the text between turns through the model's own chat template.

    eot, eot_id            the template's end-of-turn token, its text and its id
    call_eot, call_eot_id  the same for a turn with calls, after which results follow; most templates have one for both
    eot_ids                ids of all tokens that end a turn
    control_ids            ids of end-of-turn tokens and of the tool format's markers
    format                 the tool format

    Args:
        tokenizer: With a chat template.
        tool_format: How calls are written; None: as the template writes them.
        variables: `model.chat_template_kwargs`.

    Raises PactError if the tokenizer or its template cannot be used. `template_check.check_template` checks more.
    """

    def __init__(self, tokenizer, tool_format: ToolFormat | None = None, variables: Mapping[str, Any] | None = None):
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, variables, tool_format.write_calls if tool_format else None)
        self.format = (tool_format or detect_format(self.template)).fit(self.template)
        self.token_bytes = TokenBytes(tokenizer)
        after_calls = self.template.after_calls(PROBE_CALL, self.format.write_calls([PROBE_CALL])).lstrip()
        structure = structure_tokens(tokenizer, self.template, self.format.markers, after_calls)
        self.encoder = Encoder(tokenizer, structure)
        self.eot = self._end_of_turn()
        self.call_eot = self._end_of_calls(after_calls)
        self.ends = self.eot, self.call_eot
        self.eot_id, self.call_eot_id = (self.encoder.control_ids[end] for end in self.ends)
        others = [self.encoder.control_ids.get(name) for name in (tokenizer.eos_token, *OTHER_ENDS)]
        self.eot_ids: tuple[int, ...] = tuple(
            dict.fromkeys([self.eot_id, self.call_eot_id, *(i for i in others if i is not None)])
        )
        markers = {self.encoder.control_ids[m] for m in self.format.markers if m in self.encoder.control_ids}
        self.control_ids: frozenset[int] = frozenset(markers.union(self.eot_ids))
        self._structure = self.encoder.pattern([*structure, *self.format.markers])  # no text inside a turn
        # beginning of a turn that the generation prompt has already written, e.g. "<think>\n"
        opened = re.search(rf"{re.escape(self.format.think[0])}\s*\Z", self.template.generation_prompt)
        self._opened = opened.group() if opened else ""

    @functools.cached_property
    def history(self) -> History:
        """Rewriting of earlier turns by the template when the user speaks again."""
        return History(self)

    def stop_ids(self, at_tool_call: bool) -> tuple[int, ...]:
        """Tokens at which an engine ends a turn: `eot_ids` and, with `at_tool_call`, the end of a call.

        Raises PactError if calls do not end with a single token in this tokenizer.
        """
        if not at_tool_call:
            return self.eot_ids
        end = self.encoder.control_ids.get(self.format.end_of_call or "")
        if end is None:
            raise PactError(
                f"rollout.stop_at_tool_call: calls of {type(self.format).__name__} do not end with a token of their own "
                "in this tokenizer; set it to false"
            )
        return (*self.eot_ids, end)

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[ToolSchema]) -> np.ndarray:
        """[n] int64: the prompt with the generation prompt. Control strings in messages become control tokens."""
        return self.template_ids(self.template.render(messages, tools, generate=True))

    def bridge_tokens(self, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """(ids [n] int64, components [n] uint8) from an end-of-turn token (excluded) through the generation prompt.

        `messages` are the tool and user messages between two assistant turns. Contents are plain text: a string such as
        "<|im_end|>" in them does not become a control token. Contents of tools are OBSERVATION, of users USER, the rest is
        TEMPLATE.
        """
        ends = self.history.ends if messages and messages[0]["role"] == "user" else self.ends
        texts, contents = self.template.bridge_tokens(
            [{**m, "content": _replace_surrogates(text_of(m.get("content")))} for m in messages], ends
        )
        parts = [Part(texts[0], self.encoder.all_controls)]
        owners = [Component.TEMPLATE]
        for message, content, text in zip(messages, contents, texts[1:], strict=True):
            parts += [Part(content), Part(text, self.encoder.all_controls)]
            owners += [Component.OBSERVATION if message["role"] == "tool" else Component.USER, Component.TEMPLATE]
        encoded = self.encoder.encode(parts)
        return encoded.ids, _components(encoded, [p.text for p in parts], owners)

    def bridge_ids(self, messages: Sequence[Message]) -> np.ndarray:
        """The ids of `bridge_tokens`."""
        return self.bridge_tokens(messages)[0]

    def assistant_turn(
        self, reasoning: str, content: str, calls: Sequence[ToolCall], end: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids [n] int64, components [n] uint8) of an assistant turn after the generation prompt.

        Args:
            reasoning: Text between the think tags; empty: no tags.
            content: Visible text.
            calls: Tool calls, after the content.
            end: Whether to add the end-of-turn token.
        """
        encoded, components, _ = self._turn(reasoning, content, calls)
        if not end:
            return encoded.ids, components
        return self._append_eot(encoded.ids, components)

    def parse(self, ids: np.ndarray, tools: Sequence[ToolSchema]) -> ParsedTurn:
        """Parse a sampled turn, with or without its end-of-turn token; `components` has one entry per id.

        A token belongs to the span in which its first byte lies. An end-of-turn token is TOOL_CALL after a call,
        otherwise ANSWER.
        """
        ids = np.asarray(ids, np.int64)
        n = len(ids)
        while n and int(ids[n - 1]) in self.eot_ids:
            n -= 1
        turn = self.format.parse(self.token_bytes.join(ids[:n]), tools, thinking=bool(self._opened))
        components = np.full(len(ids), _end_component(turn.spans[-1][2] if turn.spans else None), np.uint8)
        if turn.spans:
            ends = np.array([end for _, end, _ in turn.spans])
            kinds = np.array([component for _, _, component in turn.spans], np.uint8)
            first_bytes = self.token_bytes.offsets(ids[:n])[:-1]
            # a token without bytes at the very end belongs to the last span
            components[:n] = kinds[np.minimum(np.searchsorted(ends, first_bytes, side="right"), len(kinds) - 1)]
        turn.components = components
        return turn

    def truncate(self, text: str, max_tokens: int) -> str:
        """`text`, cut to `max_tokens` tokens with a note of how much was cut.

        The note itself is never cut, even if it has more than `max_tokens` tokens.
        """
        text = _replace_surrogates(text)
        ids = self.encoder.plain(text[: 64 * max_tokens])  # longer than max_tokens, without encoding megabytes
        if len(ids) <= max_tokens and len(text) <= 64 * max_tokens:
            return text
        room = max_tokens
        while True:
            head = self.token_bytes.join(ids[:room]).decode("utf-8", "ignore")
            cut = f"{head}… [cut: {len(text) - len(head):,} characters]"
            excess = len(self.encoder.plain(cut)) - max_tokens
            if excess <= 0 or room == 0:
                return cut
            room = max(room - excess, 0)

    def trace_context(
        self,
        task: Task,
        trace: ExpertTrace,
        rendering: Literal["demonstration", "turns"],
        reasoning_level: int | None = None,
        answer: bool = False,
    ) -> TraceContext:
        """The trace as tokens that follow the prompt of `task`, without the final answer. Ends with a generation prompt.

        Args:
            task: Its question is restated by `demonstration`.
            trace: A trace without turns gives an empty context.
            rendering: `demonstration`: the expert's turns, then the question again; `turns`: the turns only.
            reasoning_level: Cut the reasoning of every turn at this prefix level; None: keep all of it.
            answer: Add the final answer, if there is one; the context then ends with it.

        Where a user speaks in the trace and the template drops the reasoning of earlier turns, the trace branches as
        rollouts do (docs/conversations.md). The question that `demonstration` repeats at the end drops nothing.
        """
        rewrites = self._rewrites(trace)
        prompt_ids = self.prompt_ids(task.prompt, task.tools) if rewrites else np.zeros(0, np.int64)
        writer = TraceWriter(prompt_ids, self.history if rewrites else None)
        for index, turn in enumerate(trace.turns):
            tokens, level = self._expert_turn(turn, index, reasoning_level)
            writer.turn(tokens, level)
            following = turn.following()
            if rendering == "demonstration" and index == len(trace.turns) - 1:
                following.append({"role": "user", "content": question_of(task)})
            tokens = _of_turn(index, *self.bridge_tokens(following))
            writer.follow(tokens, user=turn.user is not None, replied=not turn.calls)
        if answer and trace.answer is not None:
            tokens = _of_turn(len(trace.turns), *self.assistant_turn(trace.answer_reasoning, trace.answer, []))
            writer.turn(tokens, np.full(len(tokens), NO_LEVEL, np.uint8))
        return writer.context()

    def _rewrites(self, trace: ExpertTrace) -> bool:
        """Whether the template rewrites the past in this trace: a user speaks after turns that reason, if only in tags."""
        spoken = any(turn.user is not None for turn in trace.turns)
        reasons = bool(self._opened) or any(turn.reasoning for turn in trace.turns)
        return spoken and reasons and self.history.drops_reasoning

    def hint_prompt_ids(self, task: Task, trace: ExpertTrace, reasoning_level: int | None = None) -> np.ndarray:
        """[n] int64: the prompt, with the trace as text at the end of the last user message."""
        lines = ["\n\nAn expert solved this as follows, up to the final answer."]
        for turn in trace.turns:
            reasoning = _cut_reasoning(turn, reasoning_level)
            lines += [_escape(reasoning, self._structure)] if reasoning else []
            for call, observation in zip(turn.calls, turn.observations, strict=True):
                arguments = json.dumps(call.arguments, ensure_ascii=False)
                lines.append(_escape(f"Call: {call.name}({arguments})", self._structure))
                lines.append(_escape(f"Result: {observation}", self.encoder.all_controls))
            if turn.user is not None:
                lines += [_escape(f"Reply: {turn.content}", self._structure)] if turn.content else []
                lines.append(_escape(f"User: {turn.user}", self.encoder.all_controls))
        messages = [dict(m) for m in task.prompt]
        last = _last_user(messages)
        messages[last]["content"] = text_of(messages[last].get("content")) + _replace_surrogates("\n".join(lines))
        return self.prompt_ids(messages, task.tools)

    def _end_of_turn(self) -> str:
        after = self.template.after_turn
        match = self.encoder.all_controls.match(after) if self.encoder.all_controls else None
        if not match:
            raise PactError(
                f"the chat template does not end an assistant turn with a special token (it writes {after[:20]!r}), so "
                "a model cannot end its turn; set model.chat_template to one that does"
            )
        return match.group()

    def _end_of_calls(self, after: str) -> str:
        """The token that ends a turn with calls: that of other turns, unless the template writes another one."""
        match = self.encoder.all_controls.match(after) if self.encoder.all_controls else None
        return match.group() if match else self.eot

    def template_ids(self, text: str) -> np.ndarray:
        """[n] int64: ids of a text that the template has rendered. Control strings become control tokens."""
        return np.array(self.tokenizer.encode(text, add_special_tokens=False), np.int64)

    def _turn(self, reasoning: str, content: str, calls: Sequence[ToolCall]) -> tuple[Encoded, np.ndarray, int]:
        """(tokens without the end of turn, components, character at which the reasoning text starts)."""
        pieces = [
            (_replace_surrogates(text), component) for text, component in self.format.pieces(reasoning, content, calls)
        ]
        layout = self.format.layout
        begin = len(layout.before_turn + self.format.think[0] + layout.in_reasoning)
        if self._opened:
            if not reasoning:  # close the block that the generation prompt has opened
                gap = layout.reasoning_calls if calls and not content else layout.after_reasoning
                (text, component), *rest = pieces or [("", Component.ANSWER)]
                pieces = [(self.format.reasoning_block(""), Component.REASONING), (gap + text, component), *rest]
            written = min(begin, len(self._opened))
            pieces[0] = (pieces[0][0][written:], Component.REASONING)
            begin -= written
        texts = [text for text, _ in pieces]
        encoded = self.encoder.encode_turn("".join(texts))
        return encoded, _components(encoded, texts, [component for _, component in pieces]), begin

    def _append_eot(self, ids: np.ndarray, components: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        last = _end_component(components[-1] if len(components) else None)
        end = self.call_eot_id if last == Component.TOOL_CALL else self.eot_id
        return np.append(ids, end), np.append(components, np.uint8(last))

    def _expert_turn(
        self, turn: ExpertTurn, index: int, reasoning_level: int | None
    ) -> tuple[LabelledTokens, np.ndarray]:
        """(tokens, level) of the expert's turn `index`, with its end-of-turn token."""
        reasoning = _cut_reasoning(turn, reasoning_level)
        encoded, components, begin = self._turn(reasoning, turn.content, turn.calls)
        level = np.full(len(encoded.ids) + 1, NO_LEVEL, np.uint8)
        if reasoning:
            ends = prefix_ends(turn.reasoning, turn.calls, turn.segments)
            # A token is supervised if all of it lies in the prefix. The opening tag belongs to the first segment. The
            # closing tag is supervised only after complete and safe reasoning: a cut must not teach to stop there.
            complete = len(reasoning) == len(turn.reasoning) == ends[-1]
            position = np.maximum(encoded.end - begin, 1)
            position[position > len(reasoning)] = ends[-1] if complete else ends[-1] + 1
            levels = np.searchsorted(ends, position, side="left")
            inside = (components == Component.REASONING) & (levels < len(ends))
            level[:-1][inside] = levels[inside]
        return _of_turn(index, *self._append_eot(encoded.ids, components)), level


def _of_turn(index: int, ids: np.ndarray, components: np.ndarray) -> LabelledTokens:
    """Tokens of turn `index`, or of the text after it."""
    return LabelledTokens(ids, components, np.full(len(ids), index, np.int16))


def question_of(task: Task) -> str:
    """The text of the last user message."""
    return text_of(task.prompt[_last_user(task.prompt)].get("content"))


def _last_user(messages: Sequence[Message]) -> int:
    found = [i for i, message in enumerate(messages) if message.get("role") == "user"]
    if not found:
        raise PactError("the prompt has no user message, so the expert trace has no question to restate; add one")
    return found[-1]


def _cut_reasoning(turn: ExpertTurn, level: int | None) -> str:
    """The reasoning of a turn, up to a prefix level."""
    if level is None:
        return turn.reasoning
    return turn.reasoning[: prefix_ends(turn.reasoning, turn.calls, turn.segments)[level]].rstrip()


def _components(encoded: Encoded, texts: Sequence[str], owners: Sequence[Component]) -> np.ndarray:
    """[n] uint8: the component of the text in which each token starts."""
    ends = np.cumsum([len(text) for text in texts])
    kinds = np.array(owners, np.uint8)
    return kinds[np.searchsorted(ends, encoded.start, side="right")]


def _escape(text: str, tokens: re.Pattern[str] | None) -> str:
    """Break every one of these tokens in the text by a zero-width space after its first character."""
    return tokens.sub(lambda m: m.group()[0] + "\u200b" + m.group()[1:], text) if tokens else text


def _end_component(last: int | None) -> Component:
    """Component of an end-of-turn token, from the component before it: it ends a call or completes an answer."""
    return Component.TOOL_CALL if last == Component.TOOL_CALL else Component.ANSWER


def _replace_surrogates(text: str) -> str:
    """Replace unpaired surrogates, which JSON may contain and UTF-8 cannot encode, by question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def make_renderer(model: ModelConfig, tokenizer) -> ChatRenderer:
    """The renderer of a tokenizer, with the tool format of the configuration."""
    with memory_limit(2**30, "the chat template"):
        return ChatRenderer(tokenizer, get_format(model.tool_format), model.chat_template_kwargs)
