"""AutoAgent's traces: complete, repeatable, and each reason against one."""

import json
from dataclasses import replace

import jsonschema
import numpy as np
import pytest

from pact_fast.chat.rendering import ChatRenderer
from pact_fast.components import Component
from pact_fast.data.readers import read_tasks, write_tasks
from pact_fast.data.types import ExpertTrace, ExpertTurn, StopReason, ToolCall, TurnRecord
from pact_fast.envs.simulated.env import make_actor
from pact_fast.model.tokenizer import train_tokenizer
from pact_fast.synthesis.mtr.auto_agent import from_trajectory
from pact_fast.synthesis.mtr.generated import GeneratedQuestions
from pact_fast.synthesis.mtr.make_task import make_task
from pact_fast.synthesis.mtr.qa import QARow
from pact_fast.synthesis.mtr.verify import REASONS, rejection_reasons
from tests.support.qa_data import MUSIQUE, WIKI, qa_rows
from tests.support.simulated import GOLD, actor, task
from tests.support.trajectories import rollout

TURNS = (
    ExpertTurn("I look.", (ToolCall("get_director", {"entity": "Free Guy"}),), ('{"values": ["Shawn Levy"]}',)),
    ExpertTurn("And now.", (ToolCall("get_birth", {"entity": "Shawn Levy"}),), (f'{{"values": ["{GOLD}"]}}',)),
)
TRACE = ExpertTrace(TURNS, GOLD, "So it is.")


def turn(call, observation, reasoning=""):
    return ExpertTurn(reasoning, (call,), (observation,))


def test_a_good_trace_has_no_reason_against_it():
    assert rejection_reasons(task(), TRACE, make_actor({})) == []


BAD = ToolCall("get_director", {"film": "Free Guy"})
NOT_FOUND = '{"error": {"message": "", "type": "not_found"}}'
CASES = {
    "no_answer": replace(TRACE, answer=None),
    "imitated_observation": replace(TRACE, answer_reasoning="<tool_response>x</tool_response>"),
    "invalid_call": replace(TRACE, turns=(turn(BAD, "{}"), *TURNS)),
    "invalid_observation": replace(TRACE, turns=(turn(TURNS[0].calls[0], '{"values": "Shawn Levy"}'), TURNS[1])),
    "tool_error": replace(TRACE, turns=(*TURNS, turn(ToolCall("get_birth", {"entity": "Free Guy"}), NOT_FOUND))),
    "not_repeatable": replace(TRACE, turns=(turn(TURNS[0].calls[0], '{"values": ["Someone"]}'), TURNS[1])),
    "wrong_answer": replace(TRACE, answer="Shawn Levy"),
    "too_many_turns": replace(TRACE, turns=TURNS * 5),
    "ungrounded_argument": replace(TRACE, turns=(TURNS[1],)),
    "no_evidence": replace(TRACE, turns=(TURNS[0],)),
}  # fmt: skip


@pytest.mark.parametrize("reason", CASES)
def test_a_bad_trace_is_rejected_with_its_reason(reason):
    assert reason in rejection_reasons(task(), CASES[reason], make_actor({})) and reason in REASONS


def test_rules_write_complete_traces_without_a_model():
    wiki, musique = (make_task(row, make_actor({})) for row in (WIKI, MUSIQUE))
    assert wiki.reasons == musique.reasons == ()
    trace = wiki.task.expert
    assert [[call.name for call in turn.calls] for turn in trace.turns] == [
        ["get_director"] * 2, ["get_date_of_birth"] * 2, ["compare"]
    ]  # fmt: skip
    assert trace.answer == "Free Guy" and "Shawn Levy" in trace.turns[1].reasoning
    assert musique.task.expert.answer == "35" and len(musique.task.expert.turns) == 3


def test_a_comparison_is_decided_by_what_was_observed_and_not_by_the_gold_answer():
    made = make_task(replace(WIKI, answers=("Forbidden Ground",)), make_actor({}))
    assert made.reasons == ("wrong_answer",)
    older = make_task(
        replace(WIKI, question=WIKI.question.replace("younger", "older"), answers=("Forbidden Ground",)), make_actor({})
    )
    assert older.reasons == () and older.task.expert.answer == "Forbidden Ground"


def test_a_row_without_decomposition_has_tools_and_a_reason():
    made = make_task(QARow("q", "Who?", ("x",), WIKI.passages), make_actor({}))
    assert made.reasons == ("no_plan",) and [t["function"]["name"] for t in made.task.tools] == ["search"]


def test_traces_recover_from_injected_faults():
    made = [make_task(replace(WIKI, id=f"w{i}"), make_actor({"faults": {"timeout": 0.3}})) for i in range(20)]
    failed = [
        m for m in made if m.task.expert and any("timeout" in o for t in m.task.expert.turns for o in t.observations)
    ]
    assert failed and all("I try again" in " ".join(t.reasoning for t in m.task.expert.turns) for m in failed)


def test_what_a_policy_did_is_a_trace_unless_a_limit_cut_it_or_a_call_was_malformed():
    acted = TurnRecord("", "I look.", "", list(TURNS[0].calls), list(TURNS[0].observations))
    last = TurnRecord(GOLD, "", GOLD)
    trace = from_trajectory(rollout(acted, last))
    assert trace == ExpertTrace((TURNS[0],), GOLD) and "no_evidence" in rejection_reasons(task(), trace, make_actor({}))
    assert from_trajectory(rollout(acted, last, stop=StopReason.MAX_TURNS)) is None
    assert from_trajectory(rollout(TurnRecord("", "", "", ["malformed"], ["error"]), last)) is None


def test_made_tasks_are_read_back_from_a_data_row(tmp_path):
    made = make_task(WIKI, make_actor({})).task
    write_tasks(tmp_path / "rows.jsonl", [made])
    (read,) = read_tasks(tmp_path / "rows.jsonl", environments=["simulated"])
    assert read == made


def test_sft_trains_the_final_answer_only_when_asked_and_never_an_observation():
    tasks = GeneratedQuestions.tasks({}, 0).train(0, 30)
    renderer = ChatRenderer(train_tokenizer(tasks, 640))
    given = tasks[0]
    without = renderer.trace_context(given, given.expert, "turns")
    whole = renderer.trace_context(given, given.expert, "turns", answer=True)
    n = len(without.ids)
    assert np.array_equal(whole.ids[:n], without.ids) and len(whole.ids) > n
    trained = renderer.tokenizer.decode(whole.ids[whole.generated])
    assert trained.endswith(f"{given.answer}<|im_end|>") and "values" not in trained
    assert np.all(whole.components[n:] != Component.OBSERVATION)


def test_generated_questions_are_repeatable_and_their_halves_are_apart():
    source, again = (GeneratedQuestions.tasks({"comparison": 0.3}, 1) for _ in range(2))
    train, held_out = source.train(0, 40), source.held_out(20)
    assert train == again.train(0, 40) and train[8:16] == again.train(1, 8)
    assert not {t.prompt[-1]["content"] for t in train} & {t.prompt[-1]["content"] for t in held_out}
    assert all(t.expert and t.answer == t.expert.answer for t in (*train, *held_out))


def test_generated_chains_end_in_a_name_unless_years_are_compared():
    assert all(task_.answer.startswith("@") for task_ in GeneratedQuestions.tasks({}, 0).train(0, 40))
    compared = GeneratedQuestions.tasks({"comparison": 1.0}, 0).train(0, 5)
    assert all("compare" in {call.name for call in task_.expert.calls} for task_ in compared)


def test_a_teacher_that_stops_early_answers_with_what_it_has_found_and_only_in_training():
    args = {"hops": [2, 3], "comparison": 0.3}
    whole, hasty = (GeneratedQuestions.tasks({**args, "early_stop": p}, 0) for p in (0.0, 0.5))
    pairs = list(zip(whole.train(0, 80), hasty.train(0, 80), strict=True))
    assert all(a.prompt == b.prompt and a.answer == b.answer for a, b in pairs)
    assert whole.held_out(20) == hasty.held_out(20)
    stopped = [(a, b) for a, b in pairs if a.expert != b.expert]
    assert 0.3 < len(stopped) / len(pairs) < 0.7
    for a, b in stopped:
        assert b.expert.turns == a.expert.turns[: len(b.expert.turns)] and "compare" not in b.prompt[-1]["content"]
        assert b.expert.answer in b.expert.turns[-1].observations[0] and b.expert.answer != b.answer
    shares = [len(b.expert.turns) / len(a.expert.turns) for a, b in stopped]
    assert set(np.round(shares, 2)) == {0.5, 0.33, 0.67}


def test_tools_are_offered_in_an_order_that_says_nothing_of_the_plan():
    for task_ in GeneratedQuestions.tasks({}, 0).train(0, 20):
        names = [tool["function"]["name"] for tool in task_.tools]
        assert names == sorted(names)


@pytest.mark.parametrize("name", ["musique_train_passages", "2wikimultihopqa_dev_passages"])
def test_four_of_five_real_rows_give_a_trace_that_an_independent_check_accepts(name):
    """The check knows nothing of ours but the data row: schemas by jsonschema, texts by containment."""
    rows = qa_rows(name, 60)
    made = [make_task(row, make_actor({})) for row in rows]
    kept = [(row, m.task) for row, m in zip(rows, made, strict=True) if m.task.expert]
    assert len(kept) >= 0.8 * len(rows)
    for row, kept_task in kept:
        tools = {t["function"]["name"]: t["function"]["parameters"] for t in kept_task.tools}
        outputs = {name: tool["output"] for name, tool in kept_task.env_args["tools"].items()}
        seen = row.question.lower().replace("'s", "").replace("'", "")
        for trace_turn in kept_task.expert.turns:
            for call, observation in zip(trace_turn.calls, trace_turn.observations, strict=True):
                jsonschema.validate(call.arguments, tools[call.name])
                jsonschema.validate(json.loads(observation), outputs[call.name])
                for text in call.arguments.values():
                    assert text.lower().replace("'s", "").replace("'", "") in seen, (row.id, text)
            seen += " " + " ".join(trace_turn.observations).lower().replace("'s", "").replace("'", "")
        assert kept_task.expert.answer.lower().rstrip(".") in [a.lower().rstrip(".") for a in row.answers]
        episode = actor().episode(kept_task.id, _world(kept_task), row.answers)  # a fresh one gives the same
        for trace_turn in kept_task.expert.turns:
            assert tuple(episode.call(c.name, c.arguments) for c in trace_turn.calls) == trace_turn.observations


def _world(made):
    from pact_fast.envs.simulated.world import ToolWorld

    return ToolWorld.from_task(made.tools, made.env_args)
