"""Retrievers of a question's search tool: over the row's passages, a corpus in memory, or a server."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from pact_fast.data.row_files import add_location, file_rows
from pact_fast.envs.simulated.facts import search
from pact_fast.envs.simulated.world import Passage
from pact_fast.errors import DataError, PactError
from pact_fast.text import short

MAX_ANSWER = 4 << 20  # bytes of a server's answer


class Retriever(Protocol):
    """Finds passages.

    blocking  whether a search may take long, so that the agent loop calls it in a thread
    """

    blocking: bool

    def top(self, query: str, k: int) -> list[Passage]:
        """At most `k` passages, best first; equal queries give equal passages. RetrievalFailed if none can be had."""


class RetrievalFailed(Exception):
    """A search that failed; the message is for the policy."""


class RowPassages:
    """BM25 over the passages of one row."""

    blocking = False

    def __init__(self, passages: Sequence[Passage]):
        self._passages = tuple(passages)

    def top(self, query: str, k: int) -> list[Passage]:
        return search(self._passages, query, k)


class Corpus:
    """BM25 over a file of passages, by the package bm25s. The index is in the memory of this process.

    Args:
        path: JSONL or parquet with `contents`, the title in its first line (Search-R1, FlashRAG), or `title` and `text`.

    Raises:
        PactError: bm25s is not installed.
        DataError: The file or a row cannot be read.
    """

    blocking = False

    def __init__(self, path: Path):
        try:
            import bm25s
        except ImportError:
            raise PactError(
                f"env.args.search={path} needs the package bm25s: pip install 'pact-fast[search]'"
            ) from None
        self._passages = read_corpus(path)
        self._tokens = functools.partial(bm25s.tokenize, stopwords="en", show_progress=False)
        self._index = bm25s.BM25()
        self._index.index(self._tokens([f"{p.title} {p.text}" for p in self._passages]), show_progress=False)

    def top(self, query: str, k: int) -> list[Passage]:
        import numpy as np

        (words,) = self._tokens([query], return_ids=False)
        known = [word for word in words if word in self._index.vocab_dict]
        if not known:
            return []
        scores = self._index.get_scores(known)
        k = min(k, len(scores))
        # bm25s takes any of equal scores; ties here go to the earlier passage, so that runs repeat
        least = np.partition(scores, -k)[-k]
        candidates = np.flatnonzero(scores >= least)
        ranked = candidates[np.lexsort((candidates, -scores[candidates]))][:k]
        return [self._passages[i] for i in ranked if scores[i] > 0]


class Server:
    """A retrieval server with Search-R1's interface: POST {queries, topk, return_scores} gives {result: [[document]]}.

    Args:
        url: `http://host:port/retrieve`.
        seconds: For an answer; connections that fail are tried again within them.

    Raises:
        PactError: The server does not answer a first query as expected.
    """

    blocking = True

    def __init__(self, url: str, seconds: float):
        import httpx

        self._url, self._seconds = url, seconds
        self._client = httpx.Client(timeout=seconds, follow_redirects=False)
        try:
            self.top("a first query", 1)
        except RetrievalFailed as error:
            raise PactError(f"env.args.search: {error} at {short(url)}") from None

    def top(self, query: str, k: int) -> list[Passage]:
        import httpx

        body = {"queries": [query], "topk": k, "return_scores": True}
        deadline = time.monotonic() + self._seconds
        while True:
            try:
                return _documents(self._post(body), k)
            except httpx.HTTPError as error:
                if isinstance(error, httpx.TimeoutException) or time.monotonic() + 0.2 > deadline:
                    raise RetrievalFailed(f"the search server failed: {type(error).__name__}") from None
                time.sleep(0.2)

    def _post(self, body: dict[str, Any]) -> Any:
        with self._client.stream("POST", self._url, json=body) as answer:
            answer.raise_for_status()
            data = bytearray()
            for chunk in answer.iter_bytes():
                data += chunk
                if len(data) > MAX_ANSWER:
                    raise RetrievalFailed(f"the search server's answer is larger than {MAX_ANSWER >> 20} MiB")
        try:
            return json.loads(bytes(data))
        except (ValueError, RecursionError):
            raise RetrievalFailed("the search server's answer is not JSON") from None


def _documents(answer: Any, k: int) -> list[Passage]:
    """The passages of a server's answer, with or without scores."""
    try:
        (found,) = answer["result"]
        documents = [one.get("document", one) for one in found[:k]]
        return [split_contents(document["contents"]) for document in documents]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise RetrievalFailed(
            'the search server\'s answer is not {"result": [[{"document": {"contents": "title\\ntext"}}]]}'
        ) from None


def split_contents(contents: str) -> Passage:
    """A passage of `"title"\\ntext`. TypeError if it is not text."""
    if not isinstance(contents, str):
        raise TypeError("contents must be text")
    title, _, text = contents.partition("\n")
    return Passage(title.strip().strip('"'), text.strip())


def read_corpus(path: Path) -> list[Passage]:
    """The passages of a file, in its order. DataError with file, line and field if one cannot be read."""
    passages = []
    for line, row in file_rows(path):
        with add_location(path, line):
            if isinstance(row, DataError):
                raise row
            contents, title, text = row.get("contents"), row.get("title"), row.get("text")
            if isinstance(contents, str):
                passages.append(split_contents(contents))
            elif isinstance(title, str) and isinstance(text, str):
                passages.append(Passage(title.strip(), text.strip()))
            else:
                raise DataError("a passage needs 'contents' (its title in the first line), or 'title' and 'text'")
    return passages


@functools.lru_cache(maxsize=1)
def shared_corpus(path: Path, modified: float) -> Corpus:
    """The corpus of a file that was last modified then; read and indexed once in a process."""
    return Corpus(path)
