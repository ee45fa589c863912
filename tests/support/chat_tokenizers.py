"""Small byte-level BPE tokenizers with the real chat templates of well-known models (from trl's package data)."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pact_fast.chat.templates import CHATML_HERMES

# The shape of the pre-tokenizers of Qwen and Llama 3: punctuation takes the newlines after it, so merges cross the
# borders between template and content.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
LLAMA3 = (
    "<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
    "<|python_tag|>",
)  # fmt: skip
CORPUS = [
    'system\nuser\nassistant\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n',
    '{"name": "look_up", "parameters": {"key": "value"}}; {"error": "unknown tool"}.\n\n',
    "I need the weather. Then I answer.\n",
    "The quick brown fox jumps over the lazy dog. Ünïcödé 中文 text, 3.14 and so on!\n\n- item\n- item\n",
] * 20


def template(name: str) -> str:
    """A chat template that trl ships."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("install trl for its chat templates")
    return (Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@functools.cache
def trained(special: tuple[str, ...], tags: tuple[str, ...], composes: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False, min_frequency=1)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in tags])
    return tokenizer


def build(
    chat_template: str | None, special: tuple[str, ...], tags: tuple[str, ...], eos: str, composes: bool = False
) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=trained(special, tags, composes),
        eos_token=eos,
        pad_token=special[0],
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


@functools.cache
def qwen3_like(name: str = "qwen3") -> PreTrainedTokenizerFast:
    """Special tokens, tags and normaliser of Qwen; `name` is one of trl's templates."""
    return build(template(name), CHATML, TAGS, "<|im_end|>", composes=True)


@functools.cache
def llama3_like(name: str = "llama3_1") -> PreTrainedTokenizerFast:
    """Special tokens of Llama 3; tags such as <think> are ordinary text to it."""
    tokenizer = build(template(name), LLAMA3, (), "<|eot_id|>")
    tokenizer.bos_token = "<|begin_of_text|>"
    return tokenizer


def chatml_like(chat_template: str = CHATML_HERMES) -> PreTrainedTokenizerFast:
    """Our own template, or any other text as template, on Qwen's tokens."""
    return build(chat_template, CHATML, TAGS, "<|im_end|>")
