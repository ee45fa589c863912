"""Metrics reach TensorBoard, W&B and trackio (real packages, offline), and none of them can end a run."""

import json
import math
import sqlite3
import struct
from pathlib import Path

import pytest
import yaml

from pact_fast.algorithms.registry import make_algorithm
from pact_fast.cli.main import main
from pact_fast.config import parse_config
from pact_fast.config.changes import fixed_changes
from pact_fast.config.secrets import without_secrets
from pact_fast.errors import PactError
from pact_fast.train.preflight import check_settings
from pact_fast.train.trackers.base import TrackedRun, Tracker
from pact_fast.train.trackers.group import Trackers, open_trackers
from pact_fast.train.trackers.registry import check_trackers, tracker_classes
from tests.support.runs import TINY_RUN

MINE = """
import json
from pathlib import Path
from pact_fast.train.trackers.base import Tracker

class Mine(Tracker):
    def _write(self, record):
        with (self.run.folder.parent / "mine.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\\n")

    def __init__(self, run):
        super().__init__(run)
        self._write(["open", run.name, run.id, run.first, run.config["trainer"]["max_steps"]])

    def log(self, step, values):
        self._write([step, dict(values)])

    def close(self, failed):
        self._write(["close", failed])

class Broken(Tracker):
    def log(self, step, values):
        raise ConnectionError("no route to host")
"""


def config(**trainer):
    return parse_config({"model": {"path": "m"}, "trainer": trainer})


def two_lives(cls, folder):
    """A run of 3 steps, and its resumption from step 1 with other values."""
    for first, settings in ((0, {"seed": 1}), (1, {"seed": 2})):
        one = cls(TrackedRun("run", "0123abcd", folder, settings, first))
        for step in range(first + 1, first + 4):
            one.log(step, {"loss": step + 0.5 * first})
        one.log(step, {"eval/success": 0.25})
        one.close(failed=False)


# --- one tracker after the other ---


def test_tensorboard_has_every_step_once_and_the_settings(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    two_lives(tracker_classes("tensorboard")["tensorboard"], tmp_path)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.5), (3, 3.5), (4, 4.5)]
    assert [(e.step, e.value) for e in events.Scalars("eval/success")] == [(4, 0.25)]
    (shown,) = events.Tensors("config/text_summary")[-1].tensor_proto.string_val
    assert '"seed": 2' in shown.decode()


def wandb_records(file: Path) -> list:
    """The records of an offline run: LevelDB's log format, and W&B's own protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts, records = file.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:  # the rest of a block is padding
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(Record.FromString(parts))
            parts = b""
    return records


@pytest.mark.slow
def test_wandb_continues_the_run_on_an_axis_of_steps(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "PROJECT": "p", "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    found = tracker_classes("wandb")["wandb"]
    found.check()
    two_lives(found, tmp_path)
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    lives = [wandb_records(file) for file in files]
    assert len(lives) == 2
    points, runs, axes = [], [], set()
    for record in (record for life in lives for record in life):
        if record.HasField("history"):
            item = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            points += [(item["step"], item["loss"])] if "loss" in item else []
        elif record.HasField("run"):
            runs.append((record.run.run_id, record.run.display_name, record.run.project))
        elif record.HasField("metric"):
            axes |= {(record.metric.name or record.metric.glob_name, record.metric.step_metric)}
    assert points == [(1, 1.0), (2, 2.0), (3, 3.0), (2, 2.5), (3, 3.5), (4, 4.5)]
    assert set(runs) == {("0123abcd", "run", "p")} and ("*", "step") in axes


@pytest.mark.slow
def test_wandb_without_an_api_key_is_an_error_before_the_run(monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(wandb, "login", lambda **options: options != {"prompt": False, "verify": False})
    monkeypatch.setattr(wandb, "setup", lambda: type("Setup", (), {"settings": type("S", (), {"mode": "online"})}))
    with pytest.raises(PactError, match=r"wandb has no API key; run `wandb login`.*WANDB_MODE=offline"):
        check_trackers("wandb")


@pytest.mark.slow
def test_trackio_continues_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="pip install trackio")
    if Path(trackio.TRACKIO_DIR) != tmp_path / "trackio":
        pytest.skip("trackio was imported before this test, with another folder")
    monkeypatch.setenv("TRACKIO_PROJECT", "p")
    two_lives(tracker_classes("trackio")["trackio"], tmp_path)
    with sqlite3.connect(tmp_path / "trackio" / "p.db") as database:
        rows = database.execute("select run_name, run_id, step, metrics from metrics order by id").fetchall()
    assert len({run_id for _, run_id, *_ in rows}) == 1 and {name for name, *_ in rows} == {"run-0123abcd"}
    points = [(step, json.loads(values)["loss"]) for *_, step, values in rows if b"loss" in bytes(values)]
    assert points == [(1, 1.0), (2, 2.0), (3, 3.0), (2, 2.5), (3, 3.5), (4, 4.5)]


# --- all of them ---


class Recorder(Tracker):
    def __init__(self, run):
        super().__init__(run)
        self.seen = []
        made.append(self)

    def log(self, step, values):
        self.seen.append((step, dict(values)))

    def close(self, failed):
        self.seen.append(("closed", failed))


made: list[Recorder] = []


def failing(where):
    def fail(self, *arguments):
        raise ConnectionError(f"{where}\nfailed")

    members = {"log": lambda self, step, values: None, "close": lambda self, failed: None, where: fail}
    return type("Failing", (Tracker,), members)


@pytest.mark.parametrize("where", ["__init__", "log", "close"])
def test_a_tracker_that_fails_is_one_warning_and_the_others_go_on(where, tmp_path):
    made.clear()
    notes: list[str] = []
    group = Trackers({"bad": failing(where), "good": Recorder}, TrackedRun("r", "0" * 8, tmp_path, {}), notes.append)
    values = {"loss": 1, "nan": math.nan, "none": None, "text": "x", "flag": True}
    group.log(1, values)
    group.log(2, values)
    group.close(failed=True)
    assert made[0].seen == [(1, {"loss": 1.0}), (2, {"loss": 1.0}), ("closed", True)]
    (note,) = notes
    assert note.startswith("warning: trainer.report_to: bad failed") and f"ConnectionError: {where} failed" in note
    assert "\n" not in note and "metrics.jsonl" in note


def test_the_id_is_kept_by_a_resumed_run_and_drawn_anew_by_a_new_one(tmp_path, monkeypatch):
    made.clear()
    monkeypatch.setattr("pact_fast.train.trackers.group.tracker_classes", lambda names: {"r": Recorder})
    for first in (0, 3, 0):
        open_trackers(config(), tmp_path, first, print)
    ids = [one.run.id for one in made]
    assert ids[0] == ids[1] != ids[2] and all(len(found) == 8 for found in ids)
    assert [one.run.first for one in made] == [0, 3, 0] and made[0].run.name == tmp_path.name


def test_secrets_stay_in_the_settings():
    given = parse_config({
        "model": {"path": "m"},
        "env": {"name": "e.py:E"},
        "rollout": {"engine": "vllm", "vllm_mode": "server"},
        "data": {"train": "hf://org/name@0123:train"},
    })  # fmt: skip
    # a file of settings with secrets is refused; these come from code
    given.rollout.vllm_server_base_url = "http://u:abc@h:1"
    given.env.args = {
        "apiKey": "abc", "hf_token": "abc", "nested": [{"Password": "abc"}], "tokens": "many", "limit": 3,
        "url": "https://me:abc@host/p?x=1&access_token=abc&y=2", "text": "use hf_abcABCabcABCabcABC now",
    }  # fmt: skip
    shown = without_secrets(given.model_dump(mode="json"))
    assert shown["env"]["args"] == {
        "apiKey": "(hidden)", "hf_token": "(hidden)", "nested": [{"Password": "(hidden)"}], "tokens": "many", "limit": 3,
        "url": "https://host/p?x=1&access_token=(hidden)&y=2", "text": "use (hidden) now",
    }  # fmt: skip
    assert "abc" not in json.dumps(shown).replace("abcd", "")
    assert shown["data"]["train"] == "hf://org/name@0123:train"
    assert shown["trainer"] == given.model_dump(mode="json")["trainer"]  # no key of our own looks like a secret


# --- the setting ---


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_missing_package_is_an_error_of_the_settings_before_any_data_is_read(name, monkeypatch):
    monkeypatch.setattr("pact_fast.train.trackers.base.find_spec", lambda name: None)
    given = config(report_to=[name])
    with pytest.raises(PactError) as caught:
        check_settings(given, make_algorithm(given.algorithm))
    error = str(caught.value)
    assert error.startswith(f"trainer.report_to: the package {name} is not installed; pip install {name}")
    assert "\n" not in error


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ("wandbb", "did you mean 'wandb'"),
        (["none", "wandb"], "'none' cannot be combined"),
        ("no.py:T", "no file no.py"),
    ],
)
def test_a_wrong_name_is_refused(names, problem):
    with pytest.raises(PactError, match=problem):
        check_trackers(names)


def test_where_metrics_go_may_change_in_a_resumed_run():
    assert tracker_classes("none") == {} == tracker_classes([])
    assert list(tracker_classes(["trackio", "tensorboard"])) == ["trackio", "tensorboard"]
    assert fixed_changes(config(), config(report_to=["wandb", "tensorboard"])) == []


@pytest.mark.slow
def test_a_run_reports_what_metrics_jsonl_holds_and_outlives_a_broken_tracker(tmp_path, capsys):
    run, recipe, mine = tmp_path / "run", tmp_path / "tiny.yaml", tmp_path / "mine.py"
    mine.write_text(MINE)
    report = f"trainer.report_to=['{mine}:Broken', '{mine}:Mine']"
    recipe.write_text(yaml.safe_dump({**TINY_RUN, "output_dir": str(run)}))
    assert main(["train", str(recipe), report]) == 0
    assert capsys.readouterr().err.count("no route to host") == 1
    assert main(["train", str(recipe), report, "resume=auto", "trainer.max_steps=2"]) == 0
    seen = [json.loads(line) for line in (tmp_path / "mine.jsonl").read_text().splitlines()]
    identity = (run / "tracking_id").read_text().strip()
    opened = [line for line in seen if line[0] == "open"]
    assert opened == [["open", "run", identity, 0, 1], ["open", "run", identity, 1, 2]]
    assert [line for line in seen if line[0] == "close"] == [["close", False]] * 2
    logged = [line for line in seen if line[0] not in ("open", "close")]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    written = [[r.pop("step"), {k: v for k, v in r.items() if v is not None}] for r in records]
    # the evaluation after the last step of the first life is cut from metrics.jsonl when the run resumes
    assert [line for line in logged if line in written] == written and {step for step, _ in logged} == {0, 1, 2}
    assert not (run / "tensorboard").exists()
