"""The cache of answers: first writer wins, kills leave no half answer, processes share it, replay sends no request."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from pact_fast.errors import PactError
from pact_fast.llm import Answer, BudgetExceeded, InvalidAnswer, LLMClient, ReplayMiss, Request
from pact_fast.llm.cache import AnswerCache
from pact_fast.llm.config import LLMConfig
from tests.support.llm_server import forks_of, in_turn, llm_server, running, said, wait_for
from tests.support.optional import needs

needs("openai", reason="openai is not installed: pip install 'pact-fast[llm]'")

HI = [{"role": "user", "content": "hi"}]
KEY = "ab" + "0" * 62


@pytest.fixture(scope="module")
def server():
    with llm_server(lambda body: said("hello")) as running:
        yield running


@pytest.fixture(autouse=True)
def fresh(server):
    count = iter(range(10**6))
    server.answer = lambda body: said(f"{body['messages'][-1]['content']}/{next(count)}")  # never the same twice
    server.bodies.clear()


@pytest.fixture
def client_of(server, tmp_path):
    made = []

    def make(**settings):
        made.append(LLMClient(server.config(**{"cache_dir": str(tmp_path / "cache"), **settings}), "tester"))
        return made[-1]

    yield make
    for one in made:
        one.close()


def ask(count):
    return [Request([{"role": "user", "content": str(i)}]) for i in range(count)]


def files(folder):
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def test_the_same_call_is_answered_from_the_cache(client_of, server):
    first = client_of().complete(HI)
    again = client_of().complete(HI)
    assert not first.cached and again.cached and again.text == first.text and len(server.bodies) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"messages": [{"role": "user", "content": "ho"}]},
        {"sample": 1},
        {"temperature": 0.1},
        {"max_tokens": 9},
        {"stop": ["x"]},
        {"schema": {"type": "string"}},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"config": {"model": "n"}},
        {"config": {"seed": 5}},
        {"config": {"top_p": 0.5}},
        {"config": {"temperature": 0.2}},
        {"config": {"extra_body": {"top_k": 3}}},
    ],
)
def test_what_determines_the_answer_is_in_the_key(client_of, server, other):
    server.answer = lambda body: said('"x"')
    options = {"messages": HI, **other}
    settings = options.pop("config", {})
    client_of().complete(HI)
    config = LLMConfig(**{"model": "m", "base_url": server.url, "cache_dir": client_of().config.cache_dir, **settings})
    with LLMClient(config, "tester") as client:
        assert not client.complete(**options).cached
        assert client.complete(**options).cached


def test_role_endpoint_and_retries_are_not_in_the_key(client_of, server):
    client_of().complete(HI)
    assert client_of(max_retries=0, timeout=3, base_url="http://127.0.0.1:9").with_role("other").complete(HI).cached


def test_repairs_are_replayed_and_invalid_answers_stay_invalid(client_of, server):
    schema = {"type": "integer"}
    server.answer = in_turn(said("x"), said("1"))
    assert client_of().complete(HI, schema=schema, repairs=1).value == 1
    again = client_of(replay=True).complete(HI, schema=schema, repairs=1)
    assert again.value == 1 and again.repairs == 1 and again.cached
    with pytest.raises(InvalidAnswer) as caught:
        client_of(replay=True).complete(HI, schema=schema)
    assert caught.value.reason == "invalid_json" and len(server.bodies) == 2


def test_replay_names_the_role_and_the_request_that_is_missing(client_of, server):
    client_of().complete(HI)
    replay = client_of(replay=True, base_url="http://127.0.0.1:9")
    assert replay.complete(HI).cached
    with pytest.raises(ReplayMiss, match=r"role 'judge'.*'what is'.*replay=true") as caught:
        replay.with_role("judge").complete([{"role": "user", "content": "what is"}])
    assert caught.value.reason == "replay_miss" and len(server.bodies) == 1
    with pytest.raises(ValueError, match="cache_dir"):
        LLMConfig(model="m", replay=True)


def test_replay_needs_neither_key_nor_server(client_of, monkeypatch):
    monkeypatch.setenv("A_KEY", "0123456789")
    client_of(api_key_env="A_KEY").complete(HI)
    monkeypatch.delenv("A_KEY")
    assert client_of(api_key_env="A_KEY", replay=True).complete(HI).cached


def test_threads_that_ask_the_same_ask_the_server_once(client_of, server):
    server.answer = lambda body: (time.sleep(0.1), said("x"))[1]
    client, found = client_of(), []
    threads = [threading.Thread(target=lambda: found.append(client.complete(HI).text)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["x"] * 8 and len(server.bodies) == 1 and not client._shared._flights


def test_the_first_writer_wins(tmp_path):
    one, two = AnswerCache(tmp_path), AnswerCache(tmp_path)
    assert one.put(KEY, Answer("first"), "r", {}).text == "first"
    assert two.put(KEY, Answer("second"), "r", {}).text == "first"
    assert one.get(KEY).text == two.get(KEY).text == "first"
    assert [path.suffix for path in files(tmp_path)] == [".json"]


def test_an_answer_survives_the_disk_unchanged(tmp_path):
    answer = Answer("ü\ud800\x00\n‮", "because", [("f", '{"a": 1}')], "tool_calls", 3, 4)
    AnswerCache(tmp_path).put(KEY, answer, "r", {"messages": HI})
    assert AnswerCache(tmp_path).get(KEY) == answer


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"format": 0}', "other key", "types"]
)
def test_a_damaged_file_is_named_and_the_server_is_not_asked(client_of, server, tmp_path, damage):
    client_of().complete(HI)
    (path,) = files(tmp_path)
    entry = json.loads(path.read_bytes())
    if damage == "other key":
        damage = json.dumps({**entry, "key": KEY}).encode()
    elif damage == "types":
        damage = json.dumps({**entry, "answer": {**entry["answer"], "text": 7}}).encode()
    path.write_bytes(damage)
    with pytest.raises(PactError, match=f"{path.name} is damaged; remove it"):
        client_of().complete(HI)
    assert len(server.bodies) == 1


def test_what_killed_writers_left_is_swept_when_it_is_old(tmp_path):
    AnswerCache(tmp_path)
    old, new = tmp_path / "tmp" / "old", tmp_path / "tmp" / "new"
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (1, 1))
    AnswerCache(tmp_path)
    assert not old.exists() and new.exists()


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PactError, match="cannot write"):
        LLMClient(LLMConfig(model="m", cache_dir=str(tmp_path / "file" / "cache")), "tester")


def test_a_resumed_run_ends_at_the_same_budget(client_of, server):
    settings = {"token_budget": 100, "max_tokens": 5, "max_concurrency": 1}
    with pytest.raises(BudgetExceeded):
        client_of(**settings).map(ask(50))
    asked = len(server.bodies)
    again = client_of(**settings)
    with pytest.raises(BudgetExceeded):
        again.map(ask(50))
    assert len(server.bodies) == asked and 5 <= asked <= 7
    row = again.report()["usage"][0]
    assert row["hits"] == asked and row["requests"] == 0 and row["cached_tokens"] == 15 * asked


# processes


def _ask_all(url, folder, count, out):
    """Ask `count` questions and write the texts to `out`."""
    config = LLMConfig(model="m", base_url=url, cache_dir=folder, max_concurrency=3)
    with LLMClient(config, "worker") as client:
        texts = [completion.text for completion in client.map(ask(count))]
    Path(out).write_text(json.dumps(texts))


@pytest.fixture(scope="module")
def fork():
    with forks_of(_ask_all) as make:
        yield make


@pytest.mark.slow
def test_a_run_that_is_killed_five_times_asks_no_answered_question_again(server, tmp_path, fork):
    """Killed with SIGKILL at different moments; cached answers are not requested again, and do not change."""
    cache, out, count = tmp_path / "cache", tmp_path / "out.json", 120
    made, sent = iter(range(10**6)), {}

    def answer(body):
        time.sleep(0.005)
        text = f"{next(made)} " + "x" * 20_000
        sent.setdefault(body["messages"][0]["content"], []).append(text)
        return said(text)

    def run():
        pid = fork(server.url, str(cache), count, str(out))
        wait_for(lambda: not running(pid))

    server.answer = answer
    stored: dict[Path, bytes] = {}
    for kill in range(5):
        pid = fork(server.url, str(cache), count, str(out))
        goal = len(stored) + 7 + 3 * kill
        wait_for(lambda goal=goal: len(list(cache.glob("??/*.json"))) >= goal)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda pid=pid: not running(pid))
        now = {path: path.read_bytes() for path in cache.glob("??/*.json")}
        assert stored.items() <= now.items() and not out.exists()
        stored, known = now, {json.loads(data)["request"]["messages"][0]["content"] for data in now.values()}
    before = {question: len(sent[question]) for question in known}
    run()
    texts = json.loads(out.read_text())
    assert len(texts) == count and all(text in sent[str(i)] for i, text in enumerate(texts))
    assert {question: len(sent[question]) for question in known} == before  # not asked again
    assert sum(map(len, sent.values())) <= count + 5 * 3  # at most those under way at each kill
    first, asked = out.read_bytes(), sum(map(len, sent.values()))
    run()
    assert out.read_bytes() == first and sum(map(len, sent.values())) == asked  # the second run asks nothing


@pytest.mark.slow
def test_two_processes_on_one_folder_end_with_the_same_answers(server, tmp_path, fork):
    cache, outs = tmp_path / "cache", [tmp_path / "a.json", tmp_path / "b.json"]
    for pid in [fork(server.url, str(cache), 60, str(out)) for out in outs]:
        wait_for(lambda pid=pid: not running(pid))
    a, b = (json.loads(out.read_text()) for out in outs)
    assert a == b and len(a) == 60 and len(server.bodies) > 60  # they did meet
    assert not list((cache / "tmp").iterdir()) and len(list(cache.glob("??/*.json"))) == 60
