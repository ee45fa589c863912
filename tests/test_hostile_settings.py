"""Settings from strangers: YAML that was made to take all time and memory, values that are none, secrets."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from pact_fast.config import load_config
from pact_fast.config.secrets import check_secrets
from pact_fast.config.settings_file import MAX_CHARACTERS, load_yaml
from pact_fast.data.rows import MAX_DEPTH, read_json
from pact_fast.errors import DataError, PactError
from pact_fast.text import SHOWN, one_line, short, visible
from tests.support.runs import TINY_RUN

pytestmark = pytest.mark.hostile


def tower(first: str, step: str) -> str:
    """Anchors a to i, each of nine aliases of the one before."""
    lines = [f"a: &a {first}"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} {step.format(','.join([f'*{before}'] * 9))}")
    return "\n".join(lines) + "\n"


YAML = {
    "billion laughs": (tower("[x, x, x]", "[{}]"), "stands for more than 10,000 values"),
    "merge keys": (tower("{x: 1, y: 2}", "{{<<: [{}]}}"), "stands for more than 10,000 values"),
    "an alias in its anchor": ("seed: &a [*a]\n", "inside its own anchor"),
    "brackets": ("seed: " + "[" * 3000, "more than 50 levels deep"),
    "block sequences": ("- " * 3000 + "x", "more than 50 levels deep"),
    "many values": ("x: [" + "1," * 40_000 + "]", "stands for more than 10,000 values"),
    "a long file": ("# comment\n" * (MAX_CHARACTERS // 9), "characters; settings are at most 100,000 long"),
    "digits": ("seed: " + "9" * 5000, "cannot be read: Exceeds the limit"),
    "a day that is none": ("output_dir: 2026-02-30", "cannot be read: day is out of range"),
    "a month that is none": ("2026-13-01: 1", "cannot be read: month must be in 1..12"),
    "a Python object": ("seed: !!python/object/apply:os.system [ls]", "not valid YAML: line 1, column 7"),
    "a NUL": ("seed: \0", "not valid YAML"),
    "a list as a key": ("? [a]\n: 2", "unhashable key"),
    "an escape sequence": ('seed: "\\e]0;owned\\a"', "seed"),
    "too large a seed": ("seed: 18446744073709551616", "less than 9223372036854775808"),
    "a huge seed": ("seed: 0x" + "f" * 6000, "an integer of 24000 bits"),
    "nested lists as a seed": ("seed: " + "[" * 40 + "]" * 40, "found [[[["),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml_of_a_stranger_is_one_short_line(name, tmp_path):
    text, problem = YAML[name]
    (tmp_path / "s.yaml").write_text(text)
    started = time.thread_time()
    with pytest.raises(PactError) as caught:
        load_config(str(tmp_path / "s.yaml"))
    assert time.thread_time() - started < 2
    message = str(caught.value)
    assert problem in message and "s.yaml" in message
    assert len(message) < 500 + len(str(tmp_path)) and message == one_line(message)


@pytest.mark.parametrize("name", ["billion laughs", "brackets", "digits", "many values"])
def test_settings_of_the_command_line_are_bounded_alike(name):
    text, problem = YAML[name]
    value = text.removeprefix("seed: ") if text.startswith("seed: ") else text
    with pytest.raises(PactError, match=r"^'env\.args'") as caught:
        load_config("quickstart", [f"env.args={value}"])
    assert problem in str(caught.value) and len(str(caught.value)) < 400


def test_settings_of_ordinary_size_are_read():
    data = {"a": [1, 2.5, None, True, "x"], "b": {"c": {"d": list(range(100))}}}
    assert load_yaml(yaml.safe_dump(data)) == data
    assert load_yaml("base: &b {x: 1}\nmore: {<<: *b, y: 2}\n") == {"base": {"x": 1}, "more": {"x": 1, "y": 2}}
    assert load_yaml("") is None and load_yaml("# nothing\n") is None


def test_json_is_nested_a_hundred_levels_at_most():
    assert read_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x")
    assert read_json(json.dumps({"code": "{[" * 500}), "x") == {"code": "{[" * 500}
    for depth in (MAX_DEPTH + 1, 900, 200_000):
        with pytest.raises(DataError, match="not readable JSON"):
            read_json("[" * depth + "]" * depth, "x")
        with pytest.raises(DataError, match="not readable JSON"):
            read_json('{"a":' * depth + "1" + "}" * depth, "x")


# secrets

SECRETS = [
    ("rollout.vllm_args.api_key=k3y", "VLLM_API_KEY"), ("rollout.vllm_args={hf_token: k3y}", "HF_TOKEN"),
    ("rollout.vllm_args.hfToken=k3y", "HF_TOKEN"), ("env.args={login: {password: k3y}}", "PASSWORD"),
    ("algorithm.args={x: [{secret_key: k3y}]}", "SECRET_KEY"), ("env.args.Authorization=k3y", "AUTHORIZATION"),
    ("rollout.vllm_server_base_url=http://me:k3y@host:8000", "VLLM_API_KEY"), ("api_key=k3y", "API_KEY"),
    ("rollout.vllm_server_base_url=http://host/?api_key=k3y", "VLLM_API_KEY"),
    ("model.path=https://me:k3y@hub/model", "HF_TOKEN"), ("env.args.note=hf_k3yk3yk3yk3yk3yk3yk3y", "NOTE"),
    ("data.train=s3://k3y:k3y@bucket/x.jsonl", "HF_TOKEN"), ("model.random_init={token: k3y}", "HF_TOKEN"),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "variable"), SECRETS)
def test_a_secret_is_refused_unseen_and_the_variable_is_named(setting, variable):
    with pytest.raises(PactError) as caught:
        load_config("quickstart", [setting])
    assert f"set {variable}" in str(caught.value) and "config.yaml" in str(caught.value)
    assert "k3y" not in str(caught.value)


def test_settings_that_only_sound_like_secrets_pass():
    check_secrets(
        {
            "eos_token": "<|im_end|>", "max_tokens": 5, "tokenizer": "x", "pad_token_id": 0, "max_num_batched_tokens": 7,
            "use_auth_token": False, "api_key": None, "key": "city", "keys": ["a"], "monkey": 1, "secretary": "Ann",
            "base_url": "http://host:8000/v1", "path": "org/model@main", "time": "10:30", "x": "a://b", "token_ids": [1],
        }
    )  # fmt: skip


# shown values


def test_values_are_shown_short_and_without_control_characters():
    for value in ("x" * 10**7, ["x" * 10**6] * 1000, {i: "y" for i in range(10**5)}, 10**100_000, -(10**5000)):
        started = time.thread_time()
        assert len(short(value)) <= SHOWN
        assert time.thread_time() - started < 0.5
    assert short("hot") == "'hot'" and short(None) == "None" and short(12345) == "12345"
    assert short("a\x1b]0;\u202e") == r"'a\x1b]0;\u202e'"


def test_no_character_that_moves_the_cursor_or_reorders_text_is_shown():
    bad = "\x1b\x07\x9b\r\u202e\u2066\u2028\u061c\ufeff\U000e0041\ud800"
    assert visible(f"a{bad}b") == r"a\x1b\x07\x9b\r\u202e\u2066\u2028\u061c\ufeff\U000e0041\ud800b"
    assert one_line("a\nerror: b\tc") == "a\\nerror: b\tc"
    assert visible("naïve 中文 🙂\n\t") == "naïve 中文 🙂\n\t"


def test_task_ids_of_a_stranger_do_not_reach_the_terminal(tmp_path, capsys):
    from pact_fast.cli.main import main

    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"id": "\x1b]0;owned\x07\nerror: b", "prompt": "word " * 900, "answer": "1"}) + "\n")
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY_RUN, "output_dir": str(tmp_path / "run")}))
    arguments = [str(path), f"data.train={rows}", "env.name=lookup_chain"]
    assert main(["train", *arguments]) == 2
    shown = capsys.readouterr().err
    assert "\x1b" not in shown and "\x07" not in shown and "\nerror: b" not in shown and "max_prompt_length" in shown
    assert not Path(tmp_path / "run").exists() or not (tmp_path / "run/metrics.jsonl").exists()
