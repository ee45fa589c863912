"""QA rows of the data sets, from the folder that PACT_TEST_DATA names."""

import os
from pathlib import Path

import pytest

from pact_fast.synthesis.mtr.qa import QARow
from pact_fast.synthesis.mtr.readers import read_rows


def qa_rows(name: str, count: int | None = None) -> list[QARow]:
    """The first rows of a file. Skips the test if there is no such file."""
    path = Path(os.environ.get("PACT_TEST_DATA", "")) / "qa" / f"{name}.jsonl"
    if "PACT_TEST_DATA" not in os.environ or not path.exists():
        pytest.skip(f"set PACT_TEST_DATA to a folder with qa/{name}.jsonl")
    return list(read_rows(path))[:count]
