"""The backend `facts`: look-ups in the row's own facts, and BM25 search over its passages. Exact, and without a model."""

from __future__ import annotations

import functools
from typing import Any

from pact_fast.envs.simulated.backend import ToolFailure, ToolRequest
from pact_fast.envs.simulated.bm25 import BM25
from pact_fast.envs.simulated.world import LOOKUP, RESULT_LIMIT, SEARCH, Passage, ToolWorld

PASSAGE_CHARACTERS = 1200  # of a search result


class FactsBackend:
    """Answers look-ups and searches from the row alone."""

    version = "facts-1"
    deterministic = True
    blocking = False

    def respond(self, request: ToolRequest) -> Any:
        """{"values": […]} of a look-up, {"passages": ["title | text", …]} of a search."""
        tool, world = request.tool, request.world
        if tool.kind == LOOKUP:
            values = look_up(world, tool.relation, request.arguments)
            if not values:
                raise ToolFailure("not_found", "no record of this; check the spelling, or use another tool")
            return {"values": values}
        if tool.kind == SEARCH:
            query = str(request.arguments.get("query", ""))
            return {"passages": [passage_text(p) for p in search(world.passages, query)]}
        raise ToolFailure("unavailable", f"no facts can answer a tool of kind {tool.kind}")


def look_up(world: ToolWorld, relation: str, arguments: dict[str, Any]) -> list[str]:
    """The values of all facts that a look-up asks for, each once, in the order of the row."""
    found = (value for fact in world.facts if fact.matches(relation, arguments) for value in fact.values)
    return list(dict.fromkeys(found))


def search(passages: tuple[Passage, ...], query: str, k: int = RESULT_LIMIT) -> list[Passage]:
    """The best passages for a query. The index of passages that were searched lately is kept."""
    return [passages[i] for i in _index(passages).top(query, k)]


def passage_text(passage: Passage) -> str:
    """Title and text of a passage on one line, truncated to PASSAGE_CHARACTERS."""
    text = " ".join(f"{passage.title} | {passage.text}".split())
    return text if len(text) <= PASSAGE_CHARACTERS else text[: PASSAGE_CHARACTERS - 1] + "…"


@functools.lru_cache(maxsize=256)
def _index(passages: tuple[Passage, ...]) -> BM25:
    return BM25([f"{passage.title} {passage.text}" for passage in passages])
