"""The tokenizer of a run: loaded, or, for a model with random weights, a byte-level BPE trained on the tasks' text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pact_fast.chat.formats.hermes import Hermes
from pact_fast.chat.templates import CHATML_HERMES, SHIPPED
from pact_fast.config import ModelConfig
from pact_fast.data.sources import TaskSource
from pact_fast.data.types import Task, text_of
from pact_fast.errors import PactError
from pact_fast.model.build import from_pretrained

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
# Pre-tokens: words with their leading space, runs of punctuation, and "@" alone. Words of a list are then adjacent
# tokens, and a handle such as @ada always follows the same token, both of which make copying easy to learn; JSON syntax
# takes few tokens.
PRETOKEN_PATTERN = r" ?[\p{L}_]+|@|\n+|[^\p{L}_@]+?(?= ?[\p{L}_@]|$)"

TRAINING_TASKS = 1000  # number of tasks whose text a new tokenizer is trained on


def make_tokenizer(model: ModelConfig, tasks: TaskSource, saved: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a run.

    Args:
        model: Where to load it from, and its chat template.
        tasks: The tasks to train a new tokenizer on, for a model with random weights and no `tokenizer`.
        saved: The folder in which a run keeps its tokenizer. If it exists, it takes precedence over all settings.

    Raises:
        PactError: The tokenizer or the chat template cannot be read.
    """
    source = model.tokenizer or model.path
    if saved and saved.is_dir():
        return from_pretrained(AutoTokenizer, str(saved), "tokenizer")
    if source is None:
        assert model.random_init is not None
        size = int(model.random_init.get("vocab_size", 512))
        return train_tokenizer(tasks.train(0, TRAINING_TASKS), size)
    return with_template(from_pretrained(AutoTokenizer, source, "tokenizer"), model)


def with_template(tokenizer: PreTrainedTokenizerBase, model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, with `model.chat_template` in place of its own if that is set."""
    if model.chat_template:
        tokenizer.chat_template = _read_template(model.chat_template)
    return tokenizer


def train_tokenizer(tasks: Iterable[Task], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a BPE tokenizer of at most `vocab_size` tokens on tasks; its template is ChatML with Hermes tool calls."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKEN_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(MARKERS),
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_texts(tasks), trainer)
    # as in Qwen's tokenizers, markers are single tokens that are not special: the policy writes them, and decoding
    # keeps them
    tokenizer.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in MARKERS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML_HERMES,
        clean_up_tokenization_spaces=False,
    )


def _training_texts(tasks: Iterable[Task]) -> Iterator[str]:
    hermes = Hermes()
    for task in tasks:
        yield "\n".join(json.dumps(tool) for tool in task.tools)
        yield from (f"{m['role']}\n{text_of(m.get('content'))}" for m in task.prompt)
        for turn in task.expert.turns if task.expert else ():
            yield "assistant\n"
            # markers are tokens by themselves, so merges are learned on the text between them
            yield from re.split("|".join(MARKERS), hermes.render(turn.reasoning, turn.content, turn.calls))
            yield from (f"\n{text}\n" for text in turn.observations)
            if turn.user is not None:
                yield f"user\n{turn.user}"
        if task.expert and task.expert.answer:
            yield task.expert.answer


def _read_template(name: str) -> str:
    """The text of a file, or of a shipped template if no file has that name."""
    path = Path(name)
    if not path.exists():
        path = SHIPPED.get(name, path)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise PactError(
            f"model.chat_template: cannot read '{name}': {reason}; name a Jinja file, or a shipped template: "
            f"{', '.join(sorted(SHIPPED))}"
        ) from None
