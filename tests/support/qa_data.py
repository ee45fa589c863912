"""QA rows: two of our own, and those of the data sets, from the folder that PACT_TEST_DATA names."""

import os
from pathlib import Path

import pytest

from pact_fast.envs.simulated.world import Passage
from pact_fast.synthesis.mtr.qa import QARow, SubQuestion
from pact_fast.synthesis.mtr.readers import read_rows

PASSAGES = (Passage("Free Guy", "A film by Shawn Levy."),)
WIKI = QARow(
    "w", "Which film whose director is younger, Forbidden Ground or Free Guy?", ("Free Guy",), PASSAGES,
    type="bridge_comparison",
    triples=(("Forbidden Ground", "director", "Pál Gábor"), ("Free Guy", "director", "Shawn Levy"),
             ("Pál Gábor", "date of birth", "2 November 1932"), ("Shawn Levy", "date of birth", "July 23, 1968")),
)  # fmt: skip
MUSIQUE = QARow(
    "m", "How many stores are in the state where Hello Love's performer lived?", ("35",), PASSAGES,
    decomposition=(SubQuestion("Hello Love >> performer", "Hank Snow"), SubQuestion("What state did #1 live in?", "Tennessee"),
                   SubQuestion("how many stores are in #2", "35")),
)  # fmt: skip


def qa_rows(name: str, count: int | None = None) -> list[QARow]:
    """The first rows of a file. Skips the test if there is no such file."""
    path = Path(os.environ.get("PACT_TEST_DATA", "")) / "qa" / f"{name}.jsonl"
    if "PACT_TEST_DATA" not in os.environ or not path.exists():
        pytest.skip(f"set PACT_TEST_DATA to a folder with qa/{name}.jsonl")
    return list(read_rows(path))[:count]
