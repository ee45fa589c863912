"""model.chat_template_kwargs: they reach every rendering, and a variable that a template does not read is an error."""

from __future__ import annotations

import datetime

import pytest
import yaml

from pact_fast.chat.chat_template import QUESTION, ChatTemplate
from pact_fast.chat.rendering import ChatRenderer, make_renderer
from pact_fast.chat.template_check import check_template
from pact_fast.chat.template_variables import fix_date
from pact_fast.config import ModelConfig, load_config
from pact_fast.errors import PactError
from tests.support.trl_templates import tokenizer_for

pytest.importorskip("trl")  # for its chat templates


def test_they_reach_the_generation_prompt_and_the_text_between_turns():
    thinking, silent = (ChatRenderer(tokenizer_for("qwen3"), variables=v) for v in ({}, {"enable_thinking": False}))
    closed = "<think>\n\n</think>\n\n"
    assert not thinking.template.generation_prompt.endswith(closed)
    assert silent.template.generation_prompt.endswith(closed)
    result = [{"role": "tool", "name": "look_up", "content": "7"}]
    texts = [r.token_bytes.join(r.bridge_ids(result)).decode() for r in (thinking, silent)]
    assert texts[1] == texts[0] + closed


def test_they_come_from_the_settings(tmp_path):
    (tmp_path / "a.yaml").write_text(
        yaml.safe_dump({"model": {"path": "x", "chat_template_kwargs": {"date_string": "1 May"}}})
    )
    config = load_config(str(tmp_path / "a.yaml"))
    renderer = make_renderer(config.model, tokenizer_for("llama3_2"))
    assert "Today Date: 1 May" in renderer.template.render([QUESTION])
    from_the_command_line = load_config(str(tmp_path / "a.yaml"), ["model.chat_template_kwargs.date_string=2 May"])
    assert from_the_command_line.model.chat_template_kwargs == {"date_string": "2 May"}


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"enable_thinkin": False}, "has no variable 'enable_thinkin' \\(did you mean 'enable_thinking'"),
        ({"reasoning_effort": "low"}, "has no variable 'reasoning_effort'"),
        ({"tools": []}, "'tools' cannot be set"),
        ({"tokenize": True}, "'tokenize' cannot be set"),
        ({"strftime_now": "2025-06-30"}, "has no variable 'strftime_now'"),
    ],
)
def test_what_the_template_does_not_read_is_an_error(variables, reason):
    with pytest.raises(PactError, match=reason):
        ChatTemplate(tokenizer_for("qwen3"), variables)


def test_a_fixed_date_stands_in_for_the_clock():
    fixed = ChatRenderer(
        tokenizer_for("llama3_2"), variables={"strftime_now": datetime.date(2025, 6, 30)}
    )  # as YAML reads it
    assert "Today Date: 30 Jun 2025" in fixed.template.render([QUESTION])
    check_template(fixed)
    with pytest.raises(PactError, match="strftime_now: 2025-06-30"):
        check_template(ChatRenderer(tokenizer_for("llama3_2")))
    with pytest.raises(PactError, match="strftime_now is '1 May'; write a date"):
        ChatRenderer(tokenizer_for("llama3_2"), variables={"strftime_now": "1 May"})
    twice = """{{ strftime_now ( '%Y' ) + strftime_now("%d %b") }}"""
    assert fix_date(twice, "2025-06-30") == '{{ "2025" + "30 Jun" }}'
    with pytest.raises(PactError, match="cannot be fixed"):
        fix_date("{{ strftime_now(pattern) }}", "2025-06-30")


def test_without_any_nothing_changes():
    assert ModelConfig().chat_template_kwargs == {}
