"""The engine: reflection repairs planted faults, regressions are rolled back, and a killed run continues to the same end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pact_fast.envs.domain.controls import check_instance
from pact_fast.errors import PactError
from pact_fast.synthesis.eigendata.engine import DataEngine, Settings
from pact_fast.synthesis.eigendata.evolution import probe
from pact_fast.synthesis.eigendata.pipeline import Pipeline, Roles
from pact_fast.synthesis.eigendata.roles import Revision
from pact_fast.synthesis.eigendata.versions import START, Version
from tests.support import eigendata as support

FAULTS = [  # settings of synthesis and of the workflow; each of them alone makes tasks fail
    {"synthesis.yaml": {"user_tells": "everything"}},
    {"synthesis.yaml": {"last_steps": "never"}},
    {"synthesis.yaml": {"compare_state": False, "assertions": False}},
    {"synthesis.yaml": {"normalise": "nothing"}},
    {"synthesis.yaml": {"must_say": False}},
    {"workflow.yaml": {"max_messages": 5}},
]
ALL_FAULTS = {
    "synthesis.yaml": {k: v for fault in FAULTS for k, v in fault.get("synthesis.yaml", {}).items()},
    "workflow.yaml": {"max_messages": 5},
}
PLANS = 48


def planted(folder: Path, faults: dict = ALL_FAULTS) -> Path:
    folder.mkdir()
    for path in START.glob("*.yaml"):
        values = yaml.safe_load(path.read_text()) | faults.get(path.name, {})
        (folder / path.name).write_text(yaml.safe_dump(values))
    return folder


@pytest.mark.slow
def test_reflection_repairs_six_planted_faults_within_five_rounds(tmp_path):
    start = planted(tmp_path / "start")
    settings = Settings("helpdesk", rounds=5, plans=PLANS, count=240)
    engine = DataEngine(support.helpdesk(), tmp_path / "out", settings, start=start)
    candidates = engine.run()
    rates = [record["accepted"] / record["attempts"] for record in engine.rounds]
    assert rates[0] == 0.0, rates
    assert rates[-1] >= 0.9, (rates, [trial.to_json() for trial in engine.trials])
    last = Version.load(tmp_path / "out" / "versions", engine.rounds[-1]["version"])
    repaired = {
        key: last.settings("synthesis.yaml")[key] for key in ("user_tells", "last_steps", "normalise", "must_say")
    }
    assert repaired == {"user_tells": "complaint", "last_steps": "once", "normalise": "bookkeeping", "must_say": True}
    assert last.settings("synthesis.yaml")["assertions"] and last.settings("workflow.yaml")["max_messages"] > 20
    for candidate in candidates:
        if candidate.accepted:
            assert not support.failing_controls(engine.domain, candidate.instance)
            assert not check_instance(engine.domain, candidate.instance)
            assert candidate.instance.versions["synthesis.yaml"].startswith(f"synthesis.yaml@{candidate.version}:")
            assert Version.load(tmp_path / "out" / "versions", candidate.version)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: ",".join(key for file in fault.values() for key in file))
def test_each_planted_fault_alone_makes_tasks_fail(fault, tmp_path):
    version = Version.read(planted(tmp_path / "start", fault))
    result = probe(Pipeline(support.helpdesk(), Roles(), 0), version, PLANS)
    assert result.acceptance < 0.98, result


def test_reflection_moves_verification_before_the_dialogues(tmp_path):
    """With a fault, dialogues about tasks that are rejected anyway are played for nothing."""
    late = {"stages": ["synthesis", "rollout", "assessment", "verification"]}
    start = planted(tmp_path / "start", {"workflow.yaml": late, "synthesis.yaml": {"normalise": "nothing"}})
    engine = DataEngine(
        support.helpdesk(), tmp_path / "out", Settings("helpdesk", rounds=2, plans=16, count=24), start=start
    )
    engine.run()
    first = engine.trials[0]
    assert first.adopted and first.revision.reason == "tasks are played before they are verified"
    last = Version.load(tmp_path / "out" / "versions", engine.rounds[-1]["version"])
    assert last.settings("workflow.yaml")["stages"] == ["synthesis", "verification", "rollout", "assessment"]
    assert last.settings("synthesis.yaml")["normalise"] == "bookkeeping"


class Meddling:
    """A reflector with one bad idea."""

    def reflect(self, version, candidates, rejected):
        bad = Revision({"synthesis.yaml": {"last_steps": "never"}}, "planted")
        return [] if bad.changes in [other.changes for other in rejected] else [bad]


def test_a_planted_regression_is_rolled_back(tmp_path):
    engine = DataEngine(
        support.helpdesk(), tmp_path / "out", Settings("helpdesk", rounds=3, plans=8, count=12),
        roles=Roles(reflector=Meddling()),
    )  # fmt: skip
    engine.run()
    (trial,) = engine.trials
    assert not trial.adopted and trial.after < trial.before
    assert [record["version"] for record in engine.rounds] == [1, 1, 1]
    assert (tmp_path / "out" / "versions" / "0002").exists()  # kept, to be looked at


def test_no_workflow_can_leave_the_controls_out(tmp_path):
    """Without a verification stage, a wrong gold solution is still not accepted."""
    start = planted(
        tmp_path / "start",
        {"workflow.yaml": {"stages": ["synthesis"]}, "synthesis.yaml": {"last_steps": "never"}},
    )
    version = Version.read(start)
    result = probe(Pipeline(support.helpdesk(), Roles(), 0), version, 16, 32)
    assert 0 < result.controls["gold_passes"] + result.controls["gold_runs"] <= 32 - result.accepted


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_files(tmp_path):
    start = planted(tmp_path / "start", {"synthesis.yaml": {"normalise": "nothing"}})
    script = (
        "import sys; from pathlib import Path; from pact_fast.envs.domain.base import make_domain\n"
        "from pact_fast.synthesis.eigendata.engine import DataEngine, Settings\n"
        "s = Settings('helpdesk', rounds=2, plans=8, count=24)\n"
        f"DataEngine(make_domain('helpdesk'), Path(sys.argv[1]), s, start=Path({str(start)!r})).run()\n"
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([sys.executable, "-c", script, str(whole)], check=True)
    for lines in (3, 15):
        process = subprocess.Popen([sys.executable, "-c", script, str(killed)])
        deadline, log = time.monotonic() + 120, killed / "candidates.jsonl"
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and log.read_bytes().count(b"\n") >= lines:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with (killed / "candidates.jsonl").open("ab") as file:
        file.write(b'{"round": 1, "pl')  # leftover of an interrupted write
    subprocess.run([sys.executable, "-c", script, str(killed)], check=True)
    for name in ("candidates.jsonl", "rounds.jsonl", "settings.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    assert sorted(os.listdir(killed / "versions")) == sorted(os.listdir(whole / "versions"))


def test_another_run_in_the_same_folder_is_refused(tmp_path):
    settings = Settings("helpdesk", rounds=1, plans=4, count=4)
    engine = DataEngine(support.helpdesk(), tmp_path / "out", settings)
    engine.run()
    with pytest.raises(PactError, match="started with count=4, not 5"):
        DataEngine(support.helpdesk(), tmp_path / "out", Settings("helpdesk", rounds=1, plans=4, count=5)).run()
    with engine.locked(), pytest.raises(PactError, match="another process works"):
        DataEngine(support.helpdesk(), tmp_path / "out", settings).run()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("synthesis.yaml", "combine: all", "combine is 'all'"),
        ("workflow.yaml", "stages: [rollout]", "stages must begin with synthesis"),
        ("user.yaml", "patiense: 3", "unknown key 'patiense' .did you mean 'patience'"),
    ],
)
def test_a_wrong_setting_is_one_line_with_its_key(tmp_path, file, text, message):
    folder = planted(tmp_path / "start")
    values = yaml.safe_load((folder / file).read_text()) | yaml.safe_load(text)
    (folder / file).write_text(yaml.safe_dump(values))
    with pytest.raises(PactError, match=message) as caught:
        Version.read(folder)
    assert "\n" not in str(caught.value)


def test_settings_are_saved_as_json(tmp_path):
    engine = DataEngine(support.helpdesk(), tmp_path / "out", Settings("helpdesk", rounds=1, plans=4, count=4))
    engine.run()
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["plans"] == 4


@pytest.mark.slow
@pytest.mark.timing
def test_rules_make_500_accepted_tasks_in_under_three_minutes(tmp_path):
    engine = DataEngine(support.helpdesk(), tmp_path / "out", Settings("helpdesk", rounds=1, count=510))
    started = time.process_time()
    accepted = [candidate for candidate in engine.run() if candidate.accepted]
    assert len(accepted) >= 500 and time.process_time() - started < 180
    assert len({candidate.instance.digest for candidate in accepted}) == len(accepted)
