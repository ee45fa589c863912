"""Small byte-level BPE tokenizers with the real chat templates of well-known models (from trl's package data)."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pact_fast.data.templates import CHATML_HERMES

# The shape of the pre-tokenizers of Qwen and Llama 3: punctuation takes the newlines after it, so merges cross the borders
# between template and content.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TAGS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
CORPUS = [
    'system\nuser\nassistant\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n',
    '{"name": "look_up", "parameters": {"key": "value"}}; {"error": "unknown tool"}.\n\nI need the weather. Then I answer.\n',
    "The quick brown fox jumps over the lazy dog. Ünïcödé 中文 text, 3.14 and so on!\n\n- item\n- item\n",
] * 20  # fmt: skip


def template(name: str) -> str:
    """A chat template that trl ships."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("install trl for its chat templates")
    return (Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def build(chat_template: str, special: list[str], tags: list[str], eos: str, normalizer=None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=1
        ),
    )
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos,
        pad_token=special[0],
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


@functools.cache
def qwen3_like(name: str = "qwen3") -> PreTrainedTokenizerFast:
    """Special tokens, tags and normaliser of Qwen; `name` is one of trl's templates."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return build(template(name), special, TAGS, "<|im_end|>", normalizers.NFC())


@functools.cache
def llama3_like(name: str = "llama3_1") -> PreTrainedTokenizerFast:
    """Special tokens of Llama 3; tags such as <think> are ordinary text to it."""
    special = ["<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"]
    tokenizer = build(template(name), [*special, "<|python_tag|>"], [], "<|eot_id|>")
    tokenizer.bos_token = "<|begin_of_text|>"
    return tokenizer


@functools.cache
def chatml_like(chat_template: str = CHATML_HERMES) -> PreTrainedTokenizerFast:
    """Our own template, or any other text as template, on Qwen's tokens."""
    return build(chat_template, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], TAGS, "<|im_end|>")
