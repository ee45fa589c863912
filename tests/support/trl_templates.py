"""The tool-calling chat templates that trl ships, each with a small tokenizer that has its special tokens."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from pact_fast.chat.rendering import ChatRenderer
from tests.support.chat_tokenizers import build, template

# Tokens as templates write them: <|im_end|>, <|channel>, <channel|>, <|"|>, <｜User｜>, [gMASK], <sop>.
_TOKEN = re.compile(r'<\|"\|>|<\|\w+\|>|<\|\w+>|<\w+\|>|<｜[\w▁]+｜>|\[gMASK\]|<sop>')
_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<arg_key>",
         "</arg_key>", "<arg_value>", "</arg_value>")  # fmt: skip


@functools.cache
def tokenizer_for(name: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE with this template, its special tokens and its tags."""
    source = template(name)
    special = ("<|endoftext|>", "<bos>", *dict.fromkeys(_TOKEN.findall(source)))
    tags = tuple(tag for tag in _TAGS if tag in source)
    tokenizer = build(source, tuple(dict.fromkeys(special)), tags, "<|endoftext|>")
    tokenizer.bos_token = "<bos>"
    return tokenizer


def tool_calling() -> list[str]:
    """Names of the templates that handle calls or results."""
    folder = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "chat_templates"
    names = [path.stem for path in sorted(folder.glob("*.jinja")) if "tool" in path.read_text(encoding="utf-8")]
    return [name for name in names if "r1_distill" not in name]  # takes tools, and never shows a call


def comparable(renderer: ChatRenderer, text: str) -> str:
    """The text without empty reasoning blocks, which templates add and remove."""
    opening, closing = map(re.escape, renderer.format.think)
    return re.sub(rf"{opening}\s*{closing}\s*", "", text)
