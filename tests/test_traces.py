"""`pact-fast traces`: kept and rejected rows, from reference calls and from a teacher, and after a kill."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from pact_fast.chat.segments import prefix_ends
from pact_fast.cli.main import main
from pact_fast.data.readers import read_tasks
from pact_fast.data.types import ExpertTrace, ExpertTurn, ToolCall
from pact_fast.synthesis.journal import Journal
from pact_fast.synthesis.traces.reference import template_reasoning
from pact_fast.synthesis.traces.segments import segment_ends
from pact_fast.synthesis.traces.verify import REASONS
from tests.support.llm_server import llm_server, said

LIBRARY = """
SHELF = {"Emma": "Jane Austen", "Jane Austen": "Steventon"}


class Library:
    blocking = False
    tools = [
        {"type": "function", "function": {
            "name": name, "description": text,
            "parameters": {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]},
        }}
        for name, text in (("author", "Find who wrote a book."), ("birthplace", "Find where a person was born."))
    ]

    def __init__(self):
        self.count = 0

    def reset(self, task):
        self.task, self.found = task, []

    def call(self, name, arguments):
        if arguments["key"] == "clock":
            Library.calls = getattr(Library, "calls", 0) + 1
            return str(Library.calls)
        text = SHELF.get(arguments["key"], "error: unknown")
        self.found.append(text)
        return text

    def reward(self, task, trajectory):
        if task.env_args.get("silent"):
            return {}
        wanted = task.env_args.get("wanted", "Steventon")
        return {"success": float(wanted in self.found and wanted in trajectory.answer)}


class Asking(Library):
    # a reader who names the book when asked, and leaves when told the place

    def respond(self, text):
        return None if "Steventon" in text else "Emma, please."


class Prompted(Library):
    def user_prompt(self):
        return "You want to know where the author of Emma was born."
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("library") / "library.py"
    file.write_text(LIBRARY)
    return f"env.name={file}:Library"


def calls(*pairs: tuple[str, str]) -> list[dict]:
    return [{"name": name, "arguments": {"key": key}} for name, key in pairs]


GOOD = calls(("author", "Emma"), ("birthplace", "Jane Austen"))
QUESTION = "Where was the author of Emma born?"
ROWS = {
    "good": {"reference_calls": GOOD, "answer": "Steventon"},
    "half": {"reference_calls": GOOD[:1], "answer": "Steventon"},
    "none": {"answer": "Steventon"},
    "leak": {"reference_calls": [*calls(("birthplace", "Steventon")), *GOOD], "answer": "Steventon"},
    "clock": {
        "reference_calls": [*calls(("author", "clock")), *GOOD], "answer": "Steventon", "env_args": {"wanted": "Steventon"},
    },
    "executed": {"reference_calls": GOOD, "env_args": {"silent": True}},
    "failed": {"reference_calls": [*GOOD, *calls(("author", "nobody"))], "env_args": {"silent": True}},
    "misfit": {"reference_calls": [{"name": "author", "arguments": {}}, *GOOD], "answer": "Steventon"},
}  # fmt: skip
EXPECTED = {
    "good": [], "executed": [], "half": ["unsolved", "no_evidence"], "none": ["no_reference"], "leak": ["answer_leak"],
    "clock": ["not_repeatable"], "failed": ["tool_error"], "misfit": ["malformed_call"],
}  # fmt: skip


def write_rows(path: Path, rows: dict[str, dict]) -> str:
    lines = [json.dumps({"id": name, "prompt": QUESTION, **row}) for name, row in rows.items()]
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def outcome(out: Path) -> dict[str | None, list[str]]:
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    return {task.id: [] for task in read_tasks(out / "train.jsonl")} | {r["id"]: r["reasons"] for r in rejected}


def test_reference_calls_are_executed_and_kept_with_a_success_that_repeats(tmp_path, library, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    with Path(rows).open("a") as file:
        file.write('{"id": "x", "prompt": 3}\n')
    out = tmp_path / "out"
    assert main(["traces", rows, "-o", str(out), library]) == 0
    assert outcome(out) == EXPECTED | {None: ["unreadable"]}
    printed = capsys.readouterr().out
    assert "2 of 9 rows have a verified trace" in printed and "1 no_evidence" in printed
    assert set(json.loads((out / "summary.json").read_text())["reasons"]) <= set(REASONS)
    good, executed = read_tasks(out / "train.jsonl")
    assert good.expert.calls == good.reference_calls == [ToolCall(c["name"], c["arguments"]) for c in GOOD]
    assert [turn.observations for turn in good.expert.turns] == [("Jane Austen",), ("Steventon",)]
    assert good.expert.answer == "Steventon" and good.columns["reasoning"] == "template"
    assert good.columns["trace_source"] == executed.columns["trace_source"] == "reference"
    assert "Find who wrote a book." in good.expert.turns[0].reasoning
    for turn in good.expert.turns:  # all of a template can be supervised: it previews no call
        assert turn.reasoning and prefix_ends(turn.reasoning, turn.calls)[-1] == len(turn.reasoning)


LONG = {"long": {"reference_calls": [*GOOD, *calls(("author", "Emma"))] * 5, "answer": "Steventon"}}


def test_reference_calls_are_played_to_their_end_whatever_the_limit_of_turns(tmp_path, library):
    rows = write_rows(tmp_path / "rows.jsonl", LONG)
    assert main(["traces", rows, "-o", str(tmp_path / "out"), library, "rollout.max_turns=2"]) == 0
    (task,) = read_tasks(tmp_path / "out" / "train.jsonl")
    assert len(task.expert.turns) == 15


def test_a_trace_of_the_row_keeps_its_reasoning_and_gets_new_observations(tmp_path, library):
    old = ExpertTrace(
        (
            ExpertTurn("First the author.", (ToolCall("author", {"key": "Emma"}),), ("made up",)),
            ExpertTurn("Then the place.", (ToolCall("birthplace", {"key": "Jane Austen"}),), ("made up",)),
        ),
        "It is Steventon.",
    )
    rows = write_rows(tmp_path / "rows.jsonl", {"a": {"expert_trace": old.to_messages(), "answer": "Steventon"}})
    assert main(["traces", rows, "-o", str(tmp_path / "out"), library]) == 0
    (task,) = read_tasks(tmp_path / "out" / "train.jsonl")
    assert [turn.reasoning for turn in task.expert.turns] == ["First the author.", "Then the place."]
    assert [turn.observations for turn in task.expert.turns] == [("Jane Austen",), ("Steventon",)]
    assert task.columns["reasoning"] == "row"
    made = {"reasoning": "template", "expert_trace": old.to_messages(), "answer": "Steventon"}
    rows = write_rows(tmp_path / "made.jsonl", {"a": made})  # as the tasks of tau2 say of themselves
    assert main(["traces", rows, "-o", str(tmp_path / "again"), library]) == 0
    assert read_tasks(tmp_path / "again" / "train.jsonl")[0].columns["reasoning"] == "template"


def test_dialogues_are_played_with_the_user_of_the_environment(tmp_path, library):
    look_up = [ExpertTurn("", (ToolCall(c["name"], c["arguments"]),), ("",)) for c in GOOD]
    old = ExpertTrace((ExpertTurn("", (), (), "Which book?", "?"), *look_up), "Steventon")
    silent = ExpertTrace((ExpertTurn("", (), (), "Which book?", "?"), *look_up[:1]), "Who knows.")
    rows = {
        "good": {"expert_trace": old.to_messages(), "answer": "Steventon"},
        "cut": {"expert_trace": silent.to_messages()},
        "calls": {"reference_calls": GOOD, "answer": "Steventon"},
    }
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert main(["traces", path, "-o", str(tmp_path / "out"), library.replace("Library", "Asking")]) == 0
    assert outcome(tmp_path / "out") == {"good": [], "calls": [], "cut": ["unfinished"]}
    good = read_tasks(tmp_path / "out" / "train.jsonl")[0]
    assert good.expert.turns[0].user == "Emma, please." and good.expert.answer == "Steventon"


def test_a_model_behind_an_endpoint_plays_the_user_of_traces(tmp_path, library):
    look_up = [ExpertTurn("", (ToolCall(c["name"], c["arguments"]),), ("",)) for c in GOOD]
    old = ExpertTrace((ExpertTurn("", (), (), "Which book?", "?"), *look_up), "Steventon")
    path = write_rows(tmp_path / "rows.jsonl", {"good": {"expert_trace": old.to_messages(), "answer": "Steventon"}})
    with llm_server(
        lambda body: said("###STOP###" if "Steventon" in body["messages"][-1]["content"] else "Emma, please.")
    ) as server:
        user = f"rollout.user_llm={json.dumps({'model': 'm', 'base_url': server.url})}"
        options = [library.replace("Library", "Prompted"), "rollout.user=endpoint", user]
        assert main(["traces", path, "-o", str(tmp_path / "out"), *options]) == 0
        assert len(server.bodies) == 2  # played twice, asked once
    assert outcome(tmp_path / "out") == {"good": []}
    assert read_tasks(tmp_path / "out" / "train.jsonl")[0].expert.turns[0].user == "Emma, please."
    assert list((tmp_path / "out" / "answers").rglob("*.json"))


def test_templates_preview_no_call_whatever_the_description_says():
    tool = {"type": "function", "function": {"name": "find_it", "description": 'Use find_it(key="x") to find.'}}
    call = ToolCall("find_it", {"key": "x"})
    for text in (
        template_reasoning(0, [call], [tool]),
        template_reasoning(3, [call], []),
        template_reasoning(1, [call], [tool]),
    ):
        assert "find_it" not in text and prefix_ends(text, [call])[-1] == len(text) > 0
    tool["function"]["description"] = "This tool belongs to the X API. Tool description: Look for a thing. And more."
    assert template_reasoning(0, [call], [tool]).endswith("What I need next: Look for a thing.")


# --- a teacher


def asked_tools(*names_and_keys: tuple[str, str]) -> list[dict]:
    return [
        {"id": f"c{i}", "type": "function", "function": {"name": name, "arguments": json.dumps({"key": key})}}
        for i, (name, key) in enumerate(names_and_keys)
    ]


def teach(body):
    """Solves the question; `Guess` in it makes a teacher that knows the answer before it has asked."""
    messages = body["messages"]
    tools = [m for m in messages if m["role"] == "tool"]
    question = next(m["content"] for m in messages if m["role"] == "user")
    if "Splice" in question:
        return said(
            None, tool_calls=[{"id": "c", "type": "function", "function": {"name": "author", "arguments": "{"}}]
        )
    if "Loop" in question:
        return said("Again.", tool_calls=asked_tools(("author", "Emma")))
    if "Lazy" in question:
        return said("Steventon")
    if not tools:
        thought = "It must be Steventon." if "Guess" in question else "<think>I need the author.</think>"
        return said(thought, tool_calls=asked_tools(("author", "Emma")))
    if len(tools) == 1:
        return said(
            "The author is known. Next, the place.", tool_calls=asked_tools(("birthplace", tools[0]["content"]))
        )
    return said(f"<answer>{tools[1]['content']}</answer>")


TAUGHT = {
    "solved": "", "guess": "Guess!", "loop": "Loop!", "lazy": "Lazy!", "splice": "Splice!",
}  # fmt: skip
TAUGHT_REASONS = {
    "solved": [], "guess": ["answer_leak"], "loop": ["limit"], "lazy": ["no_turns", "unsolved", "no_reasoning"],
    "splice": ["invalid_answer"],
}  # fmt: skip


def teacher_options(server) -> list[str]:
    return ["--calls", "teacher", "--llm", "model=m", "--llm", f"base_url={server.url}", "rollout.max_turns=4"]


def test_a_teacher_s_traces_are_kept_only_if_execution_verifies_them(tmp_path, library):
    rows = {name: {"prompt": f"{text} {QUESTION}", "answer": "Steventon"} for name, text in TAUGHT.items()}
    path = write_rows(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out"
    with llm_server(teach) as server:
        assert main(["traces", path, "-o", str(out), library, *teacher_options(server)]) == 0
        assert outcome(out) == TAUGHT_REASONS
        first = server.bodies[0]["messages"]
        assert first[0]["role"] == "system" and first[-1]["role"] == "user"
        assert {t["function"]["name"] for t in server.bodies[0]["tools"]} == {"author", "birthplace"}
    (task,) = read_tasks(out / "train.jsonl")
    assert task.prompt == [{"role": "user", "content": f" {QUESTION}"}]  # without the teacher's instruction
    assert [turn.reasoning for turn in task.expert.turns] == [
        "I need the author.",
        "The author is known. Next, the place.",
    ]
    assert task.columns["reasoning"] == "teacher" and task.columns["trace_source"] == "teacher:m"
    # a second run reads the answers of the first
    with llm_server(lambda body: said("not asked")) as server:
        again = tmp_path / "again"
        options = [*teacher_options(server), "--llm", f"cache_dir={out / 'answers'}"]
        assert main(["traces", path, "-o", str(again), library, *options]) == 0
        assert server.bodies == [] and (again / "train.jsonl").read_bytes() == (out / "train.jsonl").read_bytes()


def test_further_attempts_are_other_questions_and_stop_at_the_first_success(tmp_path, library):
    path = write_rows(tmp_path / "rows.jsonl", {"a": {"answer": "Steventon"}})
    seeds = []

    def answer(body):
        seeds.append(body["seed"])
        return said("Steventon") if len(set(seeds)) < 3 else teach(body)

    with llm_server(answer) as server:
        options = [*teacher_options(server), "--attempts", "5"]
        assert main(["traces", path, "-o", str(tmp_path / "out"), library, *options]) == 0
    assert outcome(tmp_path / "out") == {"a": []} and len(set(seeds)) == 3


def test_segments_of_a_model_are_kept_and_rules_take_the_place_of_a_bad_answer(tmp_path, library):
    first, second = "I know the book, and I need its author. He is not named.", "Now the place. It is not known."
    old = ExpertTrace(
        (
            ExpertTurn(first, (ToolCall("author", {"key": "Emma"}),), ("",)),
            ExpertTurn(second, (ToolCall("birthplace", {"key": "Jane Austen"}),), ("",)),
        ),
        "Steventon",
    )
    path = write_rows(tmp_path / "rows.jsonl", {"a": {"expert_trace": old.to_messages(), "answer": "Steventon"}})

    def answer(body):
        text = body["messages"][1]["content"]
        parts = ["I know the book,", "and I need its author.", "He is not named."] if text == first else ["Now", "else"]
        return said(json.dumps({"segments": parts}))

    out = tmp_path / "out"
    with llm_server(answer) as server:
        options = ["--segments", "model", "--llm", "model=m", "--llm", f"base_url={server.url}"]
        assert main(["traces", path, "-o", str(out), library, *options]) == 0
    assert json.loads((out / "summary.json").read_text())["segments"] == {"model": 1, "rules": 1}
    (task,) = read_tasks(out / "train.jsonl")
    by_model, by_rules = task.expert.turns
    assert by_model.segments == (17, 40, len(first)) and by_rules.segments is None
    ends = prefix_ends(by_model.reasoning, by_model.calls, by_model.segments)
    assert ends == [0, 17, 40, len(first), len(first)]


@pytest.mark.parametrize(
    ("parts", "ends"),
    [
        (["a b.", "c."], (5, 7)),
        ([" a b. ", "c. "], (5, 7)),
        (["a b.", "d."], None),
        (["a b."], None),
        (["c.", "a b."], None),
        (["a b.", "", "c."], None),
        (["a b.", "c.", "more"], None),
        ([], None),
    ],
)
def test_segments_must_tile_the_reasoning(parts, ends):
    assert segment_ends("a b. c.", parts) == ends


@pytest.mark.parametrize("ends", [[3], [0, 5], [5, 3], [3, 3, 5], ["5"], [True, 5], 5, [3, 9]])
def test_segments_of_a_row_that_do_not_fit_are_an_error_that_names_the_message(ends):
    messages = ExpertTrace((ExpertTurn("Hello", (ToolCall("f", {}),), ("x",)),)).to_messages()
    messages[0]["reasoning_segments"] = ends
    with pytest.raises(ValueError, match=r"^message 0: 'reasoning_segments' must be"):
        ExpertTrace.from_messages(messages)


# --- kills


@pytest.fixture(scope="module")
def uninterrupted(library, tmp_path_factory) -> tuple[str, Path]:
    """Rows, and the output of a command that nothing has stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    few = {f"{name}-{k}": row for k in range(10) for name, row in ROWS.items() if name != "clock"}
    rows = write_rows(folder / "rows.jsonl", few)
    assert main(["traces", rows, "-o", str(folder / "out"), library]) == 0
    return rows, folder / "out"


FILES = ("train.jsonl", "rejected.jsonl", "summary.json")


@pytest.mark.parametrize("stop", [0, 1, 20, 65])
@pytest.mark.parametrize("cut", [0, 9])
def test_an_interrupted_command_gives_the_same_files(uninterrupted, tmp_path, library, monkeypatch, stop, cut):
    (rows, whole), broken = uninterrupted, tmp_path / "broken"
    add = Journal.add

    def stopping(journal, record):
        if len(journal.records) == stop:
            raise KeyboardInterrupt
        add(journal, record)

    monkeypatch.setattr(Journal, "add", stopping)
    assert main(["traces", rows, "-o", str(broken), library]) == 130
    monkeypatch.setattr(Journal, "add", add)
    journal = broken / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[: journal.stat().st_size - cut])  # in the middle of a line
    assert main(["traces", rows, "-o", str(broken), library]) == 0
    for name in FILES:
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    assert not journal.exists()
    assert main(["traces", rows, "-o", str(broken), library]) == 0  # finished: nothing is made again


@pytest.mark.slow
def test_kill_9_at_any_moment_gives_the_same_files(uninterrupted, tmp_path, library):
    (rows, whole), killed = uninterrupted, tmp_path / "killed"
    for moment in (1, 22, 50):
        pid = os.fork()
        if pid == 0:
            _kill_at(moment)
            main(["traces", rows, "-o", str(killed), library])
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert main(["traces", rows, "-o", str(killed), library]) == 0
    for name in FILES:
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def _kill_at(records: int) -> None:
    add = Journal.add

    def adding(journal, record):
        add(journal, record)
        if len(journal.records) == records:
            os.kill(os.getpid(), signal.SIGKILL)

    Journal.add = adding


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calls", "teacher"], "--llm model=NAME"),
        (["--llm", "model=m"], "--calls teacher or --segments model"),
        (["--attempts", "2"], "--attempts belongs to a teacher"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--calls", "teacher", "--llm", "secret"], "write a key and a value"),
        (["--calls", "teacher", "--llm", "model=m", "--llm", "modell=x"], "--llm: modell"),
    ],
)
def test_wrong_options_are_one_line_with_the_cure(tmp_path, library, options, message, capsys):
    path = write_rows(tmp_path / "rows.jsonl", {"good": ROWS["good"]})
    assert main(["traces", path, "-o", str(tmp_path / "out"), library, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and "secret" not in error


def test_other_settings_in_the_same_folder_are_refused_by_name(tmp_path, library, capsys):
    path = write_rows(tmp_path / "rows.jsonl", {"good": ROWS["good"]})
    assert main(["traces", path, "-o", str(tmp_path / "out"), library]) == 0
    assert main(["traces", path, "-o", str(tmp_path / "out"), library, "rollout.max_turns=3"]) == 2
    assert "rollout.max_turns was 10, now 3" in capsys.readouterr().err
