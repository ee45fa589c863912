"""`model.chat_template_kwargs`: variables of chat templates, checked against what a template reads."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from pact_fast.errors import PactError
from pact_fast.registry import did_you_mean

# What a conversation itself gives to a template, and arguments of transformers' apply_chat_template.
RESERVED = frozenset({
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message",
    "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "tokenizer_kwargs", "strftime_now",
})  # fmt: skip
_WORD = re.compile(r"[^\W\d]\w*")


def check_variables(variables: Mapping[str, Any], sources: Collection[str]) -> None:
    """A variable that no template reads would silently do nothing.

    Args:
        variables: By name.
        sources: Jinja texts of the tokenizer's templates.

    Raises:
        PactError: A name is reserved, or stands in none of the templates.
    """
    for name in variables:
        if name in RESERVED:
            raise PactError(f"model.chat_template_kwargs: '{name}' cannot be set; it is part of the conversation")
    words = {word for source in sources for word in _WORD.findall(source)}
    for name in variables:
        if name not in words:
            hint = did_you_mean(name, sorted(words))
            raise PactError(
                f"model.chat_template_kwargs: the chat template has no variable '{name}'{hint}; remove it, or set "
                "model.chat_template to a template that has it"
            )
