"""The expert trace as tokens after its prompt. Like a rollout, it branches where the chat template rewrites the past."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pact_fast.chat.history import History, LabelledTokens, concatenate, labelled_prompt
from pact_fast.components import Component
from pact_fast.data.branching import Branching

NO_LEVEL = 255  # TraceContext.level of a token that is never supervised
WRITTEN = (
    Component.REASONING,
    Component.TOOL_CALL,
    Component.ANSWER,
)  # by the expert: no observation, no template text


@dataclass(frozen=True)
class TraceContext(Branching):
    """The expert trace h* as tokens that follow the prompt. All arrays but the prompt and the branches are [n].

    ids         int64
    components  uint8, see Component
    turn_ids    int16: index of the expert's turn; the bridge tokens after a turn have its index, too
    level       uint8: smallest prefix level (1 to 4) at which a reasoning token is supervised; NO_LEVEL: never
    generated   bool: the expert wrote the token (reasoning, calls or visible text), and it is no repetition of it in a later
                branch; so each has been generated in the context before it
    prompt_ids  int64; empty for a trace without branches
    branches    [b, 2] int64, see Branching
    """

    ids: np.ndarray
    components: np.ndarray
    turn_ids: np.ndarray
    level: np.ndarray
    generated: np.ndarray
    prompt_ids: np.ndarray
    branches: np.ndarray

    def last_branch(self) -> TraceContext:
        """The last sequence of the trace alone: the context of a policy that continues from there."""
        if not len(self.branches):
            return self
        path = self._paths()[-1]
        kept, lost = path[path >= 0], self.rewound - int((path < 0).sum())
        return replace(
            self, ids=self.ids[kept], components=self.components[kept], turn_ids=self.turn_ids[kept], level=self.level[kept],
            generated=self.generated[kept], branches=np.array([[0, -lost]] if lost else [], np.int64).reshape(-1, 2),
        )  # fmt: skip


class TraceWriter:
    """Puts a TraceContext together, turn by turn.

    Args:
        prompt_ids: What the trace follows; empty for a trace that does not branch.
        history: Rewrites the turns before a message of the user; None: they stay unchanged.
    """

    def __init__(self, prompt_ids: np.ndarray, history: History | None):
        self._prompt_ids, self._history = prompt_ids, history
        # since the last rewrite: the tokens at that time, then turns and the text between them
        self._sequence = [labelled_prompt(prompt_ids)]
        self._tokens: list[LabelledTokens] = []
        self._levels: list[np.ndarray] = []
        self._generated: list[np.ndarray] = []
        self._branches: list[tuple[int, int]] = []

    def turn(self, tokens: LabelledTokens, level: np.ndarray) -> None:
        """Append a turn of the expert; level: uint8 [n], see TraceContext."""
        self._store(tokens, level, np.isin(tokens.components, WRITTEN))
        self._sequence.append(tokens)

    def follow(self, tokens: LabelledTokens, *, user: bool, replied: bool) -> None:
        """Append the text after the turn.

        Args:
            tokens: Results of calls and a message of the user, as `bridge_tokens` renders them.
            user: There is such a message.
            replied: It follows the turn itself, not results of its calls.
        """
        if not (user and self._history and self._history.rewrites(replied)):
            self._append(tokens)
            self._sequence.append(tokens)
            return
        size = sum(map(len, self._sequence))
        keep, tokens = self._history.continuation(self._sequence, tokens, replied=replied)
        if keep < size:
            self._branches.append((sum(map(len, self._tokens)), keep - len(self._prompt_ids)))
        self._append(tokens)
        self._sequence = [concatenate([concatenate(self._sequence)[:keep], tokens])]

    def context(self) -> TraceContext:
        """Return the tokens written so far as a TraceContext."""
        tokens = concatenate(self._tokens) if self._tokens else labelled_prompt(np.zeros(0, np.int64))
        levels, generated = (
            np.concatenate([np.zeros(0, kind), *parts])
            for kind, parts in ((np.uint8, self._levels), (bool, self._generated))
        )
        branches = np.array(self._branches, np.int64).reshape(-1, 2)
        return TraceContext(*_columns(tokens), levels, generated, self._prompt_ids, branches)

    def _append(self, tokens: LabelledTokens) -> None:
        n = len(tokens)
        self._store(tokens, np.full(n, NO_LEVEL, np.uint8), np.zeros(n, bool))

    def _store(self, tokens: LabelledTokens, level: np.ndarray, generated: np.ndarray) -> None:
        self._tokens.append(tokens)
        self._levels.append(level)
        self._generated.append(generated)


def _columns(tokens: LabelledTokens) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return tokens.ids, tokens.components, tokens.turn_ids
