"""The blanks that a chat template writes between the parts of a turn, measured by rendering a probe."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from pact_fast.chat.chat_template import PROBE_NAME, PROBE_TOOL, QUESTION, ChatTemplate, call_message
from pact_fast.data.types import Message, ToolCall
from pact_fast.errors import PactError

PROBE_CALL = ToolCall(PROBE_NAME, {"key": "a"})
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


def measured_layout(template: ChatTemplate, written: str, think: tuple[str, str], default: Layout) -> Layout:
    """Find the layout of a template. Parts that it does not show (it may drop reasoning) keep their defaults.

    Args:
        template: The chat template.
        written: PROBE_CALL, as the tool format writes it.
        think: The tags around the reasoning.
        default: The layout of the tool format.
    """
    calls, opening, closing = map(re.escape, (written, *think))
    reasoned = rf"{opening}(?P<in_reasoning>\s*){_REASONING}(?P<end_reasoning>\s*){closing}"
    with_content = _measure(
        template, rf"{reasoned}(?P<after_reasoning>\s*){_CONTENT}(?P<before_calls>\s*){calls}", _CONTENT
    )
    shorter = _measure(template, rf"{_CONTENT}(?P<before_calls>\s*){calls}", _CONTENT)
    without = _measure(template, rf"{reasoned}(?P<reasoning_calls>\s*){calls}", "")
    ended = _measure(template, rf"{calls}(?P<after_calls>\s*)", "")
    measured = {**_before_turn(template, think[0]), **shorter, **with_content, **without, **ended}
    return replace(default, **measured)


def _before_turn(template: ChatTemplate, opening: str) -> dict[str, str]:
    prompt = template.render([QUESTION], [PROBE_TOOL], generate=True)
    text = template.render_call(PROBE_CALL)
    begun = prompt.rstrip().endswith(opening) or not text.startswith(prompt)  # the prompt holds a part of the turn
    return {} if begun else {"before_turn": _leading_blanks(text[len(prompt) :])}


def _leading_blanks(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def _measure(template: ChatTemplate, pattern: str, content: str) -> dict[str, str]:
    # templates read the reasoning from different keys
    keys = dict.fromkeys(("reasoning_content", "reasoning", "thinking"), _REASONING)
    turn: Message = {**call_message(PROBE_CALL), "content": content, **keys}
    try:
        found = re.search(pattern, template.render([QUESTION, turn], [PROBE_TOOL]))
    except PactError:  # some templates take no content beside calls
        return {}
    return found.groupdict() if found else {}
