"""The table "Models by name" of docs/models.md, row by row: what it says of decoders, engines and tool formats is so."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

from pact_fast.chat.formats.registry import get_format, tool_format
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.model.forward import unsupported
from pact_fast.model.logit_check import check_logits
from pact_fast.rollout.embedded.builder import unserved
from pact_fast.rollout.embedded.engine import engine_logprobs
from tests.support import call_templates, trl_templates
from tests.support.model_runs import KINDS as RUN
from tests.support.models import DECODERS, KINDS, MORE, make
from tests.support.trees import alone, as_tree, gradients, trees

PAGE = Path(__file__).parents[1] / "docs/models.md"
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
DATED = {"llama3_2", "gptoss"}


def rows() -> list[dict[str, str]]:
    table = PAGE.read_text(encoding="utf-8").split("## Models by name")[1].split("\n## ")[0]
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@functools.cache
def model_of(kind: str):
    return make(kind, **SPECIAL if kind in MORE else {}, **{"sliding_window": 4} if kind == "mistral" else {})


@pytest.mark.parametrize("row", rows(), ids=lambda row: row["models"])
def test_decoders_share_prefixes_and_are_served_as_the_row_says(row):
    kinds = quoted(row["decoder"])
    for kind in kinds:
        model = model_of(kind)
        assert row["prefixes"] == ("tree" if unsupported(model) is None else "paths")
        assert row["engines"] == ("embedded, vLLM" if unserved(model) is None else "vLLM")
    assert row["tested"] == ("run" if {*RUN, "qwen3"} & {*kinds} else "paths")
    assert {*kinds} <= {*KINDS, *DECODERS, *MORE}  # test_tree_models.py, test_tree_decoders.py and this file test them


@pytest.mark.parametrize("kind", MORE)
def test_a_decoder_that_no_other_test_makes_computes_trees_as_it_computes_paths(kind):
    model, forest = make(kind, **SPECIAL), trees()
    theirs = gradients(model, alone(model, forest))
    assert (gradients(model, as_tree(model, forest)) - theirs).norm() <= 5e-6 * theirs.norm()
    model = model.float()
    assert check_logits(model, engine=functools.partial(engine_logprobs, model) if unserved(model) is None else None)


@pytest.mark.parametrize(
    "row", [row for row in rows() if row["template tested"] != "none"], ids=lambda row: row["models"]
)
def test_the_template_of_a_model_writes_the_format_of_its_row(row):
    own, small = row["template tested"], row["template tested"].startswith("small")
    [name] = quoted(row["tool format"])
    for template in quoted(own):
        tokenizer = (call_templates if small else trl_templates).tokenizer_for(template)
        variables = {"strftime_now": "2025-06-30"} if template in DATED else None
        assert type(ChatRenderer(tokenizer, variables=variables).format) is type(get_format(name))


def test_every_tool_format_has_a_row():
    named = {name for row in rows() for name in quoted(row["tool format"])}
    others = quoted(PAGE.read_text(encoding="utf-8").split("## Tool formats")[1])
    assert set(tool_format.names()) <= {*named, *others}
