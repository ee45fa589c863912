"""Datasets of the Hugging Face Hub as data: real `datasets`, real HTTP, and a Hub on this machine."""

import io
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pact_fast.cli.main import main
from pact_fast.config import DataConfig, HubDataset, load_config, parse_config
from pact_fast.config.changes import fixed_changes
from pact_fast.data.readers import read_tasks, read_traces, write_tasks
from pact_fast.data.row_sources import resolve_data
from pact_fast.data.sources import FileTasks
from pact_fast.envs.registry import make_tasks
from pact_fast.errors import DataError, PactError
from tests.support.data_rows import TRACE, WEATHER
from tests.support.hub import LocalHub
from tests.support.runs import TINY_RUN

CARD = """---
configs:
- config_name: main
  default: true
  data_files:
  - {split: train, path: main/train-*.jsonl}
  - {split: test, path: main/test.jsonl}
- config_name: other
  data_files: other/*.parquet
---
"""


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(rows, **options):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, **options)
    return file.getvalue()


FILES = {
    "README.md": CARD,
    "main/train-0.jsonl": lines({"prompt": "a"}, {"prompt": "b"}),
    "main/train-1.jsonl": "\n" + lines({"id": "own", "prompt": "c", "answer": "2007-11-07"}),
    "main/test.jsonl": lines({"prompt": "held out"}),
    "other/0.parquet": parquet([{"prompt": "d", "meta": {"x": 1, "y": None}}]),
}


@pytest.fixture(scope="module")
def server():
    with LocalHub() as hub:
        yield hub


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    """An empty Hub and an empty cache. HF_ENDPOINT is read when the libraries are imported, so attributes are patched."""
    datasets = pytest.importorskip("datasets")
    from huggingface_hub import HfFileSystem, constants

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    HfFileSystem.clear_instance_cache()
    for known in (server.commits, server.branches, server.requests):
        known.clear()
    return server


def prompts(tasks):
    return [task.prompt[0]["content"] for task in tasks]


# --- names ---


@pytest.mark.parametrize(
    ("text", "dataset"),
    [
        ("hf://org/name:train", HubDataset("org/name", "train")),
        ("hf://datasets/org/name:train", HubDataset("org/name", "train")),
        ("hf://org/na.me-x/main:validation.clean", HubDataset("org/na.me-x", "validation.clean", "main")),
        ("hf://org/name@v1.0/main:test", HubDataset("org/name", "test", "main", "v1.0")),
        ("hf://org/name@refs/convert/parquet:test", HubDataset("org/name", "test", None, "refs/convert/parquet")),
        ("hf://org/name@topic%2Fx:test", HubDataset("org/name", "test", None, "topic/x")),
    ],
)
def test_a_name_says_repository_revision_config_and_split(text, dataset):
    assert HubDataset.parse(text) == dataset
    assert HubDataset.parse(str(dataset)) == dataset


@pytest.mark.parametrize(
    ("text", "cure"),
    [
        ("hf://org/name", "names no split; write hf://org/name:train"),
        ("hf://org/name/data/train.parquet", "names no split"),
        ("hf://name:train", "is not the name of a dataset"),
        ("hf://org/name:train[:10]", "set data.max_rows"),
        ("hf://org/name/../x:train", "is not the name of a dataset"),
    ],
)
def test_a_name_of_another_form_is_refused_with_the_key(text, cure):
    with pytest.raises(PactError, match=re.escape(cure)) as caught:
        parse_config({"model": {"path": "m"}, "data": {"train": ["rows.jsonl", text]}})
    assert "'data.train'" in str(caught.value)


# --- rows ---


def test_rows_are_those_of_the_splits_files_in_order(hub):
    hub.commit("org/name", FILES)
    tasks = read_tasks("hf://org/name/main:train")
    assert prompts(tasks) == ["a", "b", "c"]
    assert [task.id for task in tasks] == ["name-train-0", "name-train-1", "own"]
    assert tasks[2].answer == "2007-11-07"  # through Arrow, it would be a date
    assert tasks[2].source == ("hf://org/name/main:train", 3)
    assert prompts(read_tasks("hf://org/name:test")) == ["held out"]
    (task,) = read_tasks("hf://org/name/other:train")
    assert prompts([task]) == ["d"] and task.columns == {"meta": {"x": 1}}


def test_files_are_kept_in_the_cache_unless_only_some_rows_are_read(hub, tmp_path):
    rows = [{"prompt": f"{n}", "text": "x" * 4000 + str(n)} for n in range(2000)]
    big = parquet(rows, row_group_size=100, compression="none", use_dictionary=False)
    hub.commit("org/big", {"train-0.parquet": big, "train-1.parquet": big})
    assert len(read_tasks("hf://org/big:train", max_rows=2)) == 2
    assert not list(tmp_path.rglob("*.parquet"))
    asked = [(path[-15:], *map(int, part.split("-"))) for _, path, part in hub.requests if part]
    assert asked and {path for path, *_ in asked} == {"train-0.parquet"}
    assert not any(first <= 7e6 <= last for _, first, last in asked) and len(big) > 8e6


def test_a_second_read_of_whole_files_downloads_nothing(hub):
    hub.commit("org/name", FILES)
    read_tasks("hf://org/name:train")
    hub.requests.clear()
    assert len(read_tasks("hf://org/name:train")) == 3
    assert not [path for method, path, _ in hub.requests if method == "GET" and path.endswith("jsonl")]


def test_a_list_may_mix_files_patterns_and_datasets(hub, tmp_path):
    hub.commit("org/name", FILES)
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_text(lines({"prompt": f"in {name}"}))
    (tmp_path / "more").mkdir()
    (tmp_path / "more/a.jsonl").write_text(lines({"prompt": "a of more"}, {"prompt": "two"}))
    sources = ["hf://org/name:test", str(tmp_path / "*.jsonl"), str(tmp_path / "more/a.jsonl")]
    tasks = FileTasks(DataConfig(train=sources, max_rows=1, eval="hf://org/name/other:train"), 0, [])
    assert prompts(tasks.training()) == ["held out", "in a", "in b", "a of more"]
    assert [task.id for task in tasks.training()] == ["name-test-0", "a-0", "b-0", "a.2-0"]
    assert prompts(tasks.held_out(9)) == ["d"]


def test_traces_may_lie_in_a_dataset(hub):
    hub.commit("org/traces", {"train.jsonl": lines({"id": "own", "expert_trace": TRACE})})
    hub.commit("org/name", {"train.jsonl": lines({"id": "own", "prompt": "q", "tools": [WEATHER]})})
    assert list(read_traces("hf://org/traces:train")) == ["own"]
    (task,) = FileTasks(DataConfig(train="hf://org/name:train", expert=["hf://org/traces:train"]), 0, []).training()
    assert task.expert


# --- errors ---


def test_a_bad_row_names_dataset_split_and_row_and_can_be_skipped(hub):
    sha = hub.commit("org/name", {"train.jsonl": lines({"prompt": "a"}) + "\nno json\n" + lines({"prompt": 3})})
    with pytest.raises(DataError, match=r"^hf://org/name:train:2: not valid JSON"):
        read_tasks("hf://org/name:train")
    name = f"hf://org/name@{sha}:train"  # as a run names it
    with pytest.raises(DataError, match=f"^hf://org/name@{sha[:7]}:train:2: not valid JSON"):
        read_tasks(name)
    source = FileTasks(DataConfig(train=name, on_bad_row="skip"), 0, [])
    assert len(source) == 1
    assert [(e.file, e.line, e.field) for e in source.skipped] == [
        (f"hf://org/name@{sha[:7]}:train", 2, ""), (f"hf://org/name@{sha[:7]}:train", 3, "prompt"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("hf://org/absent:train", "there is no such dataset at http.*hf auth login"),
        ("hf://org/name@v9:train", "there is no revision 'v9'"),
        ("hf://org/name@" + "0" * 40 + ":train", "there is no revision|Revision .* doesn't exist"),
        ("hf://org/name:dev", "there is no split 'dev'; its splits: test, train"),
        ("hf://org/name/none:train", "BuilderConfig 'none' not found.*main.*other"),
        ("hf://org/csv:train", r"train\.csv is neither JSON lines, a JSON array nor parquet; convert it"),
        ("hf://org/damaged:train", r"train\.parquet: is not a parquet file"),
        ("hf://org/empty:train", "holds no rows"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_the_cure(hub, name, problem):
    hub.commit("org/name", FILES)
    hub.commit("org/csv", {"train.csv": "prompt\nq\n"})
    hub.commit("org/damaged", {"train.parquet": "no"})
    hub.commit("org/empty", {"train.jsonl": "\n"})
    with pytest.raises(DataError, match=problem) as caught:
        read_tasks(name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_offline_says_so_and_how_to_go_on(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"cannot be reached \(HF_HUB_OFFLINE is set\).*hf download org/name --repo-type"
    ):
        read_tasks("hf://org/name:train")


# --- the commit that a run reads ---


def settings(train):
    return parse_config({"model": {"path": "m"}, "data": {"train": train}})


def test_names_are_resolved_to_commits_and_files(hub, tmp_path):
    sha = hub.commit("org/name", FILES)
    tag = hub.commit("org/name", {"train.jsonl": lines({"prompt": "z"})}, branch="v1")
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").touch()
    data = DataConfig(
        train=["hf://datasets/org/name:train", f"{tmp_path}/*.jsonl"], eval="hf://org/name@v1:train", expert="x.jsonl"
    )
    found = resolve_data(data)
    assert found.train == [f"hf://org/name@{sha}:train", f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
    assert (found.eval, found.expert) == (f"hf://org/name@{tag}:train", "x.jsonl")
    assert resolve_data(found) == found
    with pytest.raises(DataError, match="no file fits the pattern"):
        resolve_data(DataConfig(train=f"{tmp_path}/*.parquet"))


def test_a_resumed_run_keeps_its_commit_though_the_branch_has_moved(hub):
    old = hub.commit("org/name", FILES)
    recorded = resolve_data(DataConfig(train="hf://org/name:train"))
    new = hub.commit("org/name", {**FILES, "main/train-0.jsonl": lines({"prompt": "changed"})})
    assert resolve_data(DataConfig(train="hf://org/name:train"), recorded).train == f"hf://org/name@{old}:train"
    assert prompts(read_tasks(recorded.train)) == ["a", "b", "c"]
    moved = resolve_data(DataConfig(train="hf://org/name@main:train"), recorded)  # asked for by name
    assert moved.train == f"hf://org/name@{new}:train"
    ((key, before, after),) = fixed_changes(settings(recorded.train), settings(moved.train))
    assert (key, before, after) == ("data.train", recorded.train, moved.train)


def test_another_split_config_or_order_is_another_dataset(tmp_path):
    sha = "0" * 40
    one, two = f"hf://org/name@{sha}:train", f"hf://org/name@{sha}:test"
    file = tmp_path / "rows.jsonl"
    file.write_text(lines({"prompt": "q"}))
    copy = tmp_path / "copy.jsonl"
    copy.write_text(file.read_text())
    assert fixed_changes(settings(one), settings([one])) == []
    assert fixed_changes(settings([str(file), one]), settings([str(copy), one])) == []
    for old, new in (
        (one, two),
        (one, f"hf://org/name@{sha}/main:train"),
        ([one, two], [two, one]),
        (one, str(file)),
        (one, one.replace("org/", "other/")),
    ):
        assert [key for key, *_ in fixed_changes(settings(old), settings(new))] == ["data.train"]
    assert fixed_changes(settings(one), settings([one, two]))


@pytest.mark.slow
def test_a_run_records_the_commit_that_it_reads_and_resumes_with_it(hub, tmp_path):
    run, recipe, rows = tmp_path / "run", tmp_path / "tiny.yaml", tmp_path / "rows.jsonl"
    recipe.write_text(yaml.safe_dump({**TINY_RUN, "output_dir": str(run)}))
    write_tasks(rows, make_tasks(load_config(str(recipe))).train(0, 4))
    old = hub.commit("org/run", {"train.jsonl": rows.read_bytes()})

    def train(*settings):
        assert main(["train", str(recipe), "data.train=hf://org/run:train", "env.name=lookup_chain", *settings]) == 0
        return yaml.safe_load((run / "config.yaml").read_text())["data"]["train"]

    assert train() == f"hf://org/run@{old}:train"
    hub.commit("org/run", {"train.jsonl": lines({"prompt": "other", "answer": "1"})})
    assert train("resume=auto", "trainer.max_steps=2") == f"hf://org/run@{old}:train"
    assert (run / "checkpoints/step_2").exists()
