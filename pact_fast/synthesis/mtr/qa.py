"""QARow: one question, its answers, and the data set's facts for answering it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pact_fast.envs.simulated.world import Passage

Triple = tuple[str, str, str]  # subject, relation, object


@dataclass(frozen=True)
class SubQuestion:
    """A step of MuSiQue's decompositions. `#1` in the question stands for the answer of the first step."""

    question: str
    answer: str

    def to_json(self) -> dict[str, str]:
        return {"question": self.question, "answer": self.answer}


@dataclass(frozen=True)
class QARow:
    """One question.

    id             unique in its file
    question       its text
    answers        every accepted answer, the gold one first
    passages       paragraphs, in the order of the file
    decomposition  sub-questions in order (MuSiQue)
    triples        the facts that answer the question (2Wiki's `evidences`)
    other_facts    further triples that the row states; they give tools that lead astray
    type           the data set's own class: bridge, comparison, 2hop, …; "" if it has none
    """

    id: str
    question: str
    answers: tuple[str, ...]
    passages: tuple[Passage, ...] = ()
    decomposition: tuple[SubQuestion, ...] = ()
    triples: tuple[Triple, ...] = ()
    other_facts: tuple[Triple, ...] = field(default=())
    type: str = ""

    def to_json(self) -> dict[str, Any]:
        """The row in the package's own columns, which `readers.read_rows` reads."""
        data: dict[str, Any] = {"id": self.id, "question": self.question, "answers": list(self.answers)}
        data |= {"type": self.type} if self.type else {}
        data |= {"passages": [passage.to_json() for passage in self.passages]} if self.passages else {}
        data |= {"decomposition": [step.to_json() for step in self.decomposition]} if self.decomposition else {}
        data |= {"evidences": [list(triple) for triple in self.triples]} if self.triples else {}
        return data | ({"other_facts": [list(triple) for triple in self.other_facts]} if self.other_facts else {})
