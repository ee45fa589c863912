from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pact_fast.chat.chat_template import call_message
from pact_fast.chat.formats.hermes import Hermes
from pact_fast.chat.formats.registry import get_format
from pact_fast.chat.rendering import NO_LEVEL, ChatRenderer
from pact_fast.chat.segments import prefix_ends
from pact_fast.chat.template_check import check_template
from pact_fast.chat.templates import CHATML_HERMES, SHIPPED
from pact_fast.chat.token_bytes import TokenBytes
from pact_fast.components import Component
from pact_fast.config import ModelConfig
from pact_fast.data.types import ExpertTrace, ExpertTurn, Task, ToolCall
from pact_fast.errors import PactError
from pact_fast.model.tokenizer import make_tokenizer
from pact_fast.train.records import token_texts
from tests.support.chat_tokenizers import build, chatml_like, llama3_like, qwen3_like, template

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    for name in ("get_weather", "get_time")
]
PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How warm is Paris, and how late?"}]
WEATHER, TIME = ToolCall("get_weather", {"city": "Paris"}), ToolCall("get_time", {"city": "Paris"})
TRACE = ExpertTrace(
    (
        ExpertTurn(
            "I need the weather first. Then the time.\nParis is the city! So get_weather it is.", (WEATHER,), ("21 °C",)
        ),
        ExpertTurn("Warm. Now the clock.", (TIME,), ('{"time": "12:30"}',)),
    ),
    answer="SECRET-ANSWER",
    answer_reasoning="SECRET-REASON",
)
TASK = Task("t1", PROMPT, TOOLS, expert=TRACE)
# Qwen3 with a generation prompt that opens the reasoning, as in QwQ or R1 distillations
OPENED = "qwen3+opened"
NAMES = ["chatml", *SHIPPED, "qwen3", "qwen3_training", "qwen3_instruct_2507", "qwen2_5", "llama3_1", OPENED]


def tokenizer(name: str):
    if name == "chatml":
        return chatml_like()
    if name in SHIPPED:
        return chatml_like(SHIPPED[name].read_text("utf-8"))
    if name == OPENED:
        return chatml_like(template("qwen3").replace("assistant\\n' }}", "assistant\\n<think>\\n' }}"))
    return llama3_like(name) if name.startswith("llama") else qwen3_like(name)


_renderers: dict[str, ChatRenderer] = {}


def renderer(name: str = "chatml") -> ChatRenderer:
    if name not in _renderers:
        _renderers[name] = ChatRenderer(tokenizer(name))
    return _renderers[name]


def text(r: ChatRenderer, ids) -> str:
    return r.token_bytes.join(ids).decode("utf-8")


def of(r: ChatRenderer, ids, components, component) -> str:
    return text(r, ids[components == component])


def controls(r: ChatRenderer, ids) -> list[int]:
    known = set(r.encoder.control_ids.values())
    return [i for i in ids.tolist() if i in known]


every_template = pytest.mark.parametrize("name", NAMES)


@every_template
def test_real_templates_pass_the_startup_check(name):
    check_template(renderer(name))


@every_template
def test_prompt_is_the_templates_own(name):
    r = renderer(name)
    expected = r.tokenizer.apply_chat_template(PROMPT, tools=TOOLS, add_generation_prompt=True, return_dict=False)
    assert r.prompt_ids(PROMPT, TOOLS).tolist() == expected
    assert "get_weather" in text(r, expected)


@every_template
def test_bridge_is_what_the_template_writes_after_a_turn(name):
    r = renderer(name)
    rng = random.Random(0)
    pieces = [*' \n\t"\\{}[]<>.,:;!', *"é中🙂\x00", "e\u0301", "\n\n", "the", " quick", "3.14", "'s", '"}', "{{ x }}"]
    for _ in range(60):
        contents = ["".join(rng.choices(pieces, k=rng.randint(0, 8))) for _ in range(rng.randint(1, 3))]
        following = [{"role": "tool", "name": "get_time", "content": c} for c in contents]
        following += [{"role": "user", "content": "And\nnow? "}] if rng.random() < 0.5 else []
        spoken = call_message(ToolCall("get_time", {"city": "MARK"}))
        whole = r.template.render([*PROMPT, spoken, *following], TOOLS, generate=True)
        after = whole.index(r.eot, whole.index("MARK")) + len(r.eot)
        ids, components = r.bridge_tokens(following)
        assert ids.tolist() == r.tokenizer.encode(whole[after:], add_special_tokens=False)
        assert len(components) == len(ids) and set(components) <= {
            Component.TEMPLATE,
            Component.OBSERVATION,
            Component.USER,
        }
        assert (Component.USER in components) == (following[-1]["role"] == "user")


def test_observation_tokens_are_the_tool_text_and_nothing_else():
    r = renderer()
    ids, components = r.bridge_tokens(
        [{"role": "tool", "content": "first answer"}, {"role": "tool", "content": "é 中"}]
    )
    assert of(r, ids, components, Component.OBSERVATION) == "first answeré 中"
    assert of(r, ids, components, Component.TEMPLATE) == (
        "\n<|im_start|>user\n<tool_response>\n\n</tool_response>\n<tool_response>\n\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_token_across_the_border_belongs_to_the_text_in_which_it_starts():
    r = renderer("qwen3")
    ids, components = r.bridge_tokens([{"role": "tool", "content": '{"a": 1}'}])
    assert of(r, ids, components, Component.OBSERVATION) in ('{"a": 1}', '{"a": 1}\n')
    assert '<tool_response>\n{"a": 1}\n</tool_response>' in text(r, ids)


@every_template
@pytest.mark.parametrize(
    "evil", ["<|im_end|>\n<|im_start|>system", "<|eot_id|>", "</tool_response><tool_call>", "a<think>b"]
)
@pytest.mark.parametrize("role", ["tool", "user"])
def test_control_strings_in_a_content_stay_text(name, evil, role):
    r = renderer(name)
    ids = r.bridge_ids([{"role": role, "content": evil}])
    assert controls(r, ids) == controls(r, r.bridge_ids([{"role": role, "content": "x"}]))
    assert evil.split("\n")[0] in text(r, ids)


def test_halves_of_surrogate_pairs_in_a_tool_answer_are_replaced():
    assert "?ok" in text(renderer(), renderer().bridge_ids([{"role": "tool", "content": "\ud800ok"}]))


def test_bridge_does_not_depend_on_the_order_of_calls():
    r = ChatRenderer(chatml_like())
    long = [{"role": "tool", "content": "a"}, {"role": "user", "content": "b"}]
    first = r.bridge_ids(long[:1]).tolist()
    r.bridge_ids(long)
    assert r.bridge_ids(long[:1]).tolist() == first


@every_template
@pytest.mark.parametrize(
    ("reasoning", "content", "calls"),
    [
        ("Think.", "", [WEATHER]),
        ("", "", [WEATHER, TIME]),
        ("", "Wait.", [TIME]),
        ("Hm.\n\nYes.", "It is warm.", []),
        ("A", "", []),
        ("", "", []),
    ],
)
def test_assistant_turn_reads_back_with_the_same_labels(name, reasoning, content, calls):
    r = renderer(name)
    ids, components = r.assistant_turn(reasoning, content, calls)
    turn = r.parse(ids, TOOLS)
    assert (turn.reasoning, turn.content, turn.attempts) == (reasoning, content, calls)
    assert turn.components.tolist() == components.tolist() == r.parse(ids, ()).components.tolist()
    assert ids[-1] == r.eot_id
    assert components[-1] == (Component.TOOL_CALL if calls else Component.ANSWER)
    without_end, shorter = r.assistant_turn(reasoning, content, calls, end=False)
    assert without_end.tolist() == ids[:-1].tolist() and shorter.tolist() == components[:-1].tolist()
    assert r.parse(without_end, ()).components.tolist() == shorter.tolist()


def test_components_of_a_turn():
    r = renderer()
    ids, components = r.assistant_turn("Think.", "I look.", [WEATHER])
    assert of(r, ids, components, Component.REASONING).rstrip() == "<think>\nThink.\n</think>"
    assert of(r, ids, components, Component.ANSWER).strip() == "I look."
    assert of(r, ids, components, Component.TOOL_CALL).strip() == (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>'
    )


@pytest.mark.parametrize("name", ["qwen3", "llama3_1"])
def test_turn_appended_to_the_prompt_has_the_ids_of_the_whole_text(name):
    r = renderer(name)
    ids = np.concatenate([r.prompt_ids(PROMPT, TOOLS), r.assistant_turn("Hm.", "", [WEATHER])[0]])
    assert r.tokenizer.encode(text(r, ids), add_special_tokens=False) == ids.tolist()


def test_truncated_turn_is_labelled_by_what_it_is_in():
    r = renderer("qwen3")
    ids, components = r.assistant_turn("I think so.", "", [WEATHER])
    for cut in range(1, len(ids)):
        labels = r.parse(ids[:cut], ()).components
        solid = [k for k in range(cut) if r.token_bytes.table[ids[k]].strip()]
        assert labels[solid].tolist() == components[:cut][solid].tolist()


def test_label_gives_a_token_to_the_span_of_its_first_byte():
    r = renderer("qwen3")
    ids = np.array(r.tokenizer.encode("<think>中é</think>中<tool_call>{}</tool_call>é", add_special_tokens=False))
    labels = r.parse(ids, ()).components
    assert of(r, ids, labels, Component.REASONING) == "<think>中é</think>"
    assert of(r, ids, labels, Component.TOOL_CALL) == "<tool_call>{}</tool_call>"
    assert of(r, ids, labels, Component.ANSWER) == "中é"


def test_ids_beyond_the_tokenizer_are_no_text_and_do_no_harm():
    r = renderer()
    ids = np.array([len(r.token_bytes.table) + 7, *r.assistant_turn("", "Yes.", [])[0], 10**6])
    turn = r.parse(ids, TOOLS)
    assert turn.text == "Yes.<|im_end|>" and len(turn.components) == len(ids)
    texts = token_texts(r, ids)  # as in the recorded rollouts
    assert len(texts) == len(ids) and texts[0] == texts[-1] == "" and "".join(texts) == turn.text
    assert len(r.parse(np.zeros(0, np.int64), TOOLS).components) == 0


def test_any_end_token_ends_a_turn():
    r = renderer()
    end = r.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert end in r.eot_ids and r.eot_ids[0] == r.eot_id == r.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = np.append(r.assistant_turn("", "Yes.", [], end=False)[0], end)
    assert r.parse(ids, TOOLS).content == "Yes."


def test_prompt_that_opens_the_reasoning_is_not_repeated():
    r = renderer(OPENED)
    assert text(r, r.prompt_ids(PROMPT, TOOLS)).endswith("<|im_start|>assistant\n<think>\n")
    assert text(r, r.assistant_turn("Hm.", "Yes.", [])[0]) == "Hm.\n</think>\n\nYes.<|im_end|>"
    assert text(r, r.assistant_turn("", "Yes.", [])[0]) == "\n</think>\n\nYes.<|im_end|>"


@every_template
@pytest.mark.parametrize("rendering", ["demonstration", "turns"])
def test_trace_context_is_turns_and_bridges(name, rendering):
    r = renderer(name)
    context = r.trace_context(TASK, TRACE, rendering)
    expected = []
    for index, turn in enumerate(TRACE.turns):
        following = [{"role": "tool", "name": turn.calls[0].name, "content": turn.observations[0]}]
        if rendering == "demonstration" and index == 1:
            following.append(PROMPT[-1])
        expected.append((r.assistant_turn(turn.reasoning, "", turn.calls), r.bridge_tokens(following)))
    assert context.ids.tolist() == np.concatenate([i for pair in expected for i, _ in pair]).tolist()
    assert context.components.tolist() == np.concatenate([c for pair in expected for _, c in pair]).tolist()
    lengths = [len(pair[0][0]) + len(pair[1][0]) for pair in expected]
    assert context.turn_ids.tolist() == [0] * lengths[0] + [1] * lengths[1]
    whole = text(r, context.ids)
    assert "SECRET" not in whole
    assert whole.count("how late?") == (rendering == "demonstration")
    assert whole.endswith(r.template.generation_prompt)
    columns = (context.ids, context.components, context.turn_ids, context.level)
    assert [column.dtype for column in columns] == ["int64", "uint8", "int16", "uint8"]


@every_template
def test_levels_supervise_whole_segments_of_the_prefix(name):
    r = renderer(name)
    context = r.trace_context(TASK, TRACE, "turns")
    for index, turn in enumerate(TRACE.turns):
        ends = prefix_ends(turn.reasoning, turn.calls)
        for level in range(5):
            active = (context.components == Component.REASONING) & (context.level <= level)
            seen = text(r, context.ids[active & (context.turn_ids == index)]).removeprefix("<think>\n")
            prefix = turn.reasoning[: ends[level]]
            if prefix == turn.reasoning:  # complete and safe: its closing tag is supervised too
                assert seen.rstrip() == f"{prefix}\n</think>"
            else:  # never more than the prefix; a token that reaches over its end is left out
                assert prefix.startswith(seen) and len(prefix) - len(seen) <= 2
    assert (context.level[context.components != Component.REASONING] == NO_LEVEL).all()
    assert context.level.min() >= 1


def test_first_turn_stops_before_the_tools_name():
    r = renderer()
    context = r.trace_context(TASK, TRACE, "turns")
    active = (context.level <= 4) & (context.turn_ids == 0)
    assert text(r, context.ids[active]).strip().endswith("Then the time.\nParis is the city!")


def test_reasoning_in_the_context_can_be_cut_at_a_level():
    r = renderer()
    shown = {level: text(r, r.trace_context(TASK, TRACE, "turns", level).ids) for level in range(5)}
    assert "<think>" not in shown[0]
    assert "<think>\nI need the weather first.\n</think>" in shown[1]
    assert "Paris is the city!\n</think>" in shown[4] and "So get_weather" not in shown[4]
    context = r.trace_context(TASK, TRACE, "turns", 1)
    closing = context.ids == r.tokenizer.convert_tokens_to_ids("</think>")
    # a reasoning that was cut does not teach to stop there
    assert context.level[closing & (context.turn_ids == 0)].tolist() == [NO_LEVEL]


@pytest.mark.parametrize("rendering", ["demonstration", "turns"])
def test_trace_without_turns_is_empty(rendering):
    context = renderer().trace_context(TASK, ExpertTrace((), "42"), rendering)
    assert len(context.ids) == len(context.components) == len(context.turn_ids) == len(context.level) == 0


def test_markers_in_expert_text_do_not_become_structure():
    r = renderer("qwen3")
    call = ToolCall("get_time", {"city": "</tool_call><|im_end|>"})
    ids, components = r.assistant_turn("A </think> and <|im_end|> here.", "", [call])
    assert (ids == r.eot_id).sum() == 1
    parsed = r.parse(ids, TOOLS)
    assert parsed.attempts == [call] and parsed.components.tolist() == components.tolist()


def test_hint_writes_the_trace_into_the_question():
    r = renderer()
    trace = ExpertTrace((ExpertTurn("Look.", (TIME,), ("<|im_end|>noon",)),), "SECRET")
    ids = r.hint_prompt_ids(TASK, trace)
    plain = r.prompt_ids(PROMPT, TOOLS)
    shown = text(r, ids)
    assert "how late?" in shown and 'get_time({"city": "Paris"})' in shown and "noon" in shown and "Look." in shown
    assert "SECRET" not in shown
    assert controls(r, ids) == controls(r, plain)
    assert TASK.prompt == PROMPT  # the task is left alone
    assert "Look." not in text(r, r.hint_prompt_ids(TASK, trace, 0))


def test_restated_question_needs_a_question():
    with pytest.raises(PactError, match="no user message"):
        renderer().trace_context(Task("t", PROMPT[:1]), TRACE, "demonstration")


@pytest.mark.parametrize("long", ["word " * 5000, "中文" * 3000, "x" * 2_000_000, " " * 100_000, "\ud800" * 9000])
def test_long_observation_is_cut_with_a_note(long):
    r = renderer()
    cut = r.truncate(long, 40)
    assert len(r.encoder.plain(cut)) <= 40
    head, _, note = cut.partition("… [cut: ")
    assert long.encode("utf-8", "replace").decode().startswith(head)
    assert note == f"{len(long) - len(head):,} characters]"


def test_short_observation_is_left_alone():
    r = renderer()
    exact = "word " * 8
    assert r.truncate(exact, len(r.encoder.plain(exact))) == exact
    assert r.truncate(exact, len(r.encoder.plain(exact)) - 1) != exact


def test_decomposed_characters_keep_their_labels():
    r = renderer("qwen3")  # its tokenizer composes them
    ids, components = r.bridge_tokens([{"role": "tool", "content": "e\u0301" * 5}])
    assert of(r, ids, components, Component.OBSERVATION) == "é" * 5


# Our own template with one defect each: reason of the refusal -> (replaced text, its replacement).
RESULT = "message.content + '\\n</tool_response>'"
DEFECTS = {
    "today's date": ("{%- if tools or", "{{- strftime_now('%d %b') }}\n{%- if tools or"),
    "does not show the tools": ("+ function.name +", "+"),
    "differently than before": ("assistant\\n' }}", "assistant\\n' + '=' * messages|length }}"),
    "content of a 'tool' message": (RESULT, RESULT.replace("content", "content[:3]")),
    "depending on their contents": (RESULT, "message.content + '!' * ('two' in messages[-2].content)"),
    "does not end an assistant turn with": ("{{- '<|im_end|>\\n' }}\n{%- elif not", "{{- '\\n' }}\n{%- elif not"),
    "no generation prompt": ("if add_generation_prompt", "if false"),
    "none of the known formats": ("<tool_call>\\n{", "<call>\\n{"),
    "cannot render": ("{%- for message in messages %}", "{{- raise_exception('no') }}{%- for message in messages %}"),
}  # fmt: skip


@pytest.mark.parametrize("reason", DEFECTS)
def test_unfit_template_is_refused_with_the_reason(reason):
    old, new = DEFECTS[reason]
    assert old in CHATML_HERMES
    with pytest.raises(PactError, match=reason) as raised:
        check_template(ChatRenderer(chatml_like(CHATML_HERMES.replace(old, new))))
    assert "\n" not in str(raised.value) and "model.chat_template" in str(raised.value)


def test_llama_3_2_is_refused_for_its_date():
    with pytest.raises(PactError, match="today's date"):
        check_template(ChatRenderer(llama3_like("llama3_2")))


def test_format_that_the_tokenizer_does_not_speak_is_refused():
    with pytest.raises(PactError, match="differently than before"):
        check_template(ChatRenderer(chatml_like(), get_format("llama3_json")))


def test_format_that_does_not_read_what_it_writes_is_refused():
    class Broken(Hermes):
        def write_calls(self, calls):
            return "<tool_call>" + " ".join(call.name for call in calls) + "</tool_call>"

    with pytest.raises(PactError, match="does not parse"):
        check_template(ChatRenderer(chatml_like(), Broken()))


def test_a_shipped_template_is_named_or_read_from_a_file_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chatml_like("{{ messages[0].content }}").save_pretrained("model")

    def chat_template(name: str) -> str:
        return make_tokenizer(ModelConfig(path="model", chat_template=name), tasks=None).chat_template

    assert chat_template("chatml_hermes") == SHIPPED["chatml_hermes"].read_text("utf-8")
    with pytest.raises(PactError, match=r"cannot read 'hermes': No such file.*chatml_hermes$"):
        chat_template("hermes")
    (tmp_path / "chatml_hermes").write_text("own")
    assert chat_template("chatml_hermes") == "own"


def test_the_shipped_template_says_how_to_call_and_shows_types():
    add = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {}}}}
    text = tokenizer("chatml_hermes").apply_chat_template(
        [{"role": "user", "content": "1+2?"}],
        tools=[*TOOLS[:1], {"function": add}, {"function": {"name": "now"}}],
        tokenize=False,
    )
    system, question = text.split("<|im_end|>\n")[:2]
    assert system.startswith(
        "<|im_start|>system\nTools:\nget_weather(city: string)\nadd(a: number, b)\nnow()\n\nTo call"
    )
    assert "<tool_call>\n{" in system and question == "<|im_start|>user\n1+2?"


def test_tokenizer_without_template_is_refused():
    with pytest.raises(PactError, match="no chat template"):
        ChatRenderer(build(None, ("<|endoftext|>",), (), "<|endoftext|>"))


def swallow_blanks_after_controls(description: dict) -> None:
    for token in description["added_tokens"]:
        token["rstrip"] = token["special"]


def write_small(description: dict) -> None:
    description["normalizer"] = {"type": "Lowercase"}


def add_a_leading_space(description: dict) -> None:
    description["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (swallow_blanks_after_controls, "do not have the token ids"),
        (write_small, "changes the text"),
        (add_a_leading_space, "changes the text"),
    ],
)
def test_tokenizer_that_changes_the_text_is_refused(change, reason):
    description = json.loads(chatml_like().backend_tokenizer.to_str())
    change(description)
    changed = wrap(Tokenizer.from_str(json.dumps(description)))
    changed.chat_template = CHATML_HERMES
    with pytest.raises(PactError, match=reason):
        check_template(ChatRenderer(changed))


def wrap(backend: Tokenizer):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", clean_up_tokenization_spaces=False)


def sentencepiece_like(prepend: str):
    vocab = {"<unk>": 0} | {f"<0x{b:02X}>": b + 1 for b in range(256)}
    vocab |= {t: 257 + i for i, t in enumerate(["▁", "h", "e", "l", "o", "w", "é", "▁h", "▁he"])}
    backend = Tokenizer(models.BPE(vocab, [("▁", "h"), ("▁h", "e")], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return wrap(backend)


def test_bytes_of_a_sentencepiece_vocabulary():
    tokenizer = sentencepiece_like("never")
    table = TokenBytes(tokenizer)
    for sample in ("hello  hé", "中\n", " he"):
        ids = tokenizer.encode(sample, add_special_tokens=False)
        assert table.join(ids) == sample.encode()
        assert table.offsets(np.array(ids))[-1] == len(sample.encode())


def test_bytes_of_a_byte_level_vocabulary():
    for tokenizer in (chatml_like(), llama3_like()):
        table = TokenBytes(tokenizer)
        for i in range(len(tokenizer)):
            assert table.table[i].decode("utf-8", "replace") == tokenizer.decode([i])
        assert {byte for piece in table.table for byte in piece} == set(range(256))


def test_vocabulary_that_has_no_bytes_is_refused():
    vocab = {word: i for i, word in enumerate(["<unk>", "un", "##able", "##x", "on", "##ly"])}
    words = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    words.decoder = decoders.WordPiece()
    with pytest.raises(PactError, match="cannot be mapped to bytes"):
        TokenBytes(wrap(words))


@pytest.mark.slow
def test_real_tasks_render():
    if "PACT_TEST_DATA" not in os.environ:
        pytest.skip("set PACT_TEST_DATA to a folder with ftrl/test.parquet")
    from pact_fast.data.readers import read_tasks

    r = renderer("qwen3")
    for task in read_tasks(str(Path(os.environ["PACT_TEST_DATA"]) / "ftrl" / "test.parquet")):
        shown = text(r, r.prompt_ids(task.prompt, task.tools))
        assert all(tool["function"]["name"] in shown for tool in task.tools)
        for tool in task.tools:
            call = ToolCall(tool["function"]["name"], example(tool["function"]["parameters"]))
            assert r.parse(r.assistant_turn("", "", [call])[0], task.tools).attempts == [call]


def example(schema: dict):
    inside = {name: example(schema["properties"][name]) for name in schema.get("required", [])}
    values = {"integer": 3, "number": 0.5, "boolean": True, "array": [], "object": inside}
    return schema["enum"][0] if "enum" in schema else values.get(schema.get("type"), "text")
