"""FTRL and ToolHop scoring against independent definitions, and hand-written expert traces against the real tools."""

import ast
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pact_fast.data.types import ExpertTrace, ToolCall, Trajectory, TurnRecord
from pact_fast.rewards.feedback import Feedback, is_error, stated
from pact_fast.rewards.ftrl import contains_parts, expected_parts, official_solve_score
from pact_fast.rewards.ftrl import solve_score as solve_score_of_feedback
from pact_fast.rewards.toolhop import is_correct, official_is_correct

EXPERT = Path(__file__).parent / "data" / "ftrl_expert.jsonl"


def solve_score(feedback, expected):
    """The score of (tool name, observation) pairs of calls without arguments."""
    return solve_score_of_feedback([Feedback(name, observation, {}) for name, observation in feedback], expected)


def oracle(feedback, expected):
    """(P, R, F1), by bookkeeping over (tool, place) instead of over shrinking lists."""

    def same_case(text):
        return "".join(c for c in text.lower() if c != ",").strip()

    used = set()
    for name, observation in feedback:
        for place, text in enumerate(expected.get(name, ())):
            parts = re.split(", ", text)
            if (name, place) not in used and not [p for p in parts if same_case(observation).find(same_case(p)) < 0]:
                used.add((name, place))
                break
    precision = len(used) / len(feedback) if feedback else 1.0
    recall = len(used) / sum(len(texts) for texts in expected.values())
    harmonic = 2 * precision * recall / (precision + recall) if used else 0.0
    return precision, recall, harmonic


def trajectory(turns, stop_reason="answer"):
    empty = np.zeros(0, np.int64)
    return Trajectory("t", empty, empty, empty, empty, empty, empty, empty, turns, stop_reason)


def answered(content, observations=()):
    calls = [ToolCall("f", {}) for _ in observations]
    return [TurnRecord("", "", "", calls, list(observations)), TurnRecord("", "", content)]


def test_scores_of_worked_examples():
    expected = {"area": ["1,024 km", "Paris, France"], "price": ["30"]}

    score = solve_score([], expected)
    assert (score.precision, score.recall, score.f1) == (1.0, 0.0, 0.0)

    # one of two calls solves one of three sub-questions: 1/2, 1/3, 2·1/(2+3)
    score = solve_score([("area", "It has 1024 KM."), ("area", "unknown")], expected)
    assert (score.precision, score.recall, score.f1) == pytest.approx((1 / 2, 1 / 3, 2 / 5))

    # both at once in one observation count once, the other needs a call of its own
    both = "1,024 km around Paris in France"
    assert solve_score([("area", both)], expected).solved == 1
    assert solve_score([("area", both)] * 2, expected).solved == 2
    assert solve_score([("area", both)] * 3, expected).solved == 2

    # another tool's observation never counts
    assert solve_score([("price", both), ("area", "30")], expected).solved == 0


def test_equal_sub_questions_need_a_call_each():
    expected = {"spec": ["1,024", "1,024"]}
    assert solve_score([("spec", "1,024 GB")], expected).recall == 0.5
    assert solve_score([("spec", "1,024 GB"), ("spec", "1024 GB")], expected).f1 == 1.0


@pytest.mark.parametrize(
    ("expected", "text", "found"),
    [
        ("3,776", "3776 m", True),
        ("3776", "3,776 m", True),
        ("Paris, France", "FRANCE, capital Paris", True),
        ("Paris, France", "Paris, Texas", False),
        ("Paris,France", "paris france", False),  # a comma without a space separates nothing: "parisfrance" is sought
        ("Paris,France", "ParisFrance", True),
        ("a, ", "xax", True),  # an empty part is everywhere
        (" 4 ", "category 4", True),
        ("4", "category five", False),
    ],
)
def test_contains_parts(expected, text, found):
    assert contains_parts(text, expected) is found


words = st.text("aB1,. ", max_size=6).filter(expected_parts)  # officially, an empty text is found everywhere
names = st.sampled_from(["f", "g", "h"])


@given(
    st.lists(st.tuples(names, st.text("abB1,. ", max_size=12)), max_size=8),
    st.dictionaries(names, st.lists(words, max_size=3), min_size=1).filter(lambda d: any(d.values())),
)
def test_scores_agree_with_the_oracle(feedback, expected):
    before = json.dumps(expected)
    score = solve_score(feedback, expected)
    assert (score.precision, score.recall, score.f1) == pytest.approx(oracle(feedback, expected))
    assert json.dumps(expected) == before


@given(
    st.lists(st.tuples(names, st.text("abB1,. ", max_size=12), st.text("ab1", max_size=2)), max_size=8),
    st.dictionaries(names, st.lists(st.text("aB1,. ", max_size=6), max_size=3), min_size=1).filter(
        lambda d: any(d.values())
    ),
)
def test_the_official_score_agrees_with_the_oracle_whatever_the_arguments(calls, expected):
    """Errors, echoes and empty expected texts included."""
    feedback = [Feedback(name, observation, {"x": argument}) for name, observation, argument in calls]
    score = official_solve_score(feedback, expected)
    given = [(name, observation) for name, observation, _ in calls]
    assert (score.precision, score.recall, score.f1) == pytest.approx(oracle(given, expected))


def test_errors_and_echoes_count_in_the_official_score_alone():
    expected = {"f": ["1987"]}
    for observation in ("error: 1987", "no data for 1987"):
        feedback = [Feedback("f", observation, {"year": "1987"})]
        assert official_solve_score(feedback, expected).f1 == 1.0
        assert solve_score_of_feedback(feedback, expected).f1 == 0.0


def test_toolhop_wants_all_parts_in_the_answer_or_in_the_observation_before_it():
    gold = "John Smith, 1,950"
    assert is_correct(gold, trajectory(answered("<answer>JOHN SMITH in 1950</answer>")))
    assert is_correct(gold, trajectory(answered("here it is", ["other", "1950: john smith"])))
    assert not is_correct(gold, trajectory(answered("here it is", ["1950: john smith", "other"])))  # not the last one
    assert not is_correct(gold, trajectory(answered("John Smith", ["1950"])))  # parts are not collected from both
    assert not is_correct(gold, trajectory(answered("", ["1950: john smith"])))
    assert not is_correct(gold, trajectory(answered("John Smith 1950"), stop_reason="max_turn_tokens"))
    assert is_correct(gold, trajectory([TurnRecord("", "", "John Smith, 1,950")]))


def official_oracle(messages, answer):
    """ToolHop's own verdict on chat messages, step by step: strip the answer, clean a text, look for one in the other."""

    def cleaned(text):
        return text.rstrip(".0").replace(",", "").lower()

    if messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
        return False
    searched = [messages[-1]["content"]]
    if len(messages) > 1 and messages[-2]["role"] == "tool":
        searched.append(messages[-2]["content"])
    return [text for text in searched if cleaned(text).find(answer.rstrip(".0").lower()) >= 0] != []


answers_of = st.sampled_from(["10", "0", "1,950", "John", "a.b", "100.", "7"])
said_texts = st.sampled_from(["It is 1.", "1950", "john.", "", "100", "A.B0", "error: 7", "seven"])


@given(st.lists(st.tuples(st.lists(said_texts, max_size=2), said_texts), min_size=1, max_size=3), answers_of)
def test_toolhop_s_own_verdict_agrees_with_the_oracle(turns, answer):
    records, messages = [], []
    for number, (observations, content) in enumerate(turns):
        last = number == len(turns) - 1
        calls = [ToolCall("f", {}) for _ in observations]
        records.append(TurnRecord("", "", content, [] if last else calls, [] if last else observations))
        messages.append({"role": "assistant", "content": content})
        messages += [] if last else [{"role": "tool", "content": text} for text in observations]
    assert official_is_correct(answer, trajectory(records)) == official_oracle(messages, answer)
    unanswered = [*records[:-1], TurnRecord("", "", "10", [ToolCall("f", {})])]
    assert not official_is_correct(answer, trajectory(unanswered, stop_reason="max_turns"))


def experts():
    return [json.loads(line) for line in EXPERT.read_text(encoding="utf-8").splitlines()]


def test_expert_traces_reason_in_sentences_that_do_not_preview_the_call():
    rows = experts()
    assert len(rows) == len({row["id"] for row in rows}) == 10
    for row in rows:
        trace = ExpertTrace.from_messages(row["expert_trace"])
        assert trace.to_messages() == row["expert_trace"] and trace.answer
        for turn in trace.turns:
            assert 2 <= len(re.findall(r"[.?!](?: |$)", turn.reasoning)) <= 4, (row["id"], turn.reasoning)
            for call in turn.calls:
                texts = [call.name, *(value for value in call.arguments.values() if isinstance(value, str))]
                assert not [text for text in texts if text.lower() in turn.reasoning.lower()], row["id"]


def real_rows():
    """Skips the test without PACT_TEST_DATA."""
    pq = pytest.importorskip("pyarrow.parquet")
    if "PACT_TEST_DATA" not in os.environ:
        pytest.skip("set PACT_TEST_DATA to a folder that holds ftrl/test.parquet")
    return pq.read_table(Path(os.environ["PACT_TEST_DATA"]) / "ftrl" / "test.parquet").to_pylist()


@pytest.mark.slow
def test_expert_traces_solve_their_tasks_with_the_real_tools():
    from pact_fast.data.types import Task
    from pact_fast.envs.python_tools.env import PythonTools
    from pact_fast.envs.python_tools.pool import SandboxPool

    rows = real_rows()
    kinds, turns_with_several_calls = [], 0
    with SandboxPool(workers=1) as pool:
        for expert in experts():
            row = rows[int(expert["id"].removeprefix("ftrl-"))]
            env_args = {name: json.loads(row[name]) for name in ("codes", "unsolved_set")} | {"scoring": "ftrl"}
            task = Task(
                expert["id"], row["messages"], json.loads(row["tools"]), answer=row["answer"], env_args=env_args
            )
            trace = ExpertTrace.from_messages(expert["expert_trace"])
            env = PythonTools(pool)
            env.reset(task)
            records = []
            for turn in trace.turns:
                observations = [env.call(call.name, call.arguments) for call in turn.calls]
                assert observations == list(turn.observations), expert["id"]
                records.append(TurnRecord("", turn.reasoning, "", list(turn.calls), observations))
                turns_with_several_calls += len(turn.calls) > 1
            records.append(TurnRecord("", "", str(trace.answer)))
            rewards = env.reward(task, trajectory(records))
            assert set(rewards.values()) == {1.0} and len(rewards) == 8, expert["id"]
            assert trace.answer == row["answer"]
            kinds.append(row["data_source"])
    assert len(set(kinds)) == 4 and turns_with_several_calls >= 4


def calls_of_rows(rows):
    """Hand-written calls of the expert traces and the calls that stand in the tools' sources, with their observations.

    Yields (row number, [(tool, arguments, observation)]) of all rows.
    """
    from pact_fast.envs.python_tools.pool import SandboxPool

    by_hand = {
        int(expert["id"].removeprefix("ftrl-")): ExpertTrace.from_messages(expert["expert_trace"])
        for expert in experts()
    }
    with SandboxPool(workers=1) as pool:
        for number, row in enumerate(rows):
            codes, calls = json.loads(row["codes"]), []
            if number in by_hand:
                calls = [(call.name, call.arguments) for call in by_hand[number].calls]
            else:
                for name in json.loads(row["unsolved_set"]):
                    calls += [(name, arguments) for arguments in list(example_calls(codes[name], name))[:2]]
            yield number, [(name, arguments, pool.call(codes[name], name, arguments)) for name, arguments in calls]


def mutated(calls, codes, rng):
    """Trajectories with calls left out, doubled, moved, of another tool, that fail, or with a malformed attempt."""
    if calls:
        k = rng.integers(len(calls))
        yield calls[:k] + calls[k + 1 :]
        yield [*calls[: k + 1], *calls[k:]]
        yield [calls[i] for i in rng.permutation(len(calls))]
        name, arguments, text = calls[k]
        other = list(codes)[rng.integers(len(codes))]
        yield [*calls[:k], (other, arguments, text), *calls[k + 1 :]]
        yield [*calls[:k], (name, arguments, text.upper().replace(",", "")), *calls[k + 1 :]]
        yield [*calls[:k], (name, {}, "error: TypeError: missing"), *calls[k + 1 :]]
        yield [*calls, ("", {}, "error: the call is no JSON")]
    yield []


@pytest.mark.slow
def test_scores_of_all_hundred_rows_equal_the_oracle_on_real_and_mutated_trajectories():
    """solve-P, solve-R, solve-F1 and the answer: the environment's rewards against independent bookkeeping."""
    from pact_fast.data.types import Task
    from pact_fast.envs.python_tools.env import PythonTools

    rows, rng = real_rows(), np.random.default_rng(0)
    env, compared, solved = PythonTools(None), 0, 0
    for number, calls in calls_of_rows(rows):
        row = rows[number]
        codes, expected = json.loads(row["codes"]), json.loads(row["unsolved_set"])
        task = Task(
            str(number), row["messages"], json.loads(row["tools"]), answer=row["answer"],
            env_args={"codes": codes, "unsolved_set": expected, "scoring": "ftrl"},
        )  # fmt: skip
        for variant in (calls, *mutated(calls, codes, rng)):
            said = [str(row["answer"]), "I do not know."][rng.integers(2)]
            records = [
                TurnRecord("", "", "", [ToolCall(name, arguments) if name else "no JSON"], [text])
                for name, arguments, text in variant
            ]
            rewards = env.reward(task, trajectory([*records, TurnRecord("", "", said)]))
            given = [(name, text) for name, _, text in variant]
            official = tuple(rewards[f"official_solve_{x}"] for x in ("p", "r", "f1"))
            assert official == pytest.approx(oracle(given, expected)), number
            ours = tuple(rewards[f"solve_{x}"] for x in ("p", "r", "f1"))
            assert ours == pytest.approx(oracle(said_alone(variant, expected), expected)), number
            assert rewards["success"] == (rewards["solve_r"] == 1), number
            assert rewards["answer_correct"] == answer_oracle(variant, said, str(row["answer"])), number
            compared, solved = compared + 1, solved + (official[1] > 0)
    print(f"{compared} trajectories compared, {solved} of them solve something")
    assert number == 99 and compared > 500 and solved > 150


def says(variant, k, part):
    """Whether the k-th call's tool says a part: no error, and no echo of an argument that nothing before has said."""
    _, arguments, text = variant[k]
    if text.startswith("error: ") or is_error(text) or part not in text.lower().replace(",", ""):
        return False
    letters = [character for character in part if character.isalnum()]
    echoed = any("".join(letters) in "".join(filter(str.isalnum, value.lower())) for value in values_in(arguments))
    return not echoed or any(says(variant, earlier, part) for earlier in range(k))


def parts_of(text):
    return [part.lower().replace(",", "").strip() for part in text.split(", ")]


def said_alone(variant, expected):
    """Observations that hold only the expected texts that each tool states."""
    kept = []
    for k, (name, _, _) in enumerate(variant):
        parts = {part for text in expected.get(name, ()) for part in parts_of(text)}
        kept.append((name, " | ".join(part for part in parts if says(variant, k, part))))
    return kept


def values_in(value):
    """Texts, numbers and keys in arguments."""
    if isinstance(value, dict):
        return [*value, *(text for item in value.values() for text in values_in(item))]
    if isinstance(value, list):
        return [text for item in value for text in values_in(item)]
    return [str(value)] if isinstance(value, str | int | float) and not isinstance(value, bool) else []


def answer_oracle(variant, said, gold):
    answered = all(part in said.lower().replace(",", "") for part in parts_of(gold))
    last = len(variant) - 1
    return float(answered or (last >= 0 and all(says(variant, last, part) for part in parts_of(gold))))


def example_calls(source, name):
    """Arguments of the calls of a tool that stand in its source and its comments, where they are literals."""
    tree = ast.parse(source)
    (function,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name]
    names = [argument.arg for argument in function.args.args]
    for found in re.finditer(rf"(?<!def )\b{re.escape(name)}\(", source):
        text = source[found.start() : found.start() + 1500].replace("\n#", "\n")
        for end in (i for i, c in enumerate(text) if c == ")"):
            try:
                call = ast.parse(text[: end + 1], mode="eval").body
                given = dict(zip(names, map(ast.literal_eval, call.args), strict=False))
                arguments = given | {k.arg: ast.literal_eval(k.value) for k in call.keywords}
                json.dumps(arguments)
            except (SyntaxError, ValueError, TypeError):
                continue
            yield arguments
            break


@pytest.mark.slow
def test_errors_and_echoes_seldom_matter_for_the_example_calls_of_real_tools():
    """Counts the sub-questions solved by the examples in the tools' sources, by the official rule and by ours."""
    from pact_fast.envs.python_tools.pool import SandboxPool

    rows = real_rows()
    official, ours, errors = 0, 0, 0
    with SandboxPool(workers=1) as pool:
        for row in rows:
            codes = json.loads(row["codes"])
            for name, texts in json.loads(row["unsolved_set"]).items():
                calls = [(a, pool.call(codes[name], name, a)) for a in example_calls(codes[name], name)]
                for text in texts:
                    found = [(a, o) for a, o in calls if contains_parts(o, text)]
                    kept = [f for f in (Feedback(name, o, a) for a, o in found) if answers(f, text)]
                    official, ours = official + bool(found), ours + bool(kept)
                    errors += sum(is_error(observation) for _, observation in found)
    print(f"solved by examples: {official} officially, {ours} without echoes; {errors} of the observations were errors")
    assert official > 90 and official - ours <= 8 and errors == 0


def answers(feedback, text):
    return all(stated([feedback], part)[0] for part in expected_parts(text))
