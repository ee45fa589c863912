"""The bytes of every token id, so that token arrays become text and components without the tokenizer's decoder."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from pact_fast.errors import PactError

# Embedding matrices are often padded beyond the vocabulary. A policy can sample such an id; it has no text.
_PADDING = 1024
_SAMPLE = 'Zoë paid 3.50 € for "naïve" 中文, жук and 🙂.\n\t{}'


class TokenBytes:
    """Bytes per token id, for byte-level BPE (GPT-2's byte alphabet) and sentencepiece-style vocabularies.

    table    list[bytes], one entry per id; added tokens give their content as UTF-8, ids without a token b""
    lengths  [len(table)] int64

    Raises PactError if the table does not reproduce the tokenizer's own decoding.
    """

    def __init__(self, tokenizer):
        added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
        vocabulary = {i: token for token, i in tokenizer.get_vocab().items() if i not in added}
        to_bytes = _byte_level if _is_byte_level(vocabulary.values()) else _sentencepiece
        size = max([*vocabulary, *added]) + 1
        self.table: list[bytes] = [b""] * (-(-size // _PADDING) * _PADDING)
        for i, token in vocabulary.items():
            self.table[i] = to_bytes(token)
        for i, content in added.items():
            self.table[i] = content.encode("utf-8")
        self.lengths = np.fromiter((len(piece) for piece in self.table), np.int64, len(self.table))
        _verify(self, tokenizer)

    def join(self, ids: Iterable[int] | np.ndarray) -> bytes:
        """The bytes of a token sequence."""
        table, size = self.table, len(self.table)
        ids = ids.tolist() if isinstance(ids, np.ndarray) else ids
        return b"".join([table[i] for i in ids if i < size])

    def offsets(self, ids: np.ndarray) -> np.ndarray:
        """[n + 1] int64: token i covers the bytes offsets[i] … offsets[i + 1] of join(ids)."""
        ids = np.asarray(ids, np.int64)
        lengths = np.where(ids < len(self.lengths), self.lengths[np.minimum(ids, len(self.lengths) - 1)], 0)
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for every byte: printable Latin-1 maps to itself, the others to U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(b): b for b in printable}
    others = [b for b in range(256) if b not in set(printable)]
    alphabet.update({chr(0x100 + k): b for k, b in enumerate(others)})
    return alphabet


_ALPHABET = _byte_alphabet()


def _is_byte_level(tokens: Iterable[str]) -> bool:
    return all(char in _ALPHABET for token in tokens for char in token)


def _byte_level(token: str) -> bytes:
    return bytes([_ALPHABET[char] for char in token])


def _sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode("utf-8")


def _verify(table: TokenBytes, tokenizer) -> None:
    """Compare with the tokenizer's decoder, on random ids and on a text in several scripts.

    Only ids of whole characters are drawn, because decoders differ in how they show broken ones.
    """
    added = tokenizer.added_tokens_decoder
    whole = [i for i, piece in enumerate(table.table) if piece and i not in added and _is_text(piece)]
    rng = np.random.default_rng(0)
    runs = [rng.choice(whole, 8).tolist() for _ in range(32)]
    for ids in [*runs, tokenizer.encode(_SAMPLE, add_special_tokens=False)]:
        ours = table.join(ids).decode("utf-8", "replace")
        theirs = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        # decoders of sentencepiece models drop the first space of a text
        if ours.removeprefix(" ") != theirs.removeprefix(" "):
            raise PactError(
                f"the tokenizer cannot be mapped to bytes: ids {ids[:8]} decode to {theirs[:60]!r}, their bytes are "
                f"{ours[:60]!r}; use a byte-level BPE or sentencepiece tokenizer"
            )


def _is_text(piece: bytes) -> bool:
    try:
        piece.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
