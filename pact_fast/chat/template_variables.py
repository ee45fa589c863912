"""`model.chat_template_kwargs`: variables of chat templates, checked against the variables that a template reads."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from pact_fast.errors import PactError
from pact_fast.registry import did_you_mean
from pact_fast.text import short

# Variables that the conversation itself defines, and arguments of transformers' apply_chat_template.
RESERVED = frozenset({
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message",
    "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs",
})  # fmt: skip
CLOCK = "strftime_now"  # a function that transformers gives to templates
_CLOCK_CALL = re.compile(rf"""{CLOCK}\s*\(\s*(["'])(.*?)\1\s*\)""")
_WORD = re.compile(r"[^\W\d]\w*")


def template_variables(given: Mapping[str, Any], sources: Collection[str]) -> dict[str, Any]:
    """The variables that a template gets: without `strftime_now`, a date for `fix_date`.

    Args:
        given: `model.chat_template_kwargs`.
        sources: Jinja texts of the tokenizer's templates.

    Raises:
        PactError: A name is reserved, or stands in none of the templates, so that it would silently do nothing.
    """
    for name in given:
        if name in RESERVED:
            raise PactError(f"model.chat_template_kwargs: '{name}' cannot be set; it is part of the conversation")
    words = {word for source in sources for word in _WORD.findall(source)}
    for name in given:
        if name not in words:
            hint = did_you_mean(name, sorted(words))
            raise PactError(
                f"model.chat_template_kwargs: the chat template has no variable '{name}'{hint}; remove it, or set "
                "model.chat_template to a template that has it"
            )
    return {name: value for name, value in given.items() if name != CLOCK}


def fix_date(source: str, date: object) -> str:
    """Replace the calls of `strftime_now` in a template by their results on this date.

    transformers passes text and numbers to templates, not functions, so the clock itself cannot be replaced.

    Raises:
        PactError: `date` is none, or the template calls the clock with something else than a text.
    """
    try:
        day = datetime.datetime.fromisoformat(str(date))
    except ValueError:
        raise PactError(
            f"model.chat_template_kwargs: strftime_now is {short(date)}; write a date, as in {{strftime_now: 2025-06-30}}"
        ) from None
    fixed = _CLOCK_CALL.sub(lambda call: json.dumps(day.strftime(call[2])), source)
    if re.search(rf"{CLOCK}\s*\(", fixed):
        raise PactError(
            "model.chat_template_kwargs: the chat template calls strftime_now in a way that cannot be fixed; write the "
            "date into a copy of the template (model.chat_template)"
        )
    return fixed
