"""Text to token ids, with control over which strings may become control tokens."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from pact_fast.errors import PactError

_CACHED_LENGTH = 128  # characters; the ids of shorter texts are cached, since they recur (template text, tool names)


@dataclass(frozen=True)
class Part:
    """A piece of text. Strings that match `controls` become control tokens; the rest is encoded as plain text."""

    text: str
    controls: re.Pattern[str] | None = None


@dataclass(frozen=True)
class Encoded:
    """Token ids, and the characters [start, end) of the joined text that each token covers; all [n] int64."""

    ids: np.ndarray
    start: np.ndarray
    end: np.ndarray


class Encoder:
    """Encodes a sequence of parts as one text, and the text of a turn.

    Text between two control tokens is encoded as a whole, not part by part, so that the ids are those of the tokenizer
    itself, merges across the border of two parts included. Nevertheless, text that came from a tool cannot become a
    control token.

    The text of a turn is what the policy itself could write. It gets the ids of the tokenizer, added tokens included, but
    for the tokens of the conversation's structure.

    control_ids   {content: id} of all control tokens: special tokens, and added tokens that look like tags
    all_controls  pattern that matches any of them; None if there are none

    Args:
        tokenizer: A fast tokenizer of transformers.
        structure: Contents of the tokens that no turn may hold, see `structure.structure_tokens`.

    Raises PactError if the tokenizer has no fast version or makes a control token of plain text.
    """

    def __init__(self, tokenizer, structure: Collection[str] = ()):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise PactError(f"{type(tokenizer).__name__} has no fast version; use a tokenizer with a tokenizer.json")
        self.control_ids: dict[str, int] = {
            token.content: i
            for i, token in tokenizer.added_tokens_decoder.items()
            if token.special or re.fullmatch(r"<.*>|\[.*\]", token.content, re.DOTALL)
        }
        self.all_controls = self.pattern(self.control_ids)
        self._plain = _without(backend, self.control_ids)
        self._turn = _without(backend, structure)
        self._encode_cached = functools.lru_cache(maxsize=1 << 14)(self._encode)
        for content, i in self.control_ids.items():
            if i in self._plain.encode(content, add_special_tokens=False).ids:
                raise PactError(
                    f"the tokenizer makes a control token of the plain text {content!r}; use a BPE tokenizer"
                )

    def pattern(self, contents: Collection[str]) -> re.Pattern[str] | None:
        """A pattern that matches those of `contents` that are control tokens; None if none is."""
        known = sorted((c for c in contents if c in self.control_ids), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, known))) if known else None

    def encode(self, parts: Sequence[Part]) -> Encoded:
        """Ids and character spans of the joined text of `parts`."""
        ids: list[int] = []
        starts: list[int] = []
        ends: list[int] = []
        pending: list[str] = []  # plain text not yet encoded, from character `done` on
        done = position = 0

        def flush() -> None:
            nonlocal done
            text = "".join(pending)
            if text:
                found, offsets = self._encode_cached(text) if len(text) <= _CACHED_LENGTH else self._encode(text)
                ids.extend(found)
                starts.extend([done + start for start, _ in offsets])
                ends.extend([done + end for _, end in offsets])
            pending.clear()
            done += len(text)

        for part in parts:
            last = 0
            for match in part.controls.finditer(part.text) if part.controls else ():
                pending.append(part.text[last : match.start()])
                flush()
                ids.append(self.control_ids[match.group()])
                starts.append(done)
                done = position + match.end()
                ends.append(done)
                last = match.end()
            pending.append(part.text[last:])
            position += len(part.text)
        flush()
        return Encoded(np.array(ids, np.int64), np.array(starts, np.int64), np.array(ends, np.int64))

    def encode_turn(self, text: str) -> Encoded:
        """Ids and character spans of a turn's text."""
        encoding = self._turn.encode(text, add_special_tokens=False)
        spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return Encoded(np.array(encoding.ids, np.int64), spans[:, 0], spans[:, 1])

    def plain(self, text: str) -> list[int]:
        """Ids of a text, all of it plain."""
        return self._plain.encode(text, add_special_tokens=False).ids

    def _encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._plain.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets


def _without(backend: Tokenizer, controls: Collection[str]) -> Tokenizer:
    """A copy of the tokenizer that encodes these added tokens as plain text.

    `encode_special_tokens` does this for special tokens, so exactly these are marked special in the copy. Whether a token
    is special decides nothing else about where a text holds it. The post-processor is removed: it would add tokens and
    shift offsets.
    """
    description = json.loads(backend.to_str())
    for token in description["added_tokens"]:
        token["special"] = token["content"] in controls
    description.update(post_processor=None, truncation=None, padding=None)
    plain = Tokenizer.from_str(json.dumps(description))
    plain.encode_special_tokens = True
    return plain
