"""Chat templates that need more than a question and a list of tools: named ones, and those that want call ids."""

from __future__ import annotations

import json

import pytest
import yaml
from transformers import AutoTokenizer

from pact_fast.chat.call_ids import with_call_ids
from pact_fast.chat.chat_template import ChatTemplate, call_message
from pact_fast.chat.formats.hermes import Hermes
from pact_fast.chat.rendering import ChatRenderer
from pact_fast.chat.row_check import RowCheck, RowLimits
from pact_fast.chat.template_check import check_template
from pact_fast.chat.templates import CHATML_HERMES
from pact_fast.cli.main import main
from pact_fast.data.types import ExpertTrace, Task, ToolCall
from pact_fast.errors import DataError, PactError
from pact_fast.train.run_dir import folder_content
from tests.support.chat_tokenizers import CHATML, TAGS, build
from tests.support.data_rows import QUESTION, TRACE, WEATHER
from tests.support.runs import TINY_RUN

# As Hermes 2 Pro and 3 have them: `default` knows no tools; `tool_use` cannot do without, writes a system turn of its own,
# and a line break after a tool result only if the conversation goes on.
DEFAULT = """\
{{- bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
TOOL_USE = """\
{{- bos_token + '<|im_start|>system\\nYou may call: <tools>' }}
{%- for tool in tools %}
{%- set tool = tool.function %}
{{- ' ' + tool.name + ' - ' + tool.description + ' ' + tool.parameters | tojson }}
{%- endfor %}
{{- ' </tools><|im_end|>\\n' }}
{%- for m in messages %}
{%- if m.role in ('user', 'system') or (m.role == 'assistant' and m.tool_calls is not defined) %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{{- '<|im_start|>assistant' }}
{%- for call in m.tool_calls %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>tool\\n' if loop.previtem.role != 'tool' }}
{{- '<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{{- '\\n' if not loop.last }}
{{- '<|im_end|>' if loop.last or loop.nextitem.role != 'tool' }}
{%- endif %}
{%- endfor %}
{{- '<|im_start|>assistant\\n' if add_generation_prompt }}"""
BOTH = {"default": DEFAULT, "tool_use": TOOL_USE}
NAMED = {  # name → (value of chat_template, names that are read)
    "dict": (BOTH, ["default", "tool_use"]),
    "list": ([{"name": name, "template": text} for name, text in BOTH.items()], ["default", "tool_use"]),
    "with others": ({**BOTH, "rag": "{{ raise_exception('not this') }}"}, ["default", "rag", "tool_use"]),
    "tool_use alone": ({"tool_use": TOOL_USE}, ["tool_use"]),
    "default alone": ({"default": TOOL_USE}, ["default"]),
    "one of another name": ({"hermes": TOOL_USE}, ["hermes"]),
    "no name": (TOOL_USE, None),
}


def tokenizer_of(chat_template):
    tokenizer = build(chat_template, CHATML, TAGS, "<|im_end|>")
    tokenizer.bos_token = "<|endoftext|>"
    return tokenizer


def usable(tokenizer) -> ChatRenderer:
    """The renderer, after the check at start-up; Hermes' line break is the only note."""
    renderer = ChatRenderer(tokenizer)
    (note,) = check_template(renderer)
    assert "other blanks" in note and "\n" not in note
    assert isinstance(renderer.format, Hermes)
    return renderer


def transformers_prompt(tokenizer, messages, tools) -> list[int]:
    return tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)


@pytest.mark.parametrize("case", NAMED)
def test_tools_choose_the_template(case):
    tokenizer = tokenizer_of(NAMED[case][0])
    renderer = usable(tokenizer)
    tokenizer.chat_template = TOOL_USE
    assert renderer.prompt_ids(QUESTION, [WEATHER]).tolist() == transformers_prompt(tokenizer, QUESTION, [WEATHER])
    spoken = call_message(*[ToolCall("weather", {"city": "Oslo"})] * 2)
    results = [{"role": "tool", "name": "weather", "content": text} for text in ("7", "8")]
    whole = tokenizer.apply_chat_template(
        [*QUESTION, spoken, *results], tools=[WEATHER], add_generation_prompt=True, tokenize=False
    )
    ids = [
        renderer.assistant_turn("", "", [ToolCall("weather", {"city": "Oslo"})] * 2)[0],
        renderer.bridge_ids(results),
    ]
    text = renderer.token_bytes.join([i for part in ids for i in part.tolist()]).decode()
    assert whole.endswith("<|im_start|>assistant\n" + text)


@pytest.mark.parametrize("case", ["dict", "list", "with others"])
def test_rows_without_tools_have_the_default_template(case):
    tokenizer = tokenizer_of(NAMED[case][0])
    renderer = usable(tokenizer)
    tokenizer.chat_template = DEFAULT
    assert renderer.prompt_ids(QUESTION, []).tolist() == transformers_prompt(tokenizer, QUESTION, None)


@pytest.mark.parametrize("case", ["dict", "with others", "tool_use alone"])
@pytest.mark.parametrize("stored", ["folder", "list in tokenizer_config.json"])
def test_templates_are_read_from_every_place_where_transformers_keeps_them(case, stored, tmp_path):
    given, names = NAMED[case]
    tokenizer_of(given).save_pretrained(tmp_path, save_jinja_files=stored == "folder")
    if stored == "folder":
        assert (tmp_path / "additional_chat_templates" / "tool_use.jinja").exists()
    else:
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        assert [entry["name"] for entry in config["chat_template"]] == list(given)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert sorted(loaded.chat_template) == names
    assert "You may call" in usable(loaded).template.render(QUESTION, [WEATHER])
    expected = "additional_chat_templates/tool_use.jinja" if stored == "folder" else "tokenizer_config.json"
    assert expected in folder_content(tmp_path)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rag": DEFAULT, "chat": TOOL_USE}, r"several chat templates \(chat, rag\).*model\.chat_template"),
        ({}, "no chat template"),
        ([], "no chat template"),
        ("", "no chat template"),
        ({"default": DEFAULT}, "none of the known formats"),
        ({"default": TOOL_USE, "tool_use": DEFAULT}, "none of the known formats"),
    ],
)
def test_templates_without_a_choice_or_without_tools_are_refused(given, words):
    tokenizer = tokenizer_of(CHATML_HERMES)
    tokenizer.chat_template = given
    with pytest.raises(PactError, match=words) as caught:
        ChatRenderer(tokenizer)
    assert "\n" not in str(caught.value)


def check_row(renderer: ChatRenderer, tools, **row) -> None:
    task = Task(
        "t", row.pop("prompt", QUESTION), tools, expert=ExpertTrace.from_messages(TRACE) if tools else None, **row
    )
    RowCheck(renderer, RowLimits(prompt=500, window=1000, trace="demonstration")).check(task)


def test_a_row_without_tools_whose_template_prompts_otherwise_is_refused():
    check_row(usable(tokenizer_of(BOTH)), [WEATHER])
    check_row(usable(tokenizer_of(BOTH)), [])
    other = {**BOTH, "default": DEFAULT.replace("assistant\\n", "assistant\\n<think>\\n")}
    renderer = usable(tokenizer_of(other))
    check_row(renderer, [WEATHER])
    with pytest.raises(DataError, match=r"ends its prompt with .*<think>"):
        check_row(renderer, [])
    alone = usable(tokenizer_of(TOOL_USE))
    with pytest.raises(DataError, match=r"cannot render a conversation of user: .*NoneType"):
        check_row(alone, [])


def test_only_blanks_beside_control_tokens_may_change():
    for old, new in ((" if not loop.last", " if false"), ("'\\n' if not loop.last", "'.' if not loop.last")):
        changed = TOOL_USE.replace(old, new)
        assert changed != TOOL_USE
        renderer = ChatRenderer(tokenizer_of(changed))
        if new.endswith("false"):
            assert check_template(renderer) == []
        else:
            with pytest.raises(PactError, match="differently than before"):
                check_template(renderer)


@pytest.mark.slow
def test_a_run_keeps_both_templates_of_its_tokenizer(tmp_path, capsys):
    tokenizer_of(BOTH).save_pretrained(tmp_path / "given")
    recipe, run = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump({**TINY_RUN, "output_dir": str(run)}))
    settings = [
        "train",
        str(recipe),
        f"model.tokenizer={tmp_path / 'given'}",
        "trainer.eval_tasks=1",
        "rollout.max_prompt_length=700",
    ]
    settings += ["pretrain={steps: 1, batch_size: 1}"]
    bad = tmp_path / "bad.py"
    bad.write_text(
        "from pathlib import Path\n\ndef score(completions, **kwargs):\n"
        "    return [len(Path(__file__).with_name('given.txt').read_text()) for _ in completions]\n"
    )
    assert main([*settings, f"algorithm.reward.functions=['{bad}:score']"]) == 2  # leaves tokenizer and base behind
    output = capsys.readouterr().err
    assert "other blanks" in output and "reward function" in output
    (tmp_path / "given.txt").touch()
    assert main([*settings, f"algorithm.reward.functions=['{bad}:score']", "resume=auto"]) == 0
    for folder in (run / "tokenizer", run / "checkpoints/step_1/model"):
        assert AutoTokenizer.from_pretrained(folder).chat_template == BOTH


# --- call ids ---

HEAD = "{%- for message in messages %}\n"
NINE = {  # the requirement of templates on ids, in the words of Mistral's
    "nine": "{id} is not defined or {id} | length != 9",
    "at least nine": "not {id} is defined or {id} | length < 9",
    "letters and digits": "{id} is undefined or {id} | length != 9 or ({id} | list | select('in', '-_') | list)",
    "any": "{id} is undefined",
}


def with_ids(condition: str, shown: bool = False) -> str:
    """CHATML_HERMES, which refuses calls and results without such ids, and shows them or not."""
    refuse = (
        "{{%- if {} %}}{{{{ raise_exception('Tool call IDs should be alphanumeric, length 9!') }}}}{{%- endif %}}\n"
    )
    calls = (
        f"{{%- for call in message.tool_calls or [] %}}{refuse.format(condition.format(id='call.id'))}{{%- endfor %}}\n"
    )
    result = refuse.format(f"message.role == 'tool' and ({condition.format(id='message.tool_call_id')})")
    found = CHATML_HERMES.replace(HEAD, HEAD + calls + result)
    assert found != CHATML_HERMES
    return (
        found.replace("<tool_response>\\n'", "<tool_response id=' + message.tool_call_id + '>\\n'") if shown else found
    )


HISTORIES = {  # ids of two calls and of their results
    "none": ((None, None), (None, None)),
    "long": (("call_0123456789", "call_9876543210"), ("call_0123456789", "call_9876543210")),
    "out of order": (("a", "b"), ("b", "a")),
    "nine": (("abcdefghi", "123456789"), ("abcdefghi", "123456789")),
}


def history(calls, results):
    """A prompt with a turn of two calls."""
    turn = call_message(ToolCall("weather", {"city": "Oslo"}), ToolCall("weather", {"city": "Rome"}))
    for entry, given in zip(turn["tool_calls"], calls, strict=True):
        entry |= {"id": given} if given else {}
    tools = [{"role": "tool", "name": "weather", "content": "7"} | ({"tool_call_id": i} if i else {}) for i in results]
    return [*QUESTION, turn, *tools, {"role": "assistant", "content": "7"}, *QUESTION]


@pytest.mark.parametrize("condition", NINE)
def test_a_template_that_needs_call_ids_is_usable(condition):
    needs, plain = (ChatRenderer(tokenizer_of(text)) for text in (with_ids(NINE[condition]), CHATML_HERMES))
    assert check_template(needs) == []
    following = [{"role": "tool", "name": "weather", "content": "7"}] * 2
    assert needs.bridge_ids(following).tolist() == plain.bridge_ids(following).tolist()
    for case in HISTORIES.values():
        prompt = history(*case)
        assert needs.prompt_ids(prompt, [WEATHER]).tolist() == plain.prompt_ids(prompt, [WEATHER]).tolist()
        check_row(needs, [WEATHER], prompt=prompt)


def test_ids_of_rows_are_left_alone_where_a_template_does_without():
    shows = CHATML_HERMES.replace(
        "{{- message.content or '' }}", "{{- message.tool_calls[0].id if message.tool_calls }}"
    )
    assert shows != CHATML_HERMES
    text = ChatTemplate(tokenizer_of(shows)).render(history(*HISTORIES["long"]), [WEATHER])
    assert "call_0123456789" in text


def test_call_ids_by_hand():
    given = [*history(*HISTORIES["out of order"]), *history(*HISTORIES["none"])]
    found = with_call_ids(given)
    for turn, results in ((1, ["call00001", "call00000"]), (7, ["call00000", "call00001"])):
        assert [call["id"] for call in found[turn]["tool_calls"]] == ["call00000", "call00001"]
        assert [message["tool_call_id"] for message in found[turn + 1 : turn + 3]] == results
    assert given == [*history(*HISTORIES["out of order"]), *history(*HISTORIES["none"])]
    assert with_call_ids(history(("a", "a"), ("a", "a")))[3]["tool_call_id"] == "call00001"  # ids that tell nothing


def test_a_template_that_shows_ids_in_results_is_appended_alike():
    """Numbering of ids restarts in every turn, so the text between two turns does not depend on those before it."""
    renderer = ChatRenderer(tokenizer_of(with_ids(NINE["nine"], shown=True)))
    assert check_template(renderer) == []
    results = [{"role": "tool", "name": "weather", "content": text} for text in ("7", "8")]
    text = renderer.token_bytes.join(renderer.bridge_ids(results)).decode()
    assert "id=call00000>\n7" in text and "id=call00001>\n8" in text


def test_a_template_that_takes_one_call_per_turn_is_probed_with_one():
    single = CHATML_HERMES.replace(
        HEAD,
        HEAD
        + "{%- if (message.tool_calls or []) | length > 1 %}{{ raise_exception('only single tool-calls') }}{% endif %}\n",
    )
    renderer = ChatRenderer(tokenizer_of(single))
    assert not renderer.template.several_calls and check_template(renderer) == []
    assert ChatRenderer(tokenizer_of(CHATML_HERMES)).template.several_calls


def test_a_turn_of_several_calls_is_part_of_the_check():
    apart = CHATML_HERMES.replace("{{- '\\n' if message.content or", "{{- '\\n-' if message.content or")
    assert apart != CHATML_HERMES
    with pytest.raises(PactError, match="after turn 2 the chat template renders the conversation differently"):
        check_template(ChatRenderer(tokenizer_of(apart)))
