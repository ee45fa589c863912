"""Checks a task against its rendered prompt, its tools and the length limits, before it is trained on.

Tokens are counted only where they could matter: a token covers at least one byte, so a text of fewer bytes than the limit
fits. Longer texts are first counted word by word, with a cache, since words recur; words never have fewer tokens alone than
in their text. Only a text that is then still too long is tokenised as a whole.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pact_fast.chat.chat_template import PROBE_TOOL, Pattern, call_message
from pact_fast.chat.formats.base import END_THINK, THINK
from pact_fast.chat.rendering import ChatRenderer, question_of
from pact_fast.chat.tool_schema import call_error
from pact_fast.data.types import ExpertTrace, ExpertTurn, Message, Task, ToolCall, split_reasoning, text_of
from pact_fast.errors import DataError, PactError

_MARK = "Zq0Zrow"  # a word that no template contains or changes
_MAX_WORDS = 1 << 20  # held in memory
_EXTRA = f"{THINK}\n\n{END_THINK}\n\n<|end of turn|>"  # template text of a turn beside its content


@dataclass(frozen=True)
class RowLimits:
    """Limits of a row, in tokens.

    prompt      longest prompt (rollout.max_prompt_length)
    window      context length of the model; None: unknown, nothing is checked
    completion  longest rollout that follows prompt and trace; 0: none does
    trace       how the algorithm shows expert traces; None: not at all
    required    every row needs an expert trace
    """

    prompt: int
    window: int | None = None
    completion: int = 0
    trace: Literal["demonstration", "turns", "hint"] | None = None
    required: bool = False


class RowCheck:
    """Checks tasks one by one: `check(task)` raises a DataError that names task, file, line, field and cure.

    longest        the task with the longest prompt so far, in bytes
    longest_trace  the task with the longest prompt and trace so far
    traces         tasks with an expert trace so far
    """

    def __init__(self, renderer: ChatRenderer, limits: RowLimits):
        self._renderer, self._limits = renderer, limits
        self._words, self._plain_words = _WordCounts(renderer), _WordCounts(renderer, plain=True)
        self._hidden = functools.lru_cache(maxsize=1024)(self._find_hidden)
        opening, closing = map(re.escape, renderer.format.think)
        closed = re.search(rf"{opening}\s*{closing}\s*\Z", renderer.template.generation_prompt)
        self._reasoning_closed = closed is not None
        self.longest: tuple[int, Task] | None = None
        self.longest_trace: tuple[int, Task] | None = None
        self.traces = 0

    def check(self, task: Task) -> None:
        """DataError if the task cannot be trained on."""
        try:
            text = self._render(task)
            self._check_contents(task.prompt, text, bool(task.tools))
            size = len(text.encode("utf-8", "replace"))
            self._check_prompt(task, text, size)
            self._check_trace(task, text, size)
        except DataError as error:
            raise with_place(task, error) from None

    def _render(self, task: Task) -> str:
        template = self._renderer.template
        try:
            text = template.render(task.prompt, task.tools, generate=True)
        except PactError as error:
            raise DataError(str(error), field="prompt") from None
        if not text.endswith(
            template.generation_prompt
        ):  # for instance that of another template, for rows without tools
            raise DataError(
                f"the chat template ends its prompt with {text[-20:]!r}, and that of other prompts with "
                f"{template.generation_prompt[-20:]!r}; set model.chat_template to one that ends all "
                "prompts in the same way",
                field="prompt",
            )
        return text

    def tokens(self, task: Task) -> tuple[int, int]:
        """(tokens of the prompt, tokens that the expert trace adds to it)."""
        prompt = len(self._renderer.prompt_ids(task.prompt, task.tools))
        return prompt, self._trace_tokens(task, task.expert, prompt) if task.expert and task.expert.turns else 0

    def _check_contents(self, messages: list[Message], text: str, with_tools: bool) -> None:
        """Every message's content must stand in the prompt."""
        pattern = tuple((m["role"], bool(text_of(m.get("content")).strip()), "tool_calls" in m) for m in messages)
        hidden = self._hidden(pattern, with_tools)
        for index, message in enumerate(messages):
            content = text_of(message.get("content"))
            if message["role"] == "assistant":
                content = split_reasoning(message)[1]
            if index == hidden or not _stands_in(content.strip(), text):
                raise DataError(
                    f"message {index}: the chat template does not show the content of this '{message['role']}' message; set "
                    "model.chat_template to one that does, or give the text to another role",
                    field="prompt",
                )
            for call in message.get("tool_calls", ()):
                if call["function"]["name"] not in text:
                    raise DataError(
                        f"message {index}: the chat template does not show its tool calls; set model.chat_template to one "
                        "that does",
                        field="prompt",
                    )

    def _find_hidden(self, pattern: tuple[tuple[str, bool, bool], ...], with_tools: bool) -> int | None:
        """The first message that the template does not show in a conversation of these (role, has text, has calls)."""
        messages: list[Message] = []
        for index, (role, has_text, has_calls) in enumerate(pattern):
            message = call_message(ToolCall("f", {"x": "y"})) if has_calls else {"role": role}
            messages.append({**message, "content": f"{_MARK}{index}x" if has_text else ""})
        try:
            text = self._renderer.template.render(messages, [PROBE_TOOL] if with_tools else [], generate=True)
        except PactError:  # the template asks for more than this conversation has; the row itself was rendered
            return None
        return next((i for i, (_, has_text, _) in enumerate(pattern) if has_text and f"{_MARK}{i}x" not in text), None)

    def _check_prompt(self, task: Task, text: str, size: int) -> None:
        if self.longest is None or size > self.longest[0]:
            self.longest = size, task
        limit = self._limits.prompt
        if size <= limit or self._count_words(text) <= limit:
            return
        count = self._count(text)
        if count > limit:
            raise DataError(
                f"the prompt has {count:,} tokens, more than rollout.max_prompt_length={limit}; raise it or drop the row",
                field="prompt",
            )

    def _check_trace(self, task: Task, text: str, prompt_size: int) -> None:
        trace, limits = task.expert, self._limits
        if trace is None or not trace.turns:
            if limits.required:
                raise DataError(
                    "SFT needs an expert trace in every row; drop the row or add one",
                    field="expert_trace",
                )
            return
        self.traces += 1
        if task.tools:
            for turn in trace.turns:
                _check_calls(turn, task)
        if limits.trace is None:
            return
        if self._reasoning_closed and any(turn.reasoning for turn in trace.turns):
            raise DataError(
                f"the expert reasons, but the chat template's generation prompt has closed {THINK} already, so that the "
                "reasoning would be in a second block; set model.chat_template to one that leaves it open, or remove "
                "the reasoning",
                field="expert_trace",
            )
        size = prompt_size + self._trace_bytes(task, trace)
        if self.longest_trace is None or size > self.longest_trace[0]:
            self.longest_trace = size, task
        room = (limits.window or 0) - limits.completion
        if limits.window is None or size <= room:
            return
        if limits.trace != "hint" and self._count_words(text) + self._count_trace(task, trace) <= room:
            return
        prompt = len(self._renderer.prompt_ids(task.prompt, task.tools))
        added = self._trace_tokens(task, trace, prompt)
        total = prompt + added + limits.completion
        if total > limits.window:
            rollout = (
                f" and {limits.completion:,} of the rollout (rollout.max_completion_length)"
                if limits.completion
                else ""
            )
            raise DataError(
                f"{prompt:,} tokens of the prompt, {added:,} of the expert trace{rollout} are {total:,}, more than the "
                f"model's window of {limits.window:,}; shorten the trace or the rollout, or drop the row",
                field="expert_trace",
            )

    def _trace_tokens(self, task: Task, trace: ExpertTrace, prompt: int) -> int:
        """Tokens that the trace adds to the prompt in the longest context that is trained."""
        rendering = self._limits.trace or "turns"
        turns = self._renderer.trace_context(task, trace, "turns" if rendering == "hint" else rendering).longest
        if rendering != "hint":
            return turns
        # the turns are a branch for SFT alone; rollouts follow the hint
        hint = len(self._renderer.hint_prompt_ids(task, trace)) - prompt
        return max(turns - self._limits.completion, hint)

    def _trace_bytes(self, task: Task, trace: ExpertTrace) -> int:
        """An upper bound of `_trace_tokens`, without encoding."""
        return sum(len(text.encode("utf-8", "replace")) for text in self._trace_texts(task, trace))

    def _count_trace(self, task: Task, trace: ExpertTrace) -> int:
        """A closer upper bound of `_trace_tokens`: tokens, word by word."""
        # control strings in a result are text
        return sum(self._plain_words.count(text) for text in self._trace_texts(task, trace))

    def _trace_texts(self, task: Task, trace: ExpertTrace) -> Iterator[str]:
        """Texts that together are at least as long as the trace's rendering."""
        yield question_of(task)
        yield self._bridge(1, user=True)
        for turn in trace.turns:
            yield from (text for text, _ in self._renderer.format.pieces(turn.reasoning, turn.content, turn.calls))
            # results may be written as JSON strings, which are longer, and names may stand beside them
            yield from (json.dumps(text, ensure_ascii=False) for text in turn.observations)
            yield from (f"{call.name} {call.name}" for call in turn.calls)
            if turn.user is not None:
                yield json.dumps(turn.user, ensure_ascii=False)
            yield self._bridge(len(turn.calls), user=turn.user is not None) + _EXTRA

    def _bridge(self, calls: int, user: bool = False) -> str:
        """The template's text around the results of `calls` calls, and around a message of the user."""
        pattern: Pattern = (("tool", "f"),) * calls + ((("user", ""),) if user else ())
        return "".join(self._renderer.template.skeleton(pattern, self._renderer.ends))

    def _count(self, text: str) -> int:
        return len(self._renderer.template_ids(text))

    def _count_words(self, text: str) -> int:
        return self._words.count(text)


class _WordCounts(dict[str, int]):
    """{word: its tokens}. Words are split as byte-level BPE tokenizers do it, or finer.

    A control string is a word of one token; with `plain`, it is text.
    """

    def __init__(self, renderer: ChatRenderer, plain: bool = False):
        self._encoder = renderer.encoder
        controls = None if plain else renderer.encoder.all_controls
        self._controls = controls
        words = r"[^\w\r\n]?[^\W\d_]+|\d+| ?(?:[^\w\s]|_)+[\r\n]*|\s+"
        self._split = re.compile(f"{controls.pattern}|{words}" if controls else words).findall

    def count(self, text: str) -> int:
        """At least the tokens of the text."""
        if len(self) > _MAX_WORDS:
            self.clear()
        return sum(map(self.__getitem__, self._split(text)))

    def __missing__(self, word: str) -> int:
        control = self._controls and self._controls.fullmatch(word)
        count = self[word] = 1 if control else len(self._encoder.plain(word))
        return count


def _check_calls(turn: ExpertTurn, task: Task) -> None:
    """DataError if a call does not fit its tool's schema, though its result is no error message."""
    for call, observation in zip(turn.calls, turn.observations, strict=True):
        reason = call_error(call, task.tools)
        if reason and "error" not in observation[:200].lower():
            raise DataError(
                f"the expert's call does not fit the tool's schema: {reason}; correct the call or the schema",
                field="expert_trace",
            )


def _stands_in(content: str, text: str) -> bool:
    """Whether the content stands in the text, as it is or with its characters escaped by JSON."""
    return content in text or any(written in text for written in _written(content))


def _written(content: str) -> Iterator[str]:
    yield json.dumps(content, ensure_ascii=False)[1:-1]
    yield json.dumps(content)[1:-1]
    yield "\n".join(line.strip() for line in content.splitlines())


def with_place(task: Task, error: PactError) -> DataError:
    """The error with the task's id, file and line."""
    file, line = task.source or ("", None)
    problem, field = (error.problem, error.field) if isinstance(error, DataError) else (str(error), "")
    name = f"task {task.id}: "
    return DataError(name + problem.removeprefix(name), file=file, line=line, field=field)
