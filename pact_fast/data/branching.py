"""Sequences with shared beginnings: a rollout, or an expert trace, whose past the chat template has rewritten."""

from __future__ import annotations

import numpy as np


class Branching:
    """Token ids after a prompt that may branch, and their sequences. Base class of records with these fields.

    prompt_ids  int64, the prompt
    ids         [n] int64: the tokens of all branches, one branch behind the other; what a branch shares with the one before it
                is stored once
    branches    [b, 2] int64 (start, keep) of every branch but the first: tokens `start` … of `ids` follow the first `keep`
                tokens after the prompt in the sequence of the branch before; −keep > 0 tokens of the prompt are left out
    """

    prompt_ids: np.ndarray
    ids: np.ndarray
    branches: np.ndarray

    @property
    def rewound(self) -> int:
        """Most tokens at the end of the prompt that a branch leaves out."""
        return max(0, -int(self.branches[:, 1].min(initial=0)))

    @property
    def departures(self) -> list[int]:
        """For every branch but the first, the index of the first token (of `ids`) that it does not share with the branch
        before it; −k: it leaves out the last k tokens of the prompt."""
        paths = self._paths()
        kept = (path[: keep + self.rewound] for path, (_, keep) in zip(paths, self.branches.tolist(), strict=False))
        return [int(path[-1]) + 1 if len(path) else -self.rewound for path in kept]

    @property
    def longest(self) -> int:
        """Tokens after the prompt in the longest sequence; those of the prompt that a branch leaves out are subtracted."""
        return max(map(len, self._paths())) - self.rewound

    def sequences(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the sequence of each branch as the sampler saw it.

        Returns:
            One pair per branch: (int64 ids of the whole sequence, prompt included; int64 [m] indices into `ids` of the
            tokens that the branch adds, which are the last m of the sequence).
        """
        head = self.prompt_ids[: len(self.prompt_ids) - self.rewound]
        starts = [0, *self.branches[:, 0].tolist(), len(self.ids)]
        return [
            (np.concatenate([head, self.prompt_ids[path[path < 0]], self.ids[path[path >= 0]]]), np.arange(start, end))
            for path, start, end in zip(self._paths(), starts, starts[1:], strict=False)
        ]

    def _paths(self) -> list[np.ndarray]:
        """For every branch, the indices into `ids` along its sequence; negative ones are those of the prompt's end."""
        starts = [*self.branches[:, 0].tolist(), len(self.ids)]
        paths = [np.arange(-self.rewound, starts[0])]
        for (start, keep), end in zip(self.branches.tolist(), starts[1:], strict=True):
            paths.append(np.concatenate([paths[-1][: keep + self.rewound], np.arange(start, end)]))
        return paths
