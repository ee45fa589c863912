"""Many chunks of the head in tests of few tokens, which would otherwise be one chunk."""

from __future__ import annotations

import pytest

from pact_fast.kernels.head import chunked


def make_small_chunks(patch: pytest.MonkeyPatch, rows: int = 4) -> None:
    patch.setattr(chunked, "max_chunk_rows", lambda *_: rows)
