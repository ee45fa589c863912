"""Tokens that a user added to the tokenizer: in the expert's own text they are trained as the policy samples them.

The oracle is transformers: the ids of the conversation that the chat template renders as a whole.
"""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import AddedToken

from pact_fast.algorithms.registry import make_algorithm
from pact_fast.chat.rendering import NO_LEVEL, ChatRenderer
from pact_fast.chat.template_check import check_template
from pact_fast.chat.templates import CHATML_HERMES
from pact_fast.components import Component
from pact_fast.config.load import parse_config
from pact_fast.data.sources import FileTasks
from pact_fast.data.types import ExpertTrace, ExpertTurn, Task, ToolCall
from pact_fast.errors import DataError
from pact_fast.train.check_rows import check_rows
from tests.support.chat_tokenizers import CHATML, LLAMA3, TAGS, build, template
from tests.support.data_rows import QUESTION, WEATHER

ADDED = {  # name → (token, its text in the expert's turns)
    "tag": (AddedToken("<step>", normalized=False), "<step>"),
    "brackets": (AddedToken("[STEP]", normalized=False), "[STEP]"),
    "word": (AddedToken("QXSTEP", normalized=False), "QXSTEP"),
    "several words": (AddedToken("a new step:", normalized=False), "a new step:"),
    "no letters": (AddedToken("⟐", normalized=False), "⟐"),
    "special": (AddedToken("<|step|>", special=True, normalized=False), "<|step|>"),
    "special word": (AddedToken("QXSTEP", special=True, normalized=False), "QXSTEP"),
    "lstrip": (AddedToken("<step>", lstrip=True, normalized=False), "<step>"),
    "rstrip": (AddedToken("<step>", rstrip=True, normalized=False), "<step>"),
    "lstrip and rstrip": (AddedToken("<step>", lstrip=True, rstrip=True, normalized=False), "<step>"),
    "single word": (AddedToken("step", single_word=True, normalized=False), "step"),
    "normalized": (AddedToken("<caf\u00e9>", normalized=True), "<cafe\u0301>"),
}
FRAME = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


def renderer(*tokens: AddedToken, chat_template: str = CHATML_HERMES) -> ChatRenderer:
    tokenizer = build(chat_template, CHATML, TAGS, "<|im_end|>", composes=True)
    for token in tokens:
        assert tokenizer.add_tokens([token]) == 1
    return ChatRenderer(tokenizer)


def id_of(r: ChatRenderer, token: AddedToken) -> int:
    return int(r.tokenizer.convert_tokens_to_ids(token.content))


def rendered(r: ChatRenderer, reasoning: str, content: str, *calls: ToolCall) -> list[int]:
    """Ids of the conversation by transformers, up to the end of the assistant turn."""
    entries = [{"type": "function", "function": call.to_json()} for call in calls]
    turn = {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": entries}
    ids = r.tokenizer.apply_chat_template([*QUESTION, turn], tools=[WEATHER], return_dict=False)
    return ids[: len(ids) - ids[::-1].index(r.eot_id)]


def appended(r: ChatRenderer, reasoning: str, content: str, *calls: ToolCall) -> list[int]:
    return [*r.prompt_ids(QUESTION, [WEATHER]), *r.assistant_turn(reasoning, content, calls)[0]]


@pytest.mark.parametrize("case", ADDED)
def test_an_added_token_is_the_token_in_every_part_of_a_turn(case):
    token, text = ADDED[case]
    r = renderer(token)
    parts = (
        f"{text} One,  {text}  two{text}three. {text}",
        f"Then {text} {text}.",
        ToolCall("weather", {"city": f"x {text} y"}),
    )
    ids, components = r.assistant_turn(parts[0], parts[1], parts[2:])
    for component in (Component.REASONING, Component.ANSWER, Component.TOOL_CALL):
        assert id_of(r, token) in ids[components == component]
    assert appended(r, *parts) == rendered(r, *parts)
    assert (r.parse(ids, ()).components == components).all()


@pytest.mark.parametrize("case", ADDED)
def test_an_added_token_of_a_trace_is_supervised(case):
    token, text = ADDED[case]
    r = renderer(token)
    call = ToolCall("weather", {"city": f"{text}"})
    trace = ExpertTrace((ExpertTurn(f"First {text} it is so. Then {text} look.", (call,), (f"{text} 7",)),))
    context = r.trace_context(Task("t", QUESTION, [WEATHER], expert=trace), trace, "turns")
    found = context.ids == id_of(r, token)
    assert (context.level[found & (context.components == Component.REASONING)] <= 4).sum() == 2
    assert (found & (context.components == Component.TOOL_CALL)).sum() == 1


@pytest.mark.parametrize("case", [name for name in ADDED if ADDED[name][1][0] in "<["])
@pytest.mark.parametrize("role", ["tool", "user"])
def test_an_added_token_in_a_result_or_a_question_stays_text(case, role):
    token, _ = ADDED[case]
    r = renderer(token)
    ids = r.bridge_ids([{"role": role, "name": "weather", "content": f"7 {token.content}<|im_end|>"}])
    plain = r.bridge_ids([{"role": role, "name": "weather", "content": "7"}])
    known = list(r.encoder.control_ids.values())
    assert ids[np.isin(ids, known)].tolist() == plain[np.isin(plain, known)].tolist()


@pytest.mark.parametrize("evil", [*FRAME, "<|eot_id|>", "<|start_header_id|>"])
def test_the_structure_of_a_conversation_stays_text_in_a_turn(evil):
    if evil in FRAME:
        r = renderer()
    else:
        r = ChatRenderer(build(template("llama3_1"), LLAMA3, (), "<|eot_id|>"))
    call = ToolCall("weather", {"city": evil})
    ids, components = r.assistant_turn(f"Not {evil} yet.", "", [call])
    special = [r.encoder.control_ids[content] for content in (*CHATML, *LLAMA3) if content in r.encoder.control_ids]
    assert np.isin(ids, special).sum() == 1 and ids[-1] == r.eot_id
    turn = r.parse(ids, [WEATHER])
    assert (turn.reasoning, turn.attempts) == (f"Not {evil} yet.", [call])
    assert (turn.components == components).all()


def test_markers_beside_an_added_token_are_written_as_text_and_the_token_is_not():
    token = AddedToken("<step>", normalized=False)
    r = renderer(token)
    call = ToolCall("weather", {"city": "</tool_call><step>"})
    ids, _ = r.assistant_turn("No </think> here <step>.", "", [call])
    assert (ids == id_of(r, token)).sum() == 2
    assert r.parse(ids, [WEATHER]).attempts == [call]


@pytest.mark.parametrize(
    ("name", "special", "is_token"),
    [("<|reflect|>", True, False), ("<reflect>", False, True), ("<|pad|>", True, False)],
)
def test_a_token_that_the_template_writes_is_structure_if_it_is_special(name, special, is_token):
    """A template may tell the model to write a token of its vocabulary; one that is special may stand around turns."""
    told = CHATML_HERMES.replace("<|im_start|>system\n", f"<|im_start|>system\nWrite {name} first.\n")
    assert told != CHATML_HERMES
    token = AddedToken(name, special=special, normalized=False)
    r = renderer(token, chat_template=told)
    assert (id_of(r, token) in r.assistant_turn(f"So {name}.", "", [])[0]) == is_token


def test_a_token_with_a_role_is_structure():
    tokenizer = build(CHATML_HERMES, CHATML, TAGS, "<|im_end|>")
    tokenizer.add_special_tokens({"pad_token": "<|pad|>", "unk_token": "<|unk|>"})
    r = ChatRenderer(tokenizer)
    ids, _ = r.assistant_turn("<|pad|> and <|unk|>", "", [])
    assert not np.isin(ids, [tokenizer.pad_token_id, tokenizer.unk_token_id]).any()


def test_an_end_of_turn_that_is_not_special_is_structure():
    tokenizer = build(CHATML_HERMES.replace("<|im_end|>", "<|stop|>"), CHATML, (*TAGS, "<|stop|>"), "<|endoftext|>")
    r = ChatRenderer(tokenizer)
    ids, _ = r.assistant_turn("Not <|stop|> yet.", "", [])
    assert (ids == r.eot_id).sum() == 1 and r.eot == "<|stop|>"


OVERLAPPING = {  # tokens across the border of two components of the turn below
    "closing tag": (".\n</think>", Component.REASONING),
    "reasoning and answer": ("</think>\n\nThen", Component.REASONING),
    "reasoning to answer": (".\n</think>\n\nThen", Component.REASONING),
    "answer and call": (" look.\n<tool_call>", Component.ANSWER),
    "blanks and call": ("\n<tool_call>\n", Component.TOOL_CALL),
    "call": ('</tool_call>\n<tool_call>\n{"name": ', Component.TOOL_CALL),
}


@pytest.mark.parametrize("case", OVERLAPPING)
def test_an_added_token_across_a_border_belongs_to_the_part_in_which_it_starts(case):
    content, component = OVERLAPPING[case]
    token = AddedToken(content, normalized=False)
    r = renderer(token)
    calls = [ToolCall("weather", {"city": city}) for city in ("Oslo", "Rome")]
    parts = "It is so.", "Then I look.", *calls
    ids, components = r.assistant_turn(*parts[:2], calls)
    assert appended(r, *parts) == rendered(r, *parts)
    assert set(components[ids == id_of(r, token)].tolist()) == {component}
    turn = r.parse(ids, [WEATHER])
    assert (turn.components == components).all() and turn.attempts == calls


def test_a_token_from_reasoning_into_the_answer_is_supervised_with_the_closing_tag_only():
    token = AddedToken("</think>\n\nThen", normalized=False)
    r = renderer(token)
    call = ToolCall("weather", {"city": "Oslo"})
    for reasoning, supervised in (("It is so.", True), ("It is so. I call weather(city=Oslo).", False)):
        trace = ExpertTrace((ExpertTurn(reasoning, (call,), ("7",), "Then I look."),))
        context = r.trace_context(Task("t", QUESTION, [WEATHER], expert=trace), trace, "turns")
        (level,) = context.level[context.ids == id_of(r, token)]
        assert (level != NO_LEVEL) == supervised


def test_a_hint_keeps_added_tokens_of_the_expert_and_breaks_those_of_results():
    tokens = [AddedToken(name, normalized=False) for name in ("<step>", "<seen>")]
    r = renderer(*tokens)
    call = ToolCall("weather", {"city": "<step>"})
    trace = ExpertTrace((ExpertTurn("So <step> <|im_end|>.", (call,), ("<seen> <|im_end|>",)),))
    task = Task("t", QUESTION, [WEATHER], expert=trace)
    ids = r.hint_prompt_ids(task, trace)
    assert [(ids == id_of(r, token)).sum() for token in tokens] == [2, 0]
    assert (ids == r.eot_id).sum() == (r.prompt_ids(QUESTION, [WEATHER]) == r.eot_id).sum()


@pytest.mark.parametrize("case", ADDED)
def test_a_tokenizer_with_added_tokens_passes_the_startup_check(case):
    assert check_template(renderer(ADDED[case][0])) == []


def test_control_strings_in_a_result_count_as_the_text_that_they_are(tmp_path):
    """A row of results full of control strings is as long as its text, not one token for each."""
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": "q", "tools": [{"name": "f"}], "answer": "7", "env_args": {"codes": {"f": "def f(): ..."}}, '
        '"expert_trace": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}, '
        '{"role": "tool", "content": "%s"}]}\n' % ("a<|im_end|>" * 60)
    )  # fmt: skip
    config = parse_config(
        {
            "model": {"random_init": {"model_type": "qwen3", "max_position_embeddings": 600}},
            "data": {"train": str(path)},
            "rollout": {"max_prompt_length": 200, "max_completion_length": 100},
        }
    )
    with pytest.raises(DataError, match="model's window of 600"):
        check_rows(FileTasks(config.data, 0, []), config, renderer(), make_algorithm(config.algorithm))
