"""What several test files share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of the fault drills, undisturbed."""
    from faults import STEPS, Life, metrics

    run = tmp_path_factory.mktemp("steady") / "run"
    Life(run).ends_well()
    assert [record["step"] for record in metrics(run)] == STEPS
    return run
