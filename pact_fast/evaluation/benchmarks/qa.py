"""HotpotQA, MuSiQue, 2WikiMultiHopQA and Bamboogle by exact match and F1, with search, simulated tools or none."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from pact_fast.data.types import Task
from pact_fast.envs.qa.env import NONE, PASSAGES
from pact_fast.envs.simulated.env import make_actor
from pact_fast.errors import PactError
from pact_fast.evaluation.benchmark import Benchmark, benchmark
from pact_fast.rewards.qa import QaSet
from pact_fast.synthesis.mtr.make_task import SYSTEM, make_task
from pact_fast.synthesis.mtr.qa import QARow
from pact_fast.synthesis.mtr.readers import read_rows

NO_TOOLS = "Answer the question. Give the answer alone, in as few words as possible."


class _QuestionAnswering(Benchmark):
    """A data set of questions. Its file has the official form, FlashRAG's, or our own columns (docs/mtr.md)."""

    qa_set: ClassVar[QaSet]
    settings = ("env.name=qa", "rollout.max_turns=8", "rollout.max_prompt_length=4096")
    metrics = {"f1": "F1"}  # noqa: RUF012

    def tasks(self, category: str) -> list[Task]:
        """With env.name=simulated, the tools that MTR's rules generate from a row; else a search tool, or none."""
        if self.config.env.name == "simulated":
            actor = make_actor(self.config.env.args)
            made = (make_task(row, actor).task for row in self._rows)
            return [replace(task, env_args={**task.env_args, "qa_set": self.qa_set}) for task in made]
        self._check_passages()
        return [qa_task(row, self.qa_set, searches=self._search != NONE) for row in self._rows]

    @cached_property
    def _rows(self) -> list[QARow]:
        if not self.config.data.eval:
            raise PactError(f"{self.qa_set} needs its data: add data.eval=FILE, the official file or FlashRAG's")
        return [row for name in _files(self.config.data.eval) for row in read_rows(Path(name))]

    @property
    def _search(self) -> str:
        return self.config.env.args.get("search", PASSAGES)

    def _check_passages(self) -> None:
        if self._search == PASSAGES and (bare := [row.id for row in self._rows if not row.passages]):
            raise PactError(
                f"{len(bare)} of {len(self._rows)} rows have no passages to search ({bare[0]} is the first); set "
                "env.args.search to a file of passages, a retrieval server, or none"
            )


def qa_task(row: QARow, qa_set: QaSet, searches: bool) -> Task:
    """A row as a task of the environment `qa`. `searches`: whether it has a search tool."""
    env_args: dict[str, object] = {"qa_set": qa_set}
    if row.passages:
        env_args["passages"] = [{"title": p.title, "text": p.text} for p in row.passages]
    return Task(
        id=row.id,
        prompt=[
            {"role": "system", "content": SYSTEM if searches else NO_TOOLS},
            {"role": "user", "content": row.question},
        ],
        answer=row.answers[0],
        env="qa",
        env_args=env_args,
        columns={"answers": list(row.answers)},
    )


def _files(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


@benchmark("hotpotqa")
class HotpotQA(_QuestionAnswering):
    """HotpotQA: exact match and F1. Needs data.eval=FILE, hotpot_dev_distractor_v1.json or FlashRAG's dev.jsonl."""

    qa_set = "hotpotqa"
    categories = ("hotpotqa",)


@benchmark("musique")
class Musique(_QuestionAnswering):
    """MuSiQue-Ans: exact match and F1 over all aliases. Needs data.eval=FILE, musique_ans_v1.0_dev.jsonl."""

    qa_set = "musique"
    categories = ("musique",)


@benchmark("2wikimultihopqa")
class TwoWiki(_QuestionAnswering):
    """2WikiMultiHopQA: exact match and F1. Needs data.eval=FILE, dev.json (aliases: FlashRAG's dev.jsonl)."""

    qa_set = "2wikimultihopqa"
    categories = ("2wikimultihopqa",)


@benchmark("bamboogle")
class Bamboogle(_QuestionAnswering):
    """Bamboogle, 125 questions: exact match and F1. Needs data.eval=FILE, a CSV or FlashRAG's test.jsonl."""

    qa_set = "bamboogle"
    categories = ("bamboogle",)
