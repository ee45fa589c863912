"""`pact-fast doctor MODEL`: its output for a model folder."""

from __future__ import annotations

import pytest
from transformers import GptOssConfig, Qwen3Config

from pact_fast.cli.main import main
from pact_fast.cli.model_row import APPENDED, BRANCHES, is_model
from tests.support.trl_templates import tokenizer_for

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


def printed(capsys, folder, *settings) -> tuple[int, dict[str, str]]:
    """(status, line by name)."""
    status = main(["doctor", str(folder), *settings])
    lines = [line.split(None, 1) for line in capsys.readouterr().out.splitlines()]
    return status, {text.partition(":")[0]: f"{state} {text.partition(': ')[2]}" for state, text in lines}


def test_the_row_of_a_model_says_what_works(tmp_path, capsys):
    Qwen3Config(**SIZES).save_pretrained(tmp_path)
    tokenizer_for("qwen3").save_pretrained(tmp_path)
    status, row = printed(capsys, tmp_path)
    assert status == 0 and row["decoder"].startswith("ok qwen3; layers: 2 of full_attention")
    assert row["prefixes"].startswith("ok tree") and row["engine"] == "ok embedded, vLLM"
    assert row["format"].startswith(
        "ok Hermes, several calls per turn; reasoning between <think> and </think>, left open"
    )
    assert row["template"].startswith("ok appended turns equal") and row["user turns"] == f"ok {BRANCHES}"
    _, row = printed(capsys, tmp_path, "model.chat_template_kwargs={enable_thinking: false}")
    assert row["user turns"] == f"ok {APPENDED}" and ", closed by" in row["format"]


def test_what_does_not_work_is_a_line_with_the_cure(tmp_path, capsys):
    GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1).save_pretrained(tmp_path)
    tokenizer_for("gptoss").save_pretrained(tmp_path)
    status, row = printed(capsys, tmp_path)
    assert status == 1 and "1 of sliding_attention" in row["decoder"] and "not the embedded one" in row["engine"]
    assert row["template"].startswith("FAIL") and "strftime_now" in row["template"]
    status, row = printed(capsys, tmp_path, "model.chat_template_kwargs={strftime_now: 2025-06-30}")
    assert status == 0 and row["format"].startswith("ok Harmony, one call per turn")
    assert main(["doctor", str(tmp_path), "seed=1"]) != 0 and "section `model`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "model"),
    [
        ("Qwen/Qwen3-0.6B", True),
        ("quickstart", False),
        ("mine.yaml", False),
        ("runs/mine.yaml", False),
        ("a/b/c", False),
    ],
)
def test_a_name_of_the_hub_is_told_from_a_recipe(source, model):
    assert is_model(source) is model


def test_a_folder_without_a_configuration_is_no_model(tmp_path):
    assert not is_model(str(tmp_path))
