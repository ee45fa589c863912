"""Rewriting of earlier turns by chat templates: most drop their reasoning when the user speaks again.

Under such a template, the next prompt is not the sampled sequence plus the new message. The history is rebuilt: the prompt,
every earlier turn with its sampled ids but without its reasoning, and the text between turns. The text that the template
writes in place of the reasoning (nothing, or an empty block) is found by rendering probes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pact_fast.chat.call_ids import with_call_ids
from pact_fast.chat.chat_template import PROBE_NAME, PROBE_TOOL, QUESTION, ChatTemplate, call_message
from pact_fast.chat.encoding import Encoder
from pact_fast.chat.formats.base import ToolFormat
from pact_fast.chat.formats.layout import PROBE_CALL
from pact_fast.chat.token_bytes import TokenBytes
from pact_fast.components import Component
from pact_fast.data.types import Message
from pact_fast.errors import PactError

_REASONING, _SAID, _MARK = "Zq0Zwhy", "Zq0Zsay", "Zq0Zmark"  # words that no template contains or changes
_RESULT: Message = {"role": "tool", "name": PROBE_NAME, "content": "7"}
CURES = (
    "set model.chat_template to a copy that keeps it (TRL's *_training.jinja), or, in model.chat_template_kwargs, the "
    "template's own switch for it or {enable_thinking: false} (docs/conversations.md)"
)


@dataclass(frozen=True)
class LabelledTokens:
    """Tokens of a sequence: ids int64 [n], components uint8 [n], turn_ids int16 [n] (see Trajectory)."""

    ids: np.ndarray
    components: np.ndarray
    turn_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice | np.ndarray) -> LabelledTokens:
        return LabelledTokens(self.ids[part], self.components[part], self.turn_ids[part])


class Renderer(Protocol):
    """The part of ChatRenderer that History needs."""

    template: ChatTemplate
    format: ToolFormat
    encoder: Encoder
    token_bytes: TokenBytes
    ends: tuple[str, str]
    eot_ids: tuple[int, ...]

    def template_ids(self, text: str) -> np.ndarray: ...


class History:
    """Rewrites the past of a conversation as the template of a renderer does.

    drops_reasoning       the template drops the reasoning of earlier turns once the user speaks again
    keeps_until_answered  it keeps that of turns with calls until an answer has followed them
    ends                  the tokens that end an earlier answer, and a turn with calls
    """

    def __init__(self, renderer: Renderer):
        self._renderer = renderer
        self._opening = functools.cache(self._find_opening)

    @functools.cached_property
    def drops_reasoning(self) -> bool:
        """Probed with turns of answers and calls. Where the generation prompt closes the reasoning
        (`enable_thinking: false`), turns have none to drop."""
        if self._renderer.template.generation_prompt.rstrip().endswith(self._renderer.format.think[1]):
            return False
        answer = _turn("It is him.", False)
        for shown in ([QUESTION, _turn("", True), _RESULT], [QUESTION, answer]):
            rest = [QUESTION] if shown[-1] is answer else [answer, QUESTION]
            before = self._render(shown, generate=shown[-1] is not answer)
            if _REASONING in before and _REASONING not in self._render([*shown, *rest]):
                return True
        return False

    @functools.cached_property
    def keeps_until_answered(self) -> bool:
        """gpt-oss: a user who speaks right behind the results of calls does not make the template drop anything."""
        return _REASONING in self._render([QUESTION, _turn("", True), _RESULT, QUESTION])

    def rewrites(self, replied: bool) -> bool:
        """Whether a message of the user changes earlier turns, so that `continuation` has to rebuild them.

        `replied`: True if the user replies to a turn, False if results of its calls come between.
        """
        return self.drops_reasoning and (replied or not self.keeps_until_answered)

    @functools.cached_property
    def ends(self) -> tuple[str, str]:
        """The end of an answer that the user replies to may differ from that of the last one (gpt-oss)."""
        eot, call_eot = self._renderer.ends
        if not self.drops_reasoning:
            return eot, call_eot
        after = self._render([QUESTION, _turn(_SAID, False), QUESTION]).rpartition(_SAID)[2]
        controls = self._renderer.encoder.all_controls
        found = controls.match(after) if controls else None
        return (found.group() if found else eot), call_eot

    def continuation(
        self, pieces: Sequence[LabelledTokens], said: LabelledTokens, replied: bool = True
    ) -> tuple[int, LabelledTokens]:
        """Rebuild the sequence after a user's message that `rewrites` the past.

        Less than pieces[0] is kept if the template leaves out the text that the generation prompt opened for the turn.

        Args:
            pieces: The sequence so far: the tokens at the last rewrite, then alternately a turn and the text after it
                (the last turn has none).
            said: The user's message as rendered by `bridge_tokens`, after the results of the last turn's calls, if any.
            replied: True if the user replies to the last turn, False if results of calls come between.

        Returns:
            (number of tokens of the sequence that are kept, the tokens that follow them)
        """
        before, *rest = pieces
        new: list[LabelledTokens] = [] if rest else [before]
        for number, turn in enumerate(rest[::2]):
            cut, shown = self._past_turn(before, turn, after_result=number > 0, last=replied and turn is rest[-1])
            new += [before[: len(before) - cut], shown]
            before = rest[2 * number + 1] if turn is not rest[-1] else before
        old, whole = concatenate(pieces), concatenate([*new, said])
        same = min(len(old), len(whole))
        differs = np.flatnonzero(old.ids[:same] != whole.ids[:same])
        keep = int(differs[0]) if len(differs) else same
        return keep, whole[keep:]

    def asked(self, prompt_ids: np.ndarray, ids: np.ndarray, components: np.ndarray) -> np.ndarray:
        """[n] int64: a prompt and a turn after it, as they stand once the user has replied to the turn."""
        if not self.drops_reasoning:
            return np.concatenate([prompt_ids, ids])
        turn = LabelledTokens(ids, components, np.zeros(len(ids), np.int16))
        cut, shown = self._past_turn(labelled_prompt(prompt_ids), turn, after_result=False, last=True)
        return np.concatenate([prompt_ids[: len(prompt_ids) - cut], shown.ids])

    def _past_turn(
        self, before: LabelledTokens, turn: LabelledTokens, after_result: bool, last: bool
    ) -> tuple[int, LabelledTokens]:
        """(tokens at the end of `before` that are replaced, the turn without its reasoning).

        Args:
            before: Ends with the generation prompt.
            turn: As sampled, with the token that ends it, if there was one.
            after_result: `before` ends with the result of a call.
            last: The user replies to the turn.
        """
        renderer = self._renderer
        offsets = renderer.token_bytes.offsets(turn.ids)
        start = self._visible_from(turn, offsets)
        first = int(np.searchsorted(offsets[:-1], start, side="left"))
        visible = turn[first:]
        visible = visible[visible.components != Component.REASONING]  # gpt-oss may reason between its messages
        called = bool((visible.components[:1] == Component.TOOL_CALL).any())
        drop, add = self._opening(called, after_result, self._reasoned(turn))
        cut, left = self._cut(before, drop)
        parts = [self._like(turn, renderer.template_ids(left + add), Component.TEMPLATE)]
        # a token that begins in the reasoning and reaches beyond it
        split = renderer.token_bytes.join(turn.ids[:first])[start:].decode("utf-8", "replace")
        parts.append(self._like(turn, np.array(renderer.encoder.plain(split), np.int64), Component.ANSWER))
        end = renderer.encoder.control_ids[self.ends[0]]
        if last and len(visible) and int(visible.ids[-1]) in renderer.eot_ids and int(visible.ids[-1]) != end:
            visible = concatenate([visible[:-1], self._like(turn, np.array([end]), Component.TEMPLATE)])
        return cut, concatenate([*parts, visible])

    def _visible_from(self, turn: LabelledTokens, offsets: np.ndarray) -> int:
        """Byte offset of the text after a turn's reasoning and the line breaks that follow it."""
        n = len(turn) - (len(turn) > 0 and int(turn.ids[-1]) in self._renderer.eot_ids)
        others = np.flatnonzero(turn.components[:n] != Component.REASONING)
        start = int(offsets[others[0] if len(others) else n])
        data = self._renderer.token_bytes.join(turn.ids[:n])[start:]
        return start + len(data) - len(data.lstrip(b"\n"))

    def _cut(self, before: LabelledTokens, drop: str) -> tuple[int, str]:
        """(tokens that hold the last characters `drop` of `before`, text of these tokens that is not dropped)."""
        if not drop:
            return 0, ""
        missing, size, count = len(drop.encode()), 0, 0
        while size < missing and count < len(before):
            count += 1
            size = len(self._renderer.token_bytes.join(before.ids[len(before) - count :]))
        text = self._renderer.token_bytes.join(before.ids[len(before) - count :])
        return count, text[: size - missing].decode("utf-8", "replace")

    def _like(self, turn: LabelledTokens, ids: np.ndarray, component: Component) -> LabelledTokens:
        number = turn.turn_ids[0] if len(turn) else 0
        return LabelledTokens(ids, np.full(len(ids), component, np.uint8), np.full(len(ids), number, np.int16))

    def _reasoned(self, turn: LabelledTokens) -> bool:
        """Whether a turn holds reasoning, not only its tags."""
        text = self._renderer.token_bytes.join(turn.ids[turn.components == Component.REASONING]).decode(
            "utf-8", "replace"
        )
        for tag in self._renderer.format.think:
            text = text.replace(tag, "")
        return bool(text.strip())

    def _find_opening(self, called: bool, after_result: bool, reasoned: bool) -> tuple[str, str]:
        """Find the text that the template writes between the previous message and the visible part of an earlier turn.

        Args:
            called: The turn begins with a call (else with text).
            after_result: The turn follows the result of a call (else a user's message).
            reasoned: The turn held reasoning. Without it, some templates write other whitespace after the empty block.

        Returns:
            (end of the text before the turn, generation prompt included, that the template omits; its replacement)
        """
        marked: Message = {**(_RESULT if after_result else QUESTION), "content": _MARK}
        earlier = [QUESTION, _turn("", True), marked] if after_result else [marked]
        turn = [_turn("", True), _RESULT, _turn("Hm.", False)] if called else [_turn(_SAID, False)]
        (visible, _), *_ = self._renderer.format.pieces("", "" if called else _SAID, [PROBE_CALL] if called else [])
        if not reasoned:
            turn = _unreasoned(turn)
        whole = self._render([*earlier, *turn, QUESTION])
        asked, past = (text.partition(_MARK)[2] for text in (self._render(earlier), whole))
        at = past.find(visible.strip("\n"))
        if at < 0 or _REASONING in whole:
            raise PactError(
                "the chat template drops the reasoning of earlier turns once the user speaks again, and changes more than "
                f"that, so a dialogue with a user cannot be rendered; {CURES}"
            )
        written = past[:at]
        common = next((i for i, (a, b) in enumerate(zip(asked, written, strict=False)) if a != b), min(len(asked), at))
        return asked[common:], written[common:]

    def _render(self, messages: Sequence[Message], generate: bool = True) -> str:
        return self._renderer.template.render(with_call_ids(messages), [PROBE_TOOL], generate=generate)


def _turn(text: str, called: bool) -> Message:
    message = call_message(PROBE_CALL) if called else {"role": "assistant", "content": text}
    # templates read the reasoning from different keys
    return {**message, **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), _REASONING)}


def _unreasoned(messages: Sequence[Message]) -> list[Message]:
    keys = ("role", "content", "tool_calls", "name")
    return [{key: message[key] for key in keys if key in message} for message in messages]


def labelled_prompt(ids: np.ndarray) -> LabelledTokens:
    """Tokens of a prompt."""
    return LabelledTokens(ids, np.full(len(ids), Component.TEMPLATE, np.uint8), np.zeros(len(ids), np.int16))


def concatenate(parts: Sequence[LabelledTokens]) -> LabelledTokens:
    """The parts as one."""
    columns = zip(*((part.ids, part.components, part.turn_ids) for part in parts), strict=True)
    return LabelledTokens(*(np.concatenate(column) for column in columns))
