"""A vLLM server that answers nonsense: one typed error at once, for any answer. No vLLM is needed."""

import gzip
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from pact_fast.errors import EngineDied, EngineError, EngineTimeout
from pact_fast.rollout.engine import Request
from pact_fast.rollout.vllm import http_client
from pact_fast.rollout.vllm.client import VllmServerClient, VllmServerTransport
from pact_fast.rollout.vllm.engine import VllmEngine
from pact_fast.rollout.vllm.responses import read_world_size, short
from pact_fast.rollout.vllm.transport import TurnRequest

MODELS = {"data": [{"id": "model"}]}
CONTEXT, EOT, VOCABULARY, MOST = [5, 6], 1, 100, 4


class Handler(BaseHTTPRequestHandler):
    """Answers each path from `server.answers`: JSON data, or (status, headers, chunks of the body)."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.do_GET()

    def do_GET(self):
        self.server.seen.append(self.path)
        answer = self.server.answers[self.path]
        if not isinstance(answer, tuple):
            answer = 200, {}, [answer if isinstance(answer, bytes) else json.dumps(answer).encode()]
        status, headers, chunks = answer
        self.send_response(status)
        for name, value in {"content-type": "application/json", "connection": "close", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            for chunk in chunks:
                self.wfile.write(chunk)
                self.server.sent += len(chunk)
        except OSError:
            pass  # the client has hung up
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        running.answers, running.seen, running.sent = {}, [], 0
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def transport(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    made = VllmServerTransport("the server", f"http://127.0.0.1:{server.server_port}", folder, folder, timeout=5)
    yield made
    made.close()


@contextmanager
def asked(server, transport):
    """An engine with one turn under way at the server."""
    server.seen.clear()
    engine = VllmEngine(transport, [EOT], deadline=30, vocab_size=VOCABULARY)
    engine.version = 0
    engine.submit(Request(0, np.array(CONTEXT), MOST))
    yield engine
    assert engine.restarts == 0 and server.seen == ["/v1/completions"]  # asked once, no restart


def completion(**changes):
    choice = {"token_ids": [7, EOT], "logprobs": {"token_logprobs": [-0.5, -0.25]}}
    choice |= {name: changes.pop(name) for name in ("token_ids", "logprobs") if name in changes}
    return {"choices": [choice], "usage": {"prompt_tokens_details": {"cached_tokens": 2}}, **changes}


def logprobs(*values):
    return {"token_logprobs": list(values)}


def test_a_good_answer_is_a_turn(server, transport):
    for usage, cached in (({"prompt_tokens_details": {"cached_tokens": 2}}, 2), ({}, None), (None, None)):
        server.answers["/v1/completions"] = completion(usage=usage)
        with asked(server, transport) as engine:
            (turn,) = engine.step()
        assert (turn.ids.tolist(), turn.logprobs.tolist(), turn.ended, turn.cached) == (
            [7, EOT], [-0.5, -0.25], True, cached,
        )  # fmt: skip


NONSENSE = {
    "no object": ["x"],
    "null": None,
    "text": "choices",
    "no choices": {},
    "choices that are an object": {"choices": {"0": 1}},
    "an empty list of choices": {"choices": []},
    "two choices": {"choices": completion()["choices"] * 2},
    "a choice that is null": {"choices": [None]},
    "no token ids": completion(token_ids=None),
    "text as ids": completion(token_ids="75"),
    "an id as text": completion(token_ids=["57", EOT]),
    "a fraction": completion(token_ids=[57.7, EOT]),
    "a float": completion(token_ids=[57.0, EOT]),
    "true as id": completion(token_ids=[True, EOT]),
    "null as id": completion(token_ids=[None, EOT]),
    "nested ids": completion(token_ids=[[7, EOT]]),
    "a negative id": completion(token_ids=[-3, EOT]),
    "an id beyond the vocabulary": completion(token_ids=[VOCABULARY, EOT]),
    "an id of 71 bits": completion(token_ids=[2**70, EOT]),
    "no token": completion(token_ids=[], logprobs=logprobs()),
    "more tokens than asked for": completion(token_ids=[7] * 3000 + [EOT], logprobs=logprobs(*[-1.0] * 3001)),
    "fewer tokens, without an end": completion(token_ids=[7, 7]),
    "fewer log-probs": completion(logprobs=logprobs(-1.0)),
    "no log-probs": completion(logprobs=None),
    "log-probs as text": completion(logprobs=logprobs("-1", "-1")),
    "a log-prob of null": completion(logprobs=logprobs(None, -1.0)),
    "a log-prob of true": completion(logprobs=logprobs(False, -1.0)),
    "a log-prob that is a list": completion(logprobs=logprobs([-1.0], -1.0)),
    "NaN": completion(logprobs=logprobs(float("nan"), -1.0)),
    "minus infinity": completion(logprobs=logprobs(float("-inf"), -1.0)),
    "beyond fp32": completion(logprobs=logprobs(-1e300, -1.0)),
    "an integer beyond fp64": completion(logprobs=logprobs(-(10**400), -1.0)),
    "a probability above 1": completion(logprobs=logprobs(0.5, -1.0)),
    "another context": completion(prompt_token_ids=[5, 7]),
    "usage as text": completion(usage="much"),
    "usage as a number": completion(usage=5),
    "details as text": completion(usage={"prompt_tokens_details": "x"}),
    "cached tokens as text": completion(usage={"prompt_tokens_details": {"cached_tokens": "2"}}),
    "negative cached tokens": completion(usage={"prompt_tokens_details": {"cached_tokens": -1}}),
    "more cached than sent": completion(usage={"prompt_tokens_details": {"cached_tokens": 3}}),
    "deep JSON": b'{"choices":' + b"[" * 200_000,
    "deep and complete JSON": b"[" * 200_000 + b"]" * 200_000,
    "half of an object": b'{"choices": [',
    "not UTF-8": b'{"choices": "\xff"}',
    "an integer of 5000 digits": b'{"choices": ' + b"9" * 5000 + b"}",
    "no JSON": (200, {"content-type": "text/html"}, [b"<html>"]),
    "a body without a type": (200, {"content-type": ""}, [b"{}"]),
    "no body": (204, {}, []),
    "a redirection": (302, {"location": "/elsewhere"}, []),
    "a refusal": (422, {}, [b"no \xff"]),
    "an unknown encoding": (200, {"content-encoding": "br"}, [b"{}"]),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_one_engine_error_at_once(server, transport, name):
    server.answers["/v1/completions"] = NONSENSE[name]
    with asked(server, transport) as engine, pytest.raises(EngineError) as caught:
        engine.step()
    assert type(caught.value) is EngineError  # not EngineDied: the same server would say the same again
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_an_exception_in_the_background_surfaces(server, transport, monkeypatch):
    def broken(*_):
        raise AttributeError("a defect of ours")

    monkeypatch.setattr("pact_fast.rollout.vllm.client.read_completion", broken)
    server.answers["/v1/completions"] = completion()
    with asked(server, transport) as engine, pytest.raises(EngineError, match="AttributeError: a defect of ours"):
        engine.step()


def test_gigabytes_in_a_compressed_megabyte_are_refused_unread(server, transport):
    bomb = gzip.compress(b" " * (8 << 20), 1)
    assert len(bomb) < 1 << 16
    server.answers["/v1/completions"] = 200, {"content-encoding": "gzip"}, [bomb]
    with asked(server, transport) as engine, pytest.raises(EngineError, match="compressed"):
        engine.step()


def test_an_endless_answer_is_refused_early(server, transport, monkeypatch):
    monkeypatch.setattr(http_client, "MAX_TURN_BYTES", 1 << 20)
    monkeypatch.setattr(http_client, "MAX_RESPONSE_BYTES", 2 << 20)
    endless = 200, {}, (b" " * (1 << 16) for _ in range(1 << 12))  # 256 MiB
    server.sent, server.answers["/v1/completions"] = 0, endless
    with asked(server, transport) as engine, pytest.raises(EngineError, match="more than 1 MiB"):
        engine.step()
    server.answers["/v1/models"] = endless
    with pytest.raises(EngineError, match="more than 2 MiB"):
        transport.call("GET", "/v1/models")
    assert server.sent < 64 << 20


def test_an_answer_in_drops_ends_at_the_deadline(server, transport, monkeypatch):
    def drops():
        for _ in range(100):
            time.sleep(0.02)
            yield b" "

    monkeypatch.setattr(transport, "_timeout", 0.2)
    server.answers["/drops"] = 200, {}, drops()
    with pytest.raises(EngineTimeout):
        transport.call("GET", "/drops")


def test_a_connection_that_breaks_is_a_dead_engine(server, transport):
    server.answers["/broken"] = 200, {"content-length": "100"}, [b"{"]
    with pytest.raises(EngineDied):
        transport.call("GET", "/broken")
    server.answers["/broken"] = 500, {}, [b"\xff" * 1000]
    with pytest.raises(EngineDied, match="status 500"):
        transport.call("GET", "/broken")


def test_errors_of_aborted_turns_do_not_end_the_same_turns_submitted_again(server, transport):
    """As after a restart: a turn keeps its key, and an answer that arrived meanwhile belongs to the earlier request."""
    server.seen.clear()
    turns = [TurnRequest(str(n), CONTEXT, MOST, 1.0, n, [EOT], 0) for n in range(4)]
    server.answers["/v1/completions"] = 500, {}, [b"gone"]
    for turn in turns:
        transport.submit(turn)
    end = time.monotonic() + 10
    while server.seen.count("/v1/completions") < len(turns) and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.2)  # for the answers to arrive; nobody polls them
    server.answers["/v1/completions"] = completion()
    transport.abort([turn.key for turn in turns])
    found = []
    for turn in turns:
        transport.submit(turn)
    while len(found) < len(turns) and time.monotonic() < end:
        found += transport.poll(1.0)
    assert sorted(output.key for output in found) == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    "models", [[], None, "x", {}, {"data": None}, {"data": []}, {"data": ["x"]}, {"data": [{}]}, {"data": [{"id": 5}]}]
)
def test_models_of_another_shape(server, tmp_path, models):
    server.answers["/v1/models"] = models
    url = f"http://127.0.0.1:{server.server_port}"
    before = set(threading.enumerate())
    with pytest.raises(EngineError) as caught:
        VllmServerClient(url, tmp_path, tmp_path, timeout=5, start_timeout=5)
    assert type(caught.value) is EngineError
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert "vllm-http" not in left  # its session is closed


SHARD = ["w", 0, 0, 2, 2, 123]


@pytest.mark.parametrize(
    "results",
    [
        "x",
        [1],
        {"results": None},
        {"results": {"0": 1}},
        {"results": ["x"]},
        {"results": [None]},
        {"results": [{}]},
        {"results": [{"version": "1", "shards": []}]},
        {"results": [{"version": True, "shards": []}]},
        {"results": [{"version": [1], "shards": []}]},
        {"results": [{"version": 1}]},
        {"results": [{"version": 1, "shards": {"w": 1}}]},
        {"results": [{"version": 1, "shards": ["w"]}]},
        {"results": [{"version": 1, "shards": [SHARD[:5]]}]},
        {"results": [{"version": 1, "shards": [[*SHARD[:5], "123"]]}]},
        {"results": [{"version": 1, "shards": [[["w"], *SHARD[1:]]]}]},
    ],
)
def test_reports_of_another_shape(server, transport, results):
    server.answers["/collective_rpc"] = results
    for report in (transport.report_weights, transport.report_adapter):
        with pytest.raises(EngineError) as caught:
            report()
        assert type(caught.value) is EngineError


def test_a_good_report_is_read(server, transport):
    server.answers["/collective_rpc"] = {"results": [{"version": 3, "shards": [SHARD]}] * 2}
    version, shards = transport.report_weights()
    assert version == 3 and [list(shard) for shard in shards] == [SHARD, SHARD]
    server.answers["/v1/models"] = MODELS
    transport._wait_ready(1.0)
    assert transport._served_model == "model"


def test_the_number_of_workers_is_one():
    assert read_world_size("e", {"world_size": 2}) == 2
    for wrong in (None, {}, [], {"world_size": "2"}, {"world_size": 0}, {"world_size": True}, {"world_size": 2.0}):
        with pytest.raises(EngineError, match="world_size"):
            read_world_size("e", wrong)


def test_values_in_messages_are_short_and_printable():
    for value in ("\x1b]0;owned\x07" * 50, "x" * 10**6, 10**5000, [[]] * 9, {"a": 1}, None, -1.5):
        assert short(value).isprintable() and len(short(value)) <= 60
