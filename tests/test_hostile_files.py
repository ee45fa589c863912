"""Files that a run does not expect: a user's own, links, damaged checkpoints, model folders, templates, parquet."""

from __future__ import annotations

import json
import mmap
import os
import random
import re
import time
from pathlib import Path
from types import SimpleNamespace

import jinja2.sandbox
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers

from pact_fast.chat import segments as reasoning_segments
from pact_fast.chat.chat_template import ChatTemplate
from pact_fast.chat.segments import segments
from pact_fast.config import ModelConfig, load_config
from pact_fast.data import row_files
from pact_fast.data.readers import read_tasks
from pact_fast.errors import DataError, PactError
from pact_fast.files import write_named, write_text
from pact_fast.limits import memory_limit, time_limit
from pact_fast.model.build import architecture, from_config, from_pretrained, make_model
from pact_fast.report import write_view
from pact_fast.train import checkpoint, checkpoint_writer
from pact_fast.train.pack_budget import with_pack_budget
from pact_fast.train.run_dir import FILES, FOLDERS, HEADER, open_run, save_config

pytestmark = pytest.mark.hostile


def settings(run: Path, *overrides: str):
    return load_config("quickstart", [f"output_dir={run}", "resume=auto", *overrides])


# the run directory


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_a_link_where_a_run_writes_is_refused(name, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    other.mkdir() if name in FOLDERS else other.write_text("precious")
    (run / name).symlink_to(other)
    with pytest.raises(PactError, match="is a symbolic link") as caught:
        open_run(settings(run), resumed=False)
    assert f"{run / name} " in str(caught.value)
    assert os.listdir(run) == [name] and (name in FOLDERS or other.read_text() == "precious")


@pytest.mark.parametrize(
    ("name", "make"),
    [("metrics.jsonl", Path.mkdir), ("rollouts", Path.touch), ("checkpoints", Path.touch), ("summary.json", os.mkfifo)],
)
def test_something_else_where_a_run_writes_is_refused(name, make, tmp_path):
    make(tmp_path / name)
    with pytest.raises(PactError, match=rf"{name} is not a f"):
        open_run(settings(tmp_path), resumed=False)


@pytest.mark.parametrize("text", ["model: {path: x}\n", "seed: [\n", "", "# The resolved settings\n", "full"])
def test_a_config_yaml_of_the_users_is_not_replaced(text, tmp_path):
    if text == "full":  # a run's settings, edited: the user's file
        save_config(settings(tmp_path))
        text = (tmp_path / "config.yaml").read_text().removeprefix(HEADER)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(PactError, match=r"config\.yaml was not written by a run"):
        open_run(settings(tmp_path), resumed=False)
    assert (tmp_path / "config.yaml").read_text() == text and os.listdir(tmp_path) == ["config.yaml"]


def test_what_an_interrupted_start_left_is_replaced(tmp_path):
    save_config(settings(tmp_path, "seed=3"))
    (tmp_path / ".tokenizer.abcdefgh.tmp").mkdir()
    (tmp_path / ".config.yaml.x1234567.tmp").write_text("half")
    mine = [".mine.12345678.tmp", ".notes"]
    for name in mine:
        (tmp_path / name).touch()
    open_run(settings(tmp_path), resumed=False)
    assert sorted(os.listdir(tmp_path)) == [*mine, "config.yaml", "rollouts"]
    assert load_config(str(tmp_path / "config.yaml")).seed == 0


def lost(run: Path, how: str) -> None:
    """A run whose checkpoints cannot be used any more."""
    save_config(settings(run))
    (run / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1, "loss": 1.0}\n')
    if how == "latest":
        (run / "latest").write_text("step_1\n")
    elif how == "finished":
        (run / "summary.json").write_text("{}")
    elif how == "a file":
        (run / "checkpoints").mkdir()
        (run / "checkpoints/step_99").touch()
    else:
        (run / "checkpoints/step_1").mkdir(parents=True)


@pytest.mark.parametrize("how", ["latest", "finished", "a file", "damaged"])
def test_a_run_without_a_usable_checkpoint_is_never_begun_anew(how, tmp_path):
    lost(tmp_path, how)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert checkpoint.latest(tmp_path / "checkpoints") is None
    with pytest.raises(PactError, match=r"no checkpoint that can be used .*; restore .* or delete .* to start again"):
        open_run(settings(tmp_path), resumed=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("line", ['{"step": 1, "loss": 1.0}', '{"step": 1, "lo', "[]", "[" * 5000])
def test_trained_steps_without_a_checkpoint_are_repeated_with_the_same_settings_only(line, tmp_path):
    save_config(settings(tmp_path))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n' + line)
    with pytest.raises(PactError, match="cannot be resumed with other settings: seed"):
        open_run(settings(tmp_path, "seed=1"), resumed=False)
    assert (tmp_path / "metrics.jsonl").read_text().endswith(line)
    assert "first steps are repeated" in (open_run(settings(tmp_path), resumed=False) or "")


def test_a_token_budget_that_is_no_number_is_named(tmp_path):
    (tmp_path / "max_tokens_per_pack").write_text("many")
    with pytest.raises(PactError, match="max_tokens_per_pack does not hold a number"):
        with_pack_budget(settings(tmp_path), tmp_path, SimpleNamespace(), torch.device("cpu"), print)  # type: ignore[arg-type]


MANIFESTS = [
    [], {}, {"step": 1}, {"step": "1", "files": {}}, {"step": 1, "files": []}, {"step": 1, "files": {"state.json": 7}},
    {"step": 1, "files": {"state.json": {"size": None}}}, {"step": 1, "files": {"state.json": {}, "../x": {"size": 1}}},
]  # fmt: skip


@pytest.mark.parametrize("damage", ["manifest", "state", "header", "state list", "model header"])
def test_damage_of_the_right_size_is_passed_over(damage, tmp_path, caplog):
    def save(step: int) -> Path:
        def model(path: Path) -> None:
            path.mkdir()

        tensors = {"optimizer": {"w": torch.zeros(4)}}
        weights = {"w": torch.zeros(3)}
        return checkpoint_writer.save(
            tmp_path, step, tensors=tensors, state={"x": 1}, write_model=model, weights=weights, keep=9
        )

    older, newer = save(1), save(2)
    files = {"state": "state.json", "state list": "state.json", "header": "optimizer.safetensors"}
    path = newer / files.get(damage, "model/model.safetensors" if damage == "model header" else "manifest.json")
    if damage == "manifest":
        for manifest in MANIFESTS:
            path.write_text(json.dumps(manifest))
            assert checkpoint.latest(tmp_path) == older
            with pytest.raises(PactError, match=r"manifest\.json is damaged"):
                checkpoint.load(newer)
        return
    size = path.stat().st_size
    path.write_bytes(
        (b"[1]" if damage == "state list" else b"\xff").ljust(size, b" " if "state" in damage else b"\xff")
    )
    assert checkpoint.latest(tmp_path) == older
    assert f"{path.relative_to(newer)} " in caplog.text and "damaged" in caplog.text
    with pytest.raises(PactError, match="damaged"):
        checkpoint.load(newer)


def test_metrics_of_a_copy_by_hard_links_are_not_cut(tmp_path):
    first, copy = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"1\n2\n")
    os.link(first, copy)
    checkpoint.rewind_metrics(copy, 2)
    assert first.read_bytes() == b"1\n2\n" and copy.read_bytes() == b"1\n"


# written files


def test_pages_replace_links_and_keep_what_they_point_to(tmp_path):
    run, other = tmp_path / "run", tmp_path / "precious"
    (run / "rollouts").mkdir(parents=True)
    other.write_text("precious")
    (run / "view.html").symlink_to(other)
    assert write_view(run) == run / "view.html"
    assert other.read_text() == "precious" and not (run / "view.html").is_symlink()
    assert sorted(os.listdir(run)) == ["rollouts", "view.html"]


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    (tmp_path / "a").write_text("old")
    write_text(tmp_path / "a", "new \ud800")
    assert (tmp_path / "a").read_text() == "new ?" and (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~umask()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", tmp_path / "no/a", tmp_path / ("x" * 300)):
        with pytest.raises(PactError, match="cannot write"):
            write_named(path, "text")
    assert sorted(os.listdir(tmp_path)) == ["a", "folder"]
    write_named(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(PactError, match="No space left"):
        write_named(Path("/dev/full"), "text")


def umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


# model folders

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    config = transformers.AutoConfig.for_model("qwen3", vocab_size=32, num_key_value_heads=1, **TINY)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def damaged(folder: Path, target: Path, **changes: object) -> ModelConfig:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return ModelConfig(path=str(target))


MODELS = {
    "a layer without weights": (
        {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
        r"no weights for model\.layers\.2\..* and \d+ more",
    ),
    "another width": ({"hidden_size": 24}, "cannot load the model"),
    "no layers": ({"num_hidden_layers": "two"}, "cannot load the model"),
    "endless layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, and no model has more"),
    "no heads": ({"num_attention_heads": 0}, "cannot load the model"),
    "own code": (
        {"model_type": "mine", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "c.M"}},
        "code of its own, which is never run",
    ),
    "a kernel from the hub": ({"attn_implementation": "org/kernel"}, None),
    "an unknown quantization": ({"quantization_config": {"quant_method": "nonsense"}}, None),
    "a list of quantizations": ({"quantization_config": [1]}, None),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_folder_that_is_none_is_one_line(name, folder, tmp_path):
    changes, problem = MODELS[name]
    model = damaged(folder, tmp_path / "model", **changes)
    (tmp_path / "model/c.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = SimpleNamespace(model=model, trainer=SimpleNamespace(deepspeed=None), seed=0)
    try:
        make_model(config, None, path=model.path)  # type: ignore[arg-type]
    except PactError as error:
        assert "\n" not in str(error) and len(str(error)) < 700
        assert problem is None or re.search(problem, str(error)), str(error)
    else:
        assert problem is None
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b"\xff" * 100), ("model.safetensors", b""), ("config.json", b"[]"), ("config.json", b"{"),
        ("config.json", b'{"model_type": ["a"]}'), ("config.json", b"[" * 5000),
    ],
)  # fmt: skip
def test_damaged_files_of_a_model_are_one_line(file, content, folder, tmp_path):
    model = damaged(folder, tmp_path / "model")
    (tmp_path / "model" / file).write_bytes(content)
    config = SimpleNamespace(model=model, trainer=SimpleNamespace(deepspeed=None), seed=0)
    with pytest.raises(PactError, match="cannot load the model") as caught:
        make_model(config, None, path=model.path)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"[]", b"{}", b'{"model": {"type": "BPE"}}', b"\xff", b'{"model": [' * 400])
def test_a_tokenizer_of_another_shape_is_one_line(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(PactError, match="cannot load the tokenizer") as caught:
        from_pretrained(transformers.AutoTokenizer, str(tmp_path), "tokenizer")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "init", [{"hidden_size": "x"}, {"num_attention_heads": 0}, {"num_hidden_layers": 10**9}, {"model_type": "nothing"}]
)
def test_a_random_model_that_cannot_be_is_one_line(init):
    with pytest.raises(PactError, match=r"model\.random_init: ") as caught:
        from_config(architecture(ModelConfig(random_init={**TINY, **init})), "model.random_init")
    assert "\n" not in str(caught.value)


# templates


class Templated:
    """A tokenizer, as far as templates go, in the sandbox that transformers renders them in."""

    def __init__(self, source: str):
        self.chat_template = source

    def apply_chat_template(self, messages, **variables):
        sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment()
        return sandbox.from_string(self.chat_template).render(messages=messages, **variables)


TEMPLATES = {
    "{{ 1 / 0 }}": "division by zero",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "recursion",
    "{% for i in range(10**9) %}{% endfor %}": "cannot render",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "takes more than 0.5 s",
    "{{ 'x' * 30000000000 }}": "1 GB of memory|MemoryError",
    "{{ messages.x.y }}": "cannot render",
    "{{ ().__class__.__base__.__subclasses__() }}": "cannot render|unsafe",
}


@pytest.mark.slow
@pytest.mark.parametrize("source", TEMPLATES)
def test_a_template_is_a_program_whose_errors_are_one_line(source, monkeypatch):
    monkeypatch.setattr("pact_fast.chat.chat_template.RENDER_SECONDS", 0.5)
    with pytest.raises(PactError, match=TEMPLATES[source]) as caught, memory_limit(2**30, "the chat template"):
        ChatTemplate(Templated(source)).render([{"role": "user", "content": "hi"}])
    assert "\n" not in str(caught.value) and "model.chat_template" in str(caught.value)


def test_limits_end_the_work_and_leave_no_trace():
    started = time.monotonic()
    with pytest.raises(PactError, match=r"the work takes more than 0\.2 s"), time_limit(0.2, "the work"):
        while True:
            sum(range(1000))
    assert time.monotonic() - started < 60
    with pytest.raises(PactError, match=r"the work takes more than 0\.25 GB"), memory_limit(2**28, "the work"):
        bytearray(2**29)
    with memory_limit(2**28, "the work", reserved=2**29):  # as an allocator takes before it is asked for much
        mmap.mmap(-1, 2**29).close()
    with time_limit(0.2, "sleep"):
        time.sleep(0.4)  # takes no time of a core
    assert len(bytearray(2**29)) == 2**29


# data


def test_a_parquet_file_that_becomes_far_larger_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "BATCH_BYTES", 2**26)
    text = "0" * 2**20
    table = pa.table({"prompt": pa.array([text] * 512).dictionary_encode(), "answer": ["1"] * 512})
    pq.write_table(table, tmp_path / "bomb.parquet", compression="zstd", use_dictionary=True)
    assert (tmp_path / "bomb.parquet").stat().st_size < 2**20
    with pytest.raises(DataError, match=r"bomb\.parquet: .*made to exhaust the memory"):
        read_tasks(tmp_path / "bomb.parquet")


def test_repeated_values_of_honest_files_are_read(tmp_path):
    table = pa.table({"prompt": ["What is it? " * 50] * 2000, "answer": ["1"] * 2000})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd")
    assert len(read_tasks(tmp_path / "a.parquet")) == 2000


REASONING = [
    "." * 64_000 + "a",
    "…" * 64_000 + "a",
    '."' * 32_000 + "a",
    ".*_" * 21_000 + "a",
    "!?" * 32_000 + "a",
    "http://.",
]


@pytest.mark.parametrize("text", REASONING, ids=range(len(REASONING)))
def test_segments_take_linear_time(text):
    started = time.thread_time()
    assert segments(text)[-1][1] == len(text)
    assert time.thread_time() - started < 1


def test_segments_are_what_they_were(monkeypatch):
    """The pattern that tries every start and every length of a run of stops is the oracle."""
    new = reasoning_segments._SCAN.pattern
    plain = new.replace("(?<![.!?…])", "").replace("++", "+").replace("*+", "*")
    assert len(plain) == len(new) - 13
    rng = random.Random(0)
    texts = ["".join(rng.choices("..!…\"')*_ ab\n`。0", k=rng.randrange(40))) for _ in range(3000)]
    found = [segments(text) for text in texts]
    monkeypatch.setattr(reasoning_segments, "_SCAN", re.compile(plain, re.VERBOSE | re.DOTALL))
    assert found == [segments(text) for text in texts]
    assert sum(len(spans) > 2 for spans in found) > 500
