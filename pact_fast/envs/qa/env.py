"""The environment `qa`: a question, a search tool, exact match and F1 of the answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pact_fast.data.types import Task, ToolSchema, Trajectory
from pact_fast.envs.qa.retrieval import RetrievalFailed, Retriever, RowPassages, Server, shared_corpus
from pact_fast.envs.registry import environment
from pact_fast.envs.simulated.env import gold_answers, qa_set
from pact_fast.envs.simulated.utilities import SEARCH_TOOL
from pact_fast.envs.simulated.world import RESULT_LIMIT, Passage
from pact_fast.errors import PactError
from pact_fast.rewards.answers import extract_answer
from pact_fast.rewards.qa import qa_scores
from pact_fast.text import short

PASSAGES, NONE = "passages", "none"  # values of `search` that are no place
ARGUMENTS = ("search", "top_k", "max_output")


@environment("qa")
class QuestionAnswering:
    """Answers a question with a search tool, or without.

    Args:
        shared: Where all rows search; None: in their own passages.
        search: Whether there is a search tool.
        top_k: Passages of a search.
        max_output: Characters of an observation.
    """

    @classmethod
    def factory(cls, args: dict[str, Any], tool_timeout: float) -> Callable[[], QuestionAnswering]:
        """`env.args`: search, top_k, max_output (docs/evaluation.md). PactError for a value that does not fit."""
        unknown = [key for key in args if key not in ARGUMENTS]
        if unknown:
            raise PactError(f"env.args: unknown key {short(unknown[0])}; qa takes {', '.join(ARGUMENTS)}")
        top_k, max_output = args.get("top_k", RESULT_LIMIT), args.get("max_output", 4096)
        for name, value, least in (("top_k", top_k, 1), ("max_output", max_output, 64)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise PactError(f"env.args.{name}: {short(value)} must be a whole number of at least {least}")
        search = args.get("search", PASSAGES)
        if not isinstance(search, str) or not search:
            raise PactError(f"env.args.search: {short(search)} must be passages, none, a file, or a server's URL")
        shared = None if search in (PASSAGES, NONE) else shared_retriever(search, tool_timeout)
        return lambda: cls(shared, search != NONE, top_k, max_output)

    def __init__(
        self, shared: Retriever | None = None, search: bool = True, top_k: int = RESULT_LIMIT, max_output: int = 4096
    ):
        self._shared, self._search, self._top_k, self._max_output = shared, search, top_k, max_output
        self.blocking = bool(shared and shared.blocking)
        self._retriever: Retriever = shared or RowPassages(())

    @classmethod
    def check_task(cls, task: Task) -> None:
        """PactError if the row has no answer to reward, or passages that cannot be read."""
        if not gold_answers(task):
            raise PactError(f"task {task.id}: the environment qa needs an 'answer' or 'answers'")
        qa_set(task)
        row_passages(task)

    def reset(self, task: Task) -> str | None:
        """PactError if the row's own passages are to be searched and it has none."""
        if self._search and self._shared is None:
            passages = row_passages(task)
            if not passages:
                raise PactError(
                    f"task {task.id} has no env_args.passages to search; set env.args.search to a file of passages, a "
                    "retrieval server, or none"
                )
            self._retriever = RowPassages(passages)
        return None

    @property
    def tools(self) -> list[ToolSchema]:
        return [SEARCH_TOOL.schema] if self._search else []

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """The passages as `Doc 1(Title: …) …`, a line each: the form that Search-R1 uses."""
        query = arguments.get("query")
        if name != SEARCH_TOOL.name or not self._search:
            return "error: there is no such tool"
        if not isinstance(query, str) or not query.strip() or len(arguments) != 1:
            return "error: search takes one argument, 'query', a text"
        try:
            found = self._retriever.top(query, self._top_k)
        except RetrievalFailed as error:
            return f"error: {error}"
        text = "\n".join(f"Doc {i}(Title: {p.title}) {' '.join(p.text.split())}" for i, p in enumerate(found, 1))
        text = text or "no passage has any of these words"
        return text if len(text) <= self._max_output else text[: self._max_output - 1] + "…"

    def reward(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        """`success`, which is exact match, and `f1`, by the rules of the row's data set; both in [0, 1]."""
        scores = qa_scores(extract_answer(trajectory.answer), gold_answers(task), qa_set(task))
        return {"success": scores["em"], "f1": scores["f1"]}


def shared_retriever(search: str, seconds: float) -> Retriever:
    """The server of a URL, or the corpus of a file."""
    if search.startswith(("http://", "https://")):
        return Server(search, seconds)
    path = Path(search)
    return shared_corpus(path, path.stat().st_mtime if path.exists() else 0.0)


def row_passages(task: Task) -> list[Passage]:
    """The row's `env_args.passages`. PactError if they are not a list of {title, text}."""
    listed = task.env_args.get("passages") or []
    try:
        return [Passage(str(one["title"]), str(one["text"])) for one in listed]
    except (KeyError, TypeError):
        raise PactError(f"task {task.id}: env_args.passages must be a list of {{title, text}}") from None
