"""`pact-fast eval hotpotqa|musique|2wikimultihopqa|bamboogle`, and the environment `qa` behind it."""

from __future__ import annotations

import csv
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

from pact_fast.cli.main import main
from pact_fast.data.readers import read_tasks
from pact_fast.data.types import Task, TurnRecord
from pact_fast.envs.qa.env import QuestionAnswering
from pact_fast.envs.qa.retrieval import MAX_ANSWER, read_corpus
from pact_fast.envs.simulated import Simulated
from pact_fast.errors import PactError
from tests.support.runs import TINY_RUN
from tests.support.trajectories import rollout

PASSAGES = [
    {"title": "Paris", "text": "Paris is the capital of France."},
    {"title": "Lyon", "text": "Lyon is a city in France."},
    {"title": "Oslo", "text": "Oslo is the capital of Norway."},
    {"title": "Bergen", "text": "Bergen is a city in Norway."},
]
TASK = Task("t", [{"role": "user", "content": "?"}], answer="the Seine", env_args={"passages": PASSAGES})


def environment(task: Task = TASK, **args) -> QuestionAnswering:
    made = QuestionAnswering.factory(args, 5.0)()
    QuestionAnswering.check_task(task)
    made.reset(task)
    return made


def titles(observation: str) -> list[str]:
    return [line.split("Title: ")[1].split(")")[0] for line in observation.splitlines()]


# -- the search tool ------------------------------------------------------------------------------------------------------


def test_a_search_has_the_form_that_search_r1_uses():
    observation = environment(top_k=2).call("search", {"query": "capital of Norway"})
    assert observation.splitlines()[0] == "Doc 1(Title: Oslo) Oslo is the capital of Norway."
    assert len(observation.splitlines()) == 2


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "corpus.jsonl"
    rows = [{"id": str(i), "contents": f'"{p["title"]}"\n{p["text"]}'} for i, p in enumerate(PASSAGES)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_corpus_is_searched_and_equal_scores_keep_the_order_of_the_file(corpus):
    pytest.importorskip("bm25s", reason="bm25s is not installed")
    made = environment(search=str(corpus), top_k=3)
    assert titles(made.call("search", {"query": "the capital of Norway?"}))[0] == "Oslo"
    # every passage has one of the two words; those that share a score come in the order of the file
    assert titles(made.call("search", {"query": "France"})) == ["Paris", "Lyon"]
    assert titles(made.call("search", {"query": "Lyon Bergen"})) == ["Lyon", "Bergen"]
    assert made.call("search", {"query": "zebra"}) == "no passage has any of these words"
    assert len(titles(environment(search=str(corpus), top_k=50).call("search", {"query": "capital city"}))) == 4


def test_a_corpus_with_columns_for_title_and_text(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps(PASSAGES[0]) + "\n" + json.dumps({"title": "no text"}) + "\n")
    with pytest.raises(PactError, match=r"corpus.jsonl:2.*'contents'"):
        read_corpus(path)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"query": 3}, {"query": " "}, {"q": "x"}, {"query": "x", "k": 9}, {"query": ["a"]}, {"query": None}],
)
def test_a_call_that_does_not_fit_is_an_error_observation(arguments):
    assert environment().call("search", arguments).startswith("error: search takes")
    assert environment().call("__class__", arguments) == "error: there is no such tool"


def test_an_observation_is_bounded():
    task = Task("t", [], answer="x", env_args={"passages": [{"title": "a", "text": "word " * 9999}]})
    assert len(environment(task, max_output=300).call("search", {"query": "word"})) == 300


def test_without_search_there_is_no_tool():
    made = environment(search="none")
    assert made.tools == [] and made.call("search", {"query": "Oslo"}).startswith("error")


# -- a retrieval server ---------------------------------------------------------------------------------------------------


class SearchServer(BaseHTTPRequestHandler):
    answer: ClassVar[bytes] = b""
    queries: ClassVar[list[dict]] = []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).queries.append(json.loads(body))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    handler = type("Handler", (SearchServer,), {"queries": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,))
        thread.start()
        yield handler, f"http://127.0.0.1:{serving.server_port}/retrieve"
        serving.shutdown()
        thread.join()


def scored(*passages: dict) -> bytes:
    documents = [{"document": {"contents": f'"{p["title"]}"\n{p["text"]}'}, "score": 1.0} for p in passages]
    return json.dumps({"result": [documents]}).encode()


def test_a_server_with_search_r1_s_interface(server):
    handler, url = server
    handler.answer = scored(PASSAGES[2], PASSAGES[0])
    made = environment(search=url)
    assert made.blocking
    assert titles(made.call("search", {"query": "Norway"})) == ["Oslo", "Paris"]
    assert handler.queries[-1] == {"queries": ["Norway"], "topk": 3, "return_scores": True}
    handler.answer = json.dumps({"result": [[{"contents": "Rome\nA city."}]]}).encode()  # as without scores
    assert made.call("search", {"query": "x"}) == "Doc 1(Title: Rome) A city."


@pytest.mark.parametrize(
    "answer, message",
    [
        (b"not json", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"{}", "is not {"),
        (b'{"result": []}', "is not {"),
        (b'{"result": [[{"document": {"contents": 5}}]]}', "is not {"),
        (b'{"result": [["text"]]}', "is not {"),
        (b" " * (MAX_ANSWER + 1), "larger than"),
    ],
)
def test_a_bad_answer_is_an_error_at_the_start_and_an_observation_later(server, answer, message):
    handler, url = server
    handler.answer = scored(PASSAGES[0])
    made = environment(search=url)
    handler.answer = answer
    observation = made.call("search", {"query": "x"})
    assert observation.startswith("error: the search server's answer") and message in observation
    with pytest.raises(PactError, match=r"env\.args\.search: .* at 'http"):
        environment(search=url)


def test_no_server_is_an_error_at_the_start():
    with pytest.raises(
        PactError, match=r"env\.args\.search: the search server failed: ConnectError at 'http://127\.0\.0\.1:9/'"
    ):
        QuestionAnswering.factory({"search": "http://127.0.0.1:9/"}, 0.1)


# -- settings, rows, rewards ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, message",
    [
        ({"serach": "none"}, "unknown key"),
        ({"search": 3}, "must be passages, none"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"max_output": 3}, "max_output"),
        ({"search": "missing.jsonl"}, "no such file"),
    ],
)
def test_settings_that_do_not_fit(args, message):
    pytest.importorskip("bm25s", reason="bm25s is not installed")
    with pytest.raises(PactError, match=message):
        QuestionAnswering.factory(args, 1.0)


@pytest.mark.parametrize(
    "env_args, message",
    [
        ({"passages": [{"title": "x"}]}, "must be a list of"),
        ({"passages": "text"}, "must be a list of"),
        ({"qa_set": "squad"}, "must be one of hotpotqa"),
    ],
)
def test_rows_that_do_not_fit(env_args, message):
    with pytest.raises(PactError, match=message):
        QuestionAnswering.check_task(Task("t", [], answer="x", env_args=env_args))


def test_a_row_without_passages_names_the_cures():
    with pytest.raises(PactError, match=r"env.args.search to a file"):
        QuestionAnswering().reset(Task("t", [], answer="x"))


@pytest.mark.parametrize(
    "said, qa_set, scores",
    [
        ("The Seine.", "musique", (1.0, 1.0)),
        ("<answer>seine</answer>", "hotpotqa", (1.0, 1.0)),
        ("river Seine", "bamboogle", (0.0, 2 / 3)),
        ("yes", "hotpotqa", (0.0, 0.0)),
        ("", "2wikimultihopqa", (0.0, 0.0)),
    ],
)
def test_success_is_exact_match_and_f1_stands_beside_it(said, qa_set, scores):
    task = replace(TASK, env_args={"qa_set": qa_set})
    told = rollout(TurnRecord(said, "", said))
    for env in (QuestionAnswering(), Simulated()):
        rewards = env.reward(task, told)
        assert (rewards["success"], pytest.approx(rewards["f1"])) == scores


# -- the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path) -> Path:
    """A recipe of a tiny model, and the same two questions in the forms of three data sets."""
    tiny = {**TINY_RUN["model"]["random_init"], "vocab_size": 400}
    rollouts = {"max_turn_tokens": 6, "max_completion_length": 24, "max_turns": 2}
    (tmp_path / "tiny.yaml").write_text(
        yaml.safe_dump({"model": {"random_init": tiny}, "rollout": rollouts, "threads": 1})
    )
    context = [[p["title"], [p["text"]]] for p in PASSAGES]
    hotpot = [
        {"_id": f"h{i}", "question": f"{i}?", "answer": "Oslo", "type": "bridge", "context": context} for i in (1, 2)
    ]
    (tmp_path / "hotpot.json").write_text(json.dumps(hotpot))
    flashrag = [{"id": f"f{i}", "question": f"{i}?", "golden_answers": ["Oslo", "Kristiania"]} for i in (1, 2)]
    (tmp_path / "flashrag.jsonl").write_text("".join(json.dumps(row) + "\n" for row in flashrag))
    with (tmp_path / "bamboogle.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["Question", "Answer"], ["1?", "Oslo"], ["2?", "Oslo"]])
    return tmp_path


def evaluate(files: Path, bench: str, *settings: str) -> dict:
    out = files / "out" / bench
    options = ["--model", str(files / "tiny.yaml"), "--out", str(out), "rollout.max_prompt_length=900"]
    assert main(["eval", bench, *options, *settings]) == 0
    return json.loads((out / "summary.json").read_text())


@pytest.mark.parametrize(
    "bench, file, args",
    [
        ("hotpotqa", "hotpot.json", ()),
        ("2wikimultihopqa", "hotpot.json", ("env.name=simulated",)),
        ("musique", "flashrag.jsonl", ("env.args.search=none",)),
        ("bamboogle", "bamboogle.csv", ("env.args.search=none",)),
    ],
)
def test_every_set_runs_in_its_own_form(files, bench, file, args):
    summary = evaluate(files, bench, f"data.eval={files / file}", *args)
    category = summary["categories"][bench]
    assert category["tasks"] == 2 and category["pass@1"]["mean"] == 0.0
    assert category["f1"]["mean"] == 0.0


def test_rows_without_passages_name_the_cures(files, capsys):
    assert main(["eval", "musique", "--model", str(files / "tiny.yaml"), f"data.eval={files / 'flashrag.jsonl'}"]) != 0
    assert "2 of 2 rows have no passages to search (f1 is the first)" in capsys.readouterr().err
    assert main(["eval", "musique", "--model", str(files / "tiny.yaml")]) != 0
    assert "add data.eval=FILE" in capsys.readouterr().err


def test_converted_rows_train(files):
    """`data convert` writes rows for data.train, with the environment of each row."""
    out = files / "rows.jsonl"
    assert main(["data", "convert", "hotpotqa", f"data.eval={files / 'hotpot.json'}", "-o", str(out)]) == 0
    (task, _) = read_tasks(str(out))
    assert task.env == "qa" and task.columns["answers"] == ["Oslo"]
    made = environment(task)
    assert titles(made.call("search", {"query": "capital of Norway"}))[0] == "Oslo"
    assert made.reward(task, rollout(TurnRecord("Oslo", "", "Oslo"))) == {"success": 1.0, "f1": 1.0}
