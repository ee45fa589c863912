"""The blanks that a chat template writes between the parts of a turn, measured by rendering a probe."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pact_fast.chat.chat_template import QUESTION, ChatTemplate, call_message
from pact_fast.data.types import Message, ToolCall
from pact_fast.errors import PactError

if TYPE_CHECKING:
    from pact_fast.chat.formats.base import ToolFormat

_REASONING, _CONTENT = "Zq0Zwhy", "Zq0Zsay"  # words that no template contains or changes


@dataclass(frozen=True)
class Layout:
    """Blanks between the parts of a turn.

    before_turn      before the first part, if the generation prompt does not write it
    in_reasoning     between the opening tag of the reasoning and its text
    end_reasoning    between its text and the closing tag
    after_reasoning  between the closing tag and the content
    reasoning_calls  between the closing tag and the calls, in a turn without content
    before_calls     between content and calls
    after_calls      between the calls and the end of the turn
    """

    before_turn: str = ""
    in_reasoning: str = "\n"
    end_reasoning: str = "\n"
    after_reasoning: str = "\n\n"
    reasoning_calls: str = "\n\n"
    before_calls: str = "\n"
    after_calls: str = ""


def measured_layout(template: ChatTemplate, fmt: ToolFormat) -> Layout:
    """The layout of a template; what it does not show (it may drop reasoning) is as in the format's own layout."""
    call = ToolCall("look_up", {"key": "a"})
    calls = re.escape(fmt.write_calls([call]))
    opening, closing = map(re.escape, fmt.think)
    reasoned = rf"{opening}(?P<in_reasoning>\s*){_REASONING}(?P<end_reasoning>\s*){closing}"
    with_content = _measure(
        template, call, rf"{reasoned}(?P<after_reasoning>\s*){_CONTENT}(?P<before_calls>\s*){calls}", _CONTENT
    )
    shorter = _measure(template, call, rf"{_CONTENT}(?P<before_calls>\s*){calls}", _CONTENT)
    without = _measure(template, call, rf"{reasoned}(?P<reasoning_calls>\s*){calls}", "")
    ended = _measure(template, call, rf"{calls}(?P<after_calls>\s*)", "")
    measured = {**_before_turn(template, call, fmt.think[0]), **shorter, **with_content, **without, **ended}
    return replace(fmt.layout, **measured)


def _before_turn(template: ChatTemplate, call: ToolCall, opening: str) -> dict[str, str]:
    prompt = template.render([QUESTION], generate=True)
    text = template.render([QUESTION, call_message(call)])
    begun = prompt.rstrip().endswith(opening) or not text.startswith(prompt)  # the prompt holds a part of the turn
    return {} if begun else {"before_turn": _leading_blanks(text[len(prompt) :])}


def _leading_blanks(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def _measure(template: ChatTemplate, call: ToolCall, pattern: str, content: str) -> dict[str, str]:
    # templates read the reasoning from different keys
    keys = dict.fromkeys(("reasoning_content", "reasoning", "thinking"), _REASONING)
    turn: Message = {**call_message(call), "content": content, **keys}
    try:
        found = re.search(pattern, template.render([QUESTION, turn]))
    except PactError:  # some templates take no content beside calls
        return {}
    return found.groupdict() if found else {}
