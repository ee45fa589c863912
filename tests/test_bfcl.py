"""The environment `bfcl`: verdicts of the official checkers, official texts of errors, and nothing that is ever evaluated."""

from __future__ import annotations

import decimal
import json
import random
import sys
import time

import numpy as np
import pytest
import yaml

from benchmarks import bfcl_verdicts
from pact_fast.data.types import StopReason, Task, ToolCall, Trajectory, TurnRecord
from pact_fast.envs.bfcl import Bfcl
from pact_fast.envs.bfcl.ast_match import mismatch
from pact_fast.envs.bfcl.calls import PythonCall, read_call, read_turn
from pact_fast.envs.bfcl.entries import CATEGORIES, MULTI_TURN, REFUSED, UNANSWERED, Entry, entries, entry
from pact_fast.envs.bfcl.limits import MAX_NODES
from pact_fast.envs.bfcl.schemas import tool_schema
from pact_fast.envs.bfcl.session import PACKAGE, ApiSession
from pact_fast.envs.bfcl.tasks import BfclTasks, is_held_out, make_task
from pact_fast.envs.registry import environment
from pact_fast.errors import PactError
from pact_fast.evaluation.benchmark import benchmark
from tests.support.hostile_outputs import CODE, NAMES, TEXTS, VALUES, audited
from tests.support.models import TINY
from tests.support.optional import needs

needs("bfcl_eval", reason="pip install --no-deps bfcl-eval")


def task_of(task_id: str) -> Task:
    return Task(task_id, [], env_args={"id": task_id})


def episode(task_id: str, format: str = "json") -> Bfcl:
    env = Bfcl(format)
    env.reset(task_of(task_id))
    return env


def trajectory(*turns: TurnRecord, stop: StopReason = StopReason.ANSWER) -> Trajectory:
    empty = np.zeros(0, np.int64)
    return Trajectory("t", empty, empty, empty, empty, empty, empty, empty, list(turns), stop)


def turn(*calls: ToolCall | str, content: str = "") -> TurnRecord:
    return TurnRecord(content, "", content, list(calls))


def play(env: Bfcl, found: Entry) -> list[TurnRecord]:
    """Play the ground truth; the records of the assistant's turns."""
    records = []
    for calls in bfcl_verdicts.ground_truth(found):
        for call in calls:
            env.call(call.name, call.kwargs)
            records.append(turn(ToolCall(call.name, call.kwargs)))
        env.respond("Done.")
        records.append(turn(content="Done."))
    return records


# verdicts


def test_the_ground_truth_scores_one(capsys):
    """Every eighth task; `python -m benchmarks.bfcl_verdicts` plays all 800."""
    for name in MULTI_TURN:
        for found in list(entries(name).values())[::8]:
            env = episode(found.id)
            records = play(env, found)
            assert env.respond("more") is None
            assert env.reward(task_of(found.id), trajectory(*records)) == {"success": 1.0, "turns_passed": 1.0}, (
                found.id
            )


@pytest.mark.slow
def test_verdicts_on_mutated_trajectories_are_the_official_checkers():
    counts, failures = bfcl_verdicts.compare_multi_turn(every=8, count=3, seed=1)
    assert not failures, failures[:3]
    assert counts["mutations"] == 300 and 30 < counts["accepted"] < 200, "both verdicts must occur"


def test_verdicts_on_single_turn_answers_are_the_official_checkers():
    counts, failures = bfcl_verdicts.compare_single_turn(every=30, count=3, seed=1)
    assert not failures, failures[:3]
    assert 80 < counts["single-turn accepted"] < counts["single-turn verdicts"] - 80


def test_a_turn_without_calls_fails_where_the_ground_truth_has_some():
    env = episode("multi_turn_base_0")
    env.respond("Done.")
    assert env.failure == "turn 0: no call was made"


def test_progress_counts_turns_before_the_first_failure():
    found = entry("multi_turn_base_0")
    truth = bfcl_verdicts.ground_truth(found)
    env = episode(found.id)
    for number, calls in enumerate(truth):
        for call in calls if number != 1 else []:
            env.call(call.name, call.kwargs)
        env.respond("Done.")
    assert env.reward(task_of(found.id), trajectory())["turns_passed"] == 1 / len(truth)


def test_an_episode_that_is_cut_off_fails():
    found = entry("multi_turn_base_0")
    env = episode(found.id)
    for call in bfcl_verdicts.ground_truth(found)[0]:
        env.call(call.name, call.kwargs)
    env.respond("Done.")
    rewards = env.reward(task_of(found.id), trajectory(stop=StopReason.MAX_TURNS))
    assert rewards == {"success": 0.0, "turns_passed": 1 / len(found.truth)}


def test_more_than_twenty_steps_in_a_turn_fail_the_task():
    found = entry("multi_turn_base_0")
    for steps, success in ((20, 1.0), (21, 0.0)):
        env = episode(found.id)
        records = [turn(ToolCall("ls", {}))] * steps
        env.call("ls", {})
        records = [*records, turn(content="…"), *play(env, found)[len(found.truth[0]) :]]
        env = episode(found.id)
        play(env, found)
        assert env.reward(task_of(found.id), trajectory(*records))["success"] == success


# episodes


def test_late_functions_are_offered_and_shown_in_their_turn():
    found = entry("multi_turn_miss_func_0")
    (at,) = found.late
    env = episode(found.id)
    names = [tool["function"]["name"] for tool in env.tools]
    assert "sort" not in names and env.tools == [tool_schema(function) for function in found.functions]
    assert make_task(found).tools == [], "a row's tools hold for the whole trace"
    for _ in range(at - 1):
        assert "I have updated" not in (env.respond("Done.") or "")
    message = env.respond("Done.")
    assert message and "'name': 'sort'" in message and "I have updated some more functions" in message
    assert [tool["function"]["name"] for tool in env.tools] == [*names, "sort"]


def test_the_conversation_is_the_benchmarks():
    found = entry("multi_turn_base_3")
    env = episode(found.id)
    said = [env.respond("Done.") for _ in found.truth]
    assert said == [*(messages[0]["content"] for messages in found.question[1:]), None]


def test_an_instance_serves_a_second_task_and_equal_calls_give_equal_answers():
    first, second = entry("multi_turn_long_context_30"), entry("multi_turn_base_61")
    env = Bfcl()
    for found in (first, second, first):
        env.reset(task_of(found.id))
        play(env, found)
        assert env.failure is None
    one, two = ApiSession(first), ApiSession(first)
    assert [one.run(name) for name in one.names] == [two.run(name) for name in two.names]


def test_episodes_share_nothing_that_calls_change():
    """Also not the objects that long_context takes from its module."""
    ApiSession(entry("multi_turn_long_context_150"))
    module = sys.modules[f"{PACKAGE}.long_context"]
    before = {name: repr(value) for name, value in vars(module).items() if name.isupper()}
    travel = next(e for e in entries("multi_turn_long_context").values() if "TravelAPI" in e.classes)
    session = ApiSession(travel)
    for card in session.instances["TravelAPI"].credit_card_list.values():
        card["balance"] = -1
    for record in session.instances["TravelAPI"].booking_record.values():
        record.clear()
    assert {name: repr(value) for name, value in vars(module).items() if name.isupper()} == before
    other = ApiSession(travel).instances["TravelAPI"]
    assert all(card["balance"] != -1 for card in other.credit_card_list.values())


def test_calls_as_text_run_and_their_results_come_as_the_official_runner_words_them():
    env = episode("multi_turn_base_0", "python")
    assert env.tools == []
    reply = env.respond("[cd(folder='document'), mkdir(dir_name='temp')]")
    assert reply == repr(
        [
            {
                "role": "tool",
                "name": "cd(folder='document')",
                "content": '{"current_working_directory": "document"}',
            },
            {"role": "tool", "name": "mkdir(dir_name='temp')", "content": "None"},
        ]
    )
    env.respond("mv(source='final_report.pdf', destination='temp')")  # brackets may be left out
    assert env.respond("All is done.") == entry("multi_turn_base_0").question[1][0]["content"]
    assert env.failure is None


def test_twenty_one_steps_as_text_end_the_episode():
    env = episode("multi_turn_base_0", "python")
    replies = [env.respond("[ls()]") for _ in range(22)]
    assert all(replies[:20]) and replies[20:] == [None, None]
    assert env.reward(task_of("multi_turn_base_0"), trajectory())["success"] == 0


def test_the_prompt_of_calls_as_text_holds_the_functions():
    task = make_task(entry("multi_turn_base_0"), "python")
    system = task.prompt[0]
    assert task.tools == [] and system["role"] == "system"
    assert "[func_name1(params_name1=params_value1" in system["content"] and '"name": "mkdir"' in system["content"]


# single-turn tasks


def reward(task_id: str, *calls: ToolCall | str, format: str = "json", content: str = "") -> float:
    env = episode(task_id, format)
    return env.reward(task_of(task_id), trajectory(turn(*calls, content=content)))["success"]


def test_single_turn_calls_are_judged_by_what_they_say():
    area = "calculate_triangle_area"
    right = ToolCall(area, {"base": 10, "height": 5})
    assert reward("simple_python_0", right) == 1
    assert reward("simple_python_0", ToolCall(area, {"base": 10, "height": 5, "unit": "Units"})) == 1
    assert reward("simple_python_0", ToolCall(area, {"base": 10, "height": 6})) == 0
    assert reward("simple_python_0", ToolCall(area, {"base": 10})) == 0
    assert reward("simple_python_0", right, right) == 0
    assert reward("simple_python_0", right, "malformed") == 0
    assert reward("simple_python_0") == 0
    assert episode("simple_python_0").call(area, {"base": 10, "height": 5}) == "ok"
    assert episode("simple_python_0").respond("Done.") is None


def test_parallel_calls_may_stand_in_any_order():
    one = ToolCall("spotify.play", {"artist": "Taylor Swift", "duration": 20})
    two = ToolCall("spotify.play", {"artist": "maroon 5", "duration": 15})
    assert reward("parallel_0", one, two) == reward("parallel_0", two, one) == 1
    assert reward("parallel_0", one, one) == reward("parallel_0", one) == 0


def test_single_turn_calls_as_text():
    text = "[calculate_triangle_area(base=10, height=5)]"
    assert reward("simple_python_0", format="python", content=text) == 1
    assert reward("simple_python_0", format="python", content=f"```\n{text}\n```") == 1
    assert reward("simple_python_0", format="python", content=f"Here: {text}") == 0
    assert reward("simple_python_0", format="python", content=text.replace("10", "11")) == 0


@pytest.mark.parametrize(("category", "expected"), [("irrelevance", 0), ("live_irrelevance", 0), ("live_relevance", 1)])
def test_relevance_is_whether_a_call_is_made(category, expected):
    task_id = next(iter(entries(category)))
    assert reward(task_id, ToolCall("f", {})) == expected
    assert reward(task_id, content="I cannot help.") == 1 - expected
    assert reward(task_id, format="python", content="[f(a=1)]") == expected
    assert reward(task_id, format="python", content="I cannot help.") == 1 - expected


# calls as data


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[f(a=1)]", [("f", {"a": 1})]),
        ("f(a=1)", [("f", {"a": 1})]),
        ("[a.b.c(x=-1.5, y='t', z=[1, {'k': (2, None)}]), g()]",
         [("a.b.c", {"x": -1.5, "y": "t", "z": [1, {"k": (2, None)}]}), ("g", {})]),
        ("[f(a=CITY, b=g(1), c=x[0], d=...)]", [("f", {"a": "CITY", "b": "g(1)", "c": "x[0]", "d": "..."})]),
        ("[f(1, 2, a=3)]", [("f", {"a": 3})]),
        ("[]", []),
    ],
)  # fmt: skip
def test_python_notation_is_read_as_the_official_decoder_reads_it(text, expected):
    assert [(call.name, call.kwargs) for call in read_turn(text)] == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "hello", "[f(a=1), 2]", "[f(**x)]", "[f(a=1+1)]", "[f(a=lambda: 1)]", "[f(a=[x for x in y])]", "[f(a=f'{x}')]",
        "[f(a=x.y)]", "[f(a=not True)]", "[f(a={**x})]", "[f(a=1]", "[f(a=(y:=1))]", "[f(a='x' 1)]", "{'f': 1}",
        "[" * 500, "[f(a=" + "(" * 150 + "1" + ")" * 150 + ")]x", "[f(a=" + "[" * 60 + "]" * 60 + ")]",
        "[f(a=" + "-" * 20000 + "1)]", "[f(a=" + "9" * 5000 + ")]", "x" * 60000, "[" + "f(),"*300 + "]", "\x00", "\ud800",
    ],
)  # fmt: skip
def test_what_is_no_list_of_calls_is_refused(text):
    if text in ("", "[f(a=1)]x"):
        assert read_turn(text) == []
        return
    with pytest.raises(ValueError):
        read_turn(text)


def test_positional_arguments_of_the_ground_truth_are_kept():
    assert read_call("round_number(1.5, decimal_places=1)") == PythonCall("round_number", (1.5,), {"decimal_places": 1})


BAD_CALLS = [
    "cd()", "cd(path='x')", "cd(folder=3)", "cat(file_name=None)", "no_such_tool(x=1)", "_load_scenario(scenario={})",
    "tail(file_name='final_report.pdf', lines='x')", "run(x=1)", "exit()", "__init__()", "root.contents()",
    "power(base=9, exponent=5000)", "round_number(number='x')", "logarithm(value=0, base=10, precision=5)", "mean(numbers=[])",
    "square_root(number=2, precision=20)", "add(a='x', b=1)", "echo(content='hi', file_name='a/b')", "ls(a=True)", "ls(b=1)",
    "mv(source='a', destination='b')", "sort(file_name='final_report.pdf')", "sum_values(numbers=['a'])", "divide(a=1, b=0)",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_CALLS)
def test_texts_of_errors_are_the_official_executors(text):
    from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_utils

    found = entry("multi_turn_base_0")
    found = Entry("x_0", "multi_turn_base", [], [], classes=("GorillaFileSystem", "MathAPI"), config=found.config)
    call = read_call(text)
    try:
        (expected,), _ = multi_turn_utils.execute_multi_turn_func_call(
            [text], found.config, list(found.classes), "errors", found.id
        )
    finally:
        for name in [name for name in vars(multi_turn_utils) if name.endswith("_instance")]:
            del vars(multi_turn_utils)[name]
    ours = ApiSession(found).run(call.name, call.args, call.kwargs)
    assert ours == expected


# hostile calls


@pytest.fixture
def math() -> ApiSession:
    return ApiSession(Entry("m_0", "multi_turn_base", [], [], classes=("MathAPI", "GorillaFileSystem")))


@pytest.mark.timing
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("power", {"base": 9, "exponent": 10**12}),
        ("power", {"base": 10**4000, "exponent": 10**4000}),
        ("square_root", {"number": 2, "precision": 10**9}),
        ("logarithm", {"value": 2, "base": 3, "precision": 10**9}),
        ("round_number", {"number": 5, "decimal_places": -(10**12)}),
        ("multiply", {"a": 10**100000, "b": 10**100000}),
        ("echo", {"content": "x" * 10**7}),
        ("mean", {"numbers": [1] * 10**6}),
        ("add", {"a": float("nan"), "b": 1}),
        ("logarithm", {"value": 2, "base": 3, "precision": float("inf")}),
    ],
)
def test_the_work_of_a_call_is_bounded(math, name, arguments):
    started = time.perf_counter()
    assert math.run(name, (), arguments).startswith("Error during execution: ")
    assert math.run(name, tuple(arguments.values()), {}).startswith("Error during execution: ")
    assert time.perf_counter() - started < 1


def test_the_precision_that_a_call_asks_for_stays_in_the_call(math):
    import mpmath

    before = decimal.getcontext().prec, mpmath.mp.prec
    assert "1.41421356237309504880168872" in math.run("square_root", (), {"number": 2, "precision": 40})
    math.run("logarithm", (), {"value": 2, "base": 3, "precision": 50})
    assert (decimal.getcontext().prec, mpmath.mp.prec) == before


@pytest.mark.timing
def test_folders_that_are_copied_into_each_other_end_at_a_limit(math):
    started = time.perf_counter()
    for index in range(24):
        math.run("mkdir", (), {"dir_name": str(index)})
        for other in range(index):
            math.run("cp", (), {"source": str(other), "destination": str(index)})
    assert f"more than {MAX_NODES:,} entries" in math.run("find", (), {"path": "."})
    assert time.perf_counter() - started < 5


def test_a_folder_in_itself_is_a_failure_and_no_crash():
    found = entry("multi_turn_base_0")
    env = episode(found.id)
    env.call("cp", {"source": "document", "destination": "document"})
    for calls in bfcl_verdicts.ground_truth(found):
        for call in calls:
            env.call(call.name, call.kwargs)
        env.respond("Done.")
    assert env.reward(task_of(found.id), trajectory())["success"] == 0


@pytest.mark.slow
@pytest.mark.hostile
def test_five_thousand_hostile_outputs_execute_nothing_but_allowed_tools():
    rng = random.Random(0)
    json_env, text_env = episode("multi_turn_base_0"), episode("multi_turn_base_0", "python")
    allowed = set(json_env.session.names)
    json_env.call("ls", {})  # does the imports of a first call
    seen: set[str] = set()
    for session in (json_env.session, text_env.session):
        for name, method in list(session._methods.items()):
            session._methods[name] = _spy(name, method, seen)
    with audited() as events:
        for number in range(5000):
            if number % 2:
                name = rng.choice([*NAMES, *allowed])
                keys = rng.sample(["folder", "file_name", "content", "a", "__class__", "self", "path", "lines", ""], 2)
                result = json_env.call(name, {key: rng.choice(VALUES) for key in keys})
                assert isinstance(result, str)
                assert name in allowed or result.startswith("Error during execution: "), (name, result)
            else:
                reply = text_env.respond(rng.choice(TEXTS).format(rng.choice([*CODE, *map(repr, VALUES[:9])])))
                assert reply is None or isinstance(reply, str)
                if reply is None:  # the conversation is over
                    text_env = episode("multi_turn_base_0", "python")
    assert events == [] and seen <= allowed and seen


def _spy(name, method, seen):
    import functools

    @functools.wraps(method)
    def spied(*args, **kwargs):
        seen.add(name)
        return method(*args, **kwargs)

    spied.__func__ = method.__func__
    return spied


# tasks, rows and settings


def test_the_split_is_fixed_and_keeps_the_variants_of_a_question_together():
    held_out = [n for n in range(200) if is_held_out(f"multi_turn_base_{n}")]
    assert held_out[:6] == HELD_OUT and len(held_out) == HELD_OUT_COUNT
    for name in MULTI_TURN:
        assert [n for n in range(200) if is_held_out(f"{name}_{n}")] == held_out
    live = list(entries("live_simple"))
    by_document: dict[str, set[bool]] = {}
    for task_id in live:
        by_document.setdefault(task_id.split("-")[1], set()).add(is_held_out(task_id))
    assert all(len(sides) == 1 for sides in by_document.values())
    assert 0.1 < sum(map(is_held_out, live)) / len(live) < 0.4


HELD_OUT, HELD_OUT_COUNT = [4, 6, 10, 12, 19, 25], 50


@pytest.mark.slow
def test_every_schema_and_prompt_is_accepted_as_a_data_row(tmp_path, capsys):
    from pact_fast.cli.main import main
    from pact_fast.data.readers import read_tasks

    out = tmp_path / "rows.jsonl"
    assert main(["data", "convert", "bfcl", "-o", str(out), "--split", "test", "--limit", "2"]) == 0
    tasks = read_tasks(out)
    assert capsys.readouterr().out.startswith(f"{len(tasks)} rows written")
    assert {task.id.rpartition("_")[0] for task in tasks} == set(CATEGORIES)
    for task in tasks:
        source = entry(task.id)
        assert task.env == "bfcl" and is_held_out(task.id)
        names = [tool["function"]["name"] for tool in task.tools]
        assert names == ([] if source.late else [function["name"] for function in source.functions])
        if source.category not in UNANSWERED:
            assert task.expert is not None and task.reference_calls == task.expert.calls


def test_expert_traces_hold_the_whole_conversation():
    task = make_task(entry("multi_turn_miss_param_1"), expert=True)
    assert task.expert is not None
    users = [found.user for found in task.expert.turns if found.user is not None]
    assert users == [messages[0]["content"] for messages in entry(task.id).question[1:]]
    env = episode(task.id)
    for found in task.expert.turns:
        for call, observation in zip(found.calls, found.observations, strict=True):
            assert env.call(call.name, call.arguments) == observation
        if found.user is not None:
            assert env.respond(found.content) == found.user
    assert env.respond("Done.") is None and env.failure is None


def test_generated_tasks_are_a_function_of_the_step_and_never_held_out():
    source = Bfcl.tasks({"categories": ["multi_turn_base", "simple_python"]}, seed=3)
    assert isinstance(source, BfclTasks)
    steps = [[task.id for task in source.train(step, 16)] for step in (0, 1, 0)]
    assert steps[0] == steps[2] != steps[1]
    assert not any(is_held_out(task_id) for step in steps for task_id in step)
    held_out = [task.id for task in source.held_out(4)]
    assert all(map(is_held_out, held_out)) and [i.rpartition("_")[0] for i in held_out[:2]] == [
        "multi_turn_base",
        "simple_python",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"categories": ["memory_kv"]}, "cannot be run: its tasks ask for what the policy itself wrote"),
        ({"categories": ["web_search_base"]}, "cannot be run: it needs the network"),
        ({"categories": ["multi_turn_bse"]}, "did you mean 'multi_turn_base'"),
        ({"format": "xml"}, "bfcl takes json or python"),
        ({"fromat": "json"}, "did you mean 'format'"),
    ],
)
def test_mistakes_are_one_line_with_the_cure(arguments, message):
    with pytest.raises(PactError, match=message):
        environment.get("bfcl").tasks(arguments, 0)


def test_a_task_of_something_else_is_named():
    with pytest.raises(PactError, match="task other is no BFCL task"):
        Bfcl.check_task(Task("other", []))
    with pytest.raises(PactError, match="has no task 'multi_turn_base_999'"):
        Bfcl.check_task(task_of("multi_turn_base_999"))


def test_the_benchmark_has_every_category_that_runs():
    kind = benchmark.get("bfcl")
    assert kind.categories == CATEGORIES and kind.refused == REFUSED
    assert kind.choose(["multi_turn"]) == MULTI_TURN
    with pytest.raises(PactError, match="memory_kv cannot be run"):
        kind.choose(["memory_kv"])


def test_accepted_values_are_compared_as_documented():
    function = {
        "name": "f",
        "parameters": {"properties": {"x": {"type": "float"}, "t": {"type": "string"}}, "required": ["x"]},
    }
    truth = [{"f": {"x": [1.0], "t": ["New York, NY", ""]}}]
    assert mismatch("simple", [function], [{"f": {"x": 1}}], truth) is None
    assert mismatch("simple", [function], [{"f": {"x": 1, "t": "new york ny"}}], truth) is None
    assert mismatch("simple", [function], [{"f": {"x": "1"}}], truth) == "the argument x has a wrong value"
    assert mismatch("simple", [function], [{"f": {}}], truth) == "the required argument x is missing"


def test_rows_are_small():
    """A row names its task; the package holds the rest."""
    assert len(json.dumps(make_task(entry("multi_turn_long_context_0")).env_args)) < 60


@pytest.mark.slow
def test_two_pact_steps_on_rows_with_expert_traces(tmp_path):
    from pact_fast.cli.main import main
    from pact_fast.data.readers import write_tasks

    shortest = min(entries("multi_turn_base").values(), key=lambda found: len(str(found.functions)))
    rows = tmp_path / "rows.jsonl"
    write_tasks(rows, [make_task(found, expert=True) for found in (shortest, entry("simple_python_0"))])
    recipe = {
        "output_dir": str(tmp_path / "run"),
        "model": {"random_init": {**TINY, "vocab_size": 1024, "max_position_embeddings": 32768}},
        "data": {"train": str(rows), "shuffle": False},
        "rollout": {
            "num_generations": 2, "max_turns": 3, "max_turn_tokens": 8, "max_completion_length": 4096,
            "max_prompt_length": 16384,
        },
        "trainer": {
            "max_steps": 2, "prompts_per_step": 2, "max_tokens_per_pack": 65536, "learning_rate": 1e-3,
            "report_to": "none",
        },
        "algorithm": {"name": "pact", "anchor": {"mode": "blend"}},
        "threads": 1,
    }  # fmt: skip
    (tmp_path / "bfcl.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(tmp_path / "bfcl.yaml")]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2]
    assert all(np.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in steps)


@pytest.mark.slow
def test_the_benchmark_runs_with_a_tiny_model(tmp_path, capsys):
    from pact_fast.cli.main import main

    recipe = {
        "model": {"random_init": {**TINY, "vocab_size": 600, "max_position_embeddings": 32768}},
        "rollout": {"max_turn_tokens": 4},
        "threads": 1,
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["eval", "bfcl", "--model", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "out"), "--limit", "1"]
    arguments += [option for name in ("simple_python", "irrelevance") for option in ("--category", name)]
    assert main(arguments) == 0
    categories = json.loads(capsys.readouterr().out)["categories"]
    assert {name: row["pass@1"]["mean"] for name, row in categories.items()} == {"simple_python": 0, "irrelevance": 1}
