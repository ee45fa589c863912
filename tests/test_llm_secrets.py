"""The key of an endpoint reaches its requests, and nothing else: no file, log, error, cache, report or repr."""

import json
import logging
import traceback

import pytest

from pact_fast.errors import PactError
from pact_fast.llm import InvalidAnswer, LLMClient, LLMConfig, LLMError
from tests.support.llm_server import Reply, llm_server, refused, said
from tests.support.optional import needs

needs("openai", reason="openai is not installed: pip install 'pact-fast[llm]'")

KEY = "k3y-0123456789abcdef"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server():
    with llm_server(lambda body: said("hello")) as running:
        yield running


@pytest.fixture(autouse=True)
def environment(monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx", "httpx2", "httpcore", "httpcore2", "asyncio"):
        caplog.set_level(logging.DEBUG, logger=name)


def client_of(server, folder, **settings):
    settings = {"api_key_env": "MY_KEY", "cache_dir": str(folder), "max_retries": 0, **settings}
    return LLMClient(server.config(**settings), "tester")


def everything(error):
    """The text of an error, of all that led to it, and of the variables of all frames but those of this file."""
    texts = ["".join(traceback.format_exception(error)), repr(error), repr(error.__dict__)]
    while error is not None:
        texts += [str(error), repr(error.args)]
        frame = error.__traceback__
        while frame is not None:
            if frame.tb_frame.f_code.co_filename != __file__:
                texts += [repr(value) for value in frame.tb_frame.f_locals.values()]
            frame = frame.tb_next
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


def written(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_the_key_is_sent_and_stays_in_memory(server, tmp_path, caplog):
    server.answer = lambda body: said("hello")
    server.keys.clear()
    with client_of(server, tmp_path) as client:
        completion = client.complete(HI)
        shown = [repr(completion), repr(client), repr(client.config), client.config.model_dump_json()]
        shown += [repr(client._shared), repr(client._shared._connection), json.dumps(client.report())]
    assert server.keys == [f"Bearer {KEY}"]
    assert KEY not in "\n".join(shown) and KEY.encode() not in written(tmp_path)
    assert caplog.records and not any(KEY in record.getMessage() + repr(record.__dict__) for record in caplog.records)


@pytest.mark.parametrize(
    "reply",
    [
        refused(401, f"Incorrect API key provided: {KEY}"),
        refused(500, KEY),
        refused(429, KEY),
        Reply([KEY.encode()]),
        Reply([json.dumps({"choices": KEY}).encode()]),
        Reply([json.dumps({"choices": [{"message": {"content": [KEY]}}]}).encode()]),
        Reply([json.dumps({"choices": [{"message": {"content": "x"}, "finish_reason": [KEY]}]}).encode()]),
        Reply(reset=True),
        Reply([b"x" * 2000]),
    ],
)
def test_a_server_that_echoes_the_key_finds_it_in_no_error(server, tmp_path, caplog, reply):
    server.answer = lambda body: reply
    with client_of(server, tmp_path, max_answer_bytes=1024) as client:
        with pytest.raises(LLMError) as caught:
            client.complete(HI)
        assert caught.value.__cause__ is None and caught.value.__context__ is None  # openai's errors hold the request
        assert KEY not in everything(caught.value)
    assert not any(KEY in record.getMessage() for record in caplog.records)


def test_an_answer_with_the_key_is_kept_without_it(server, tmp_path):
    call = {"function": {"name": KEY, "arguments": json.dumps({"a": KEY})}}
    server.answer = lambda body: said(f"your key is {KEY}", tool_calls=[call], reasoning_content=KEY)
    with client_of(server, tmp_path) as client:
        completion = client.complete(HI)
        assert completion.text == "your key is (hidden)" and KEY not in repr(completion)
        with pytest.raises(InvalidAnswer) as caught:
            client.complete(HI, check=lambda text: f"wrong: {text}")
        assert KEY not in everything(caught.value)
    assert b"(hidden)" in written(tmp_path) and KEY.encode() not in written(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"api_key_env": KEY},
        {"api_key": KEY},
        {"base_url": f"https://user:{KEY}@host/v1"},
        {"base_url": f"https://host/v1?api_key={KEY}"},
        {"extra_body": {"api_key": KEY}},
        {"extra_body": {"metadata": {"password": KEY}}},
        {"model": "sk-0123456789abcdefghij"},
        {"api_key_env": "sk-0123456789abcdefghij"},
    ],
)
def test_a_key_among_the_settings_is_refused_unseen(settings):
    with pytest.raises(PactError) as caught:
        LLMConfig.read({"model": "m", "base_url": "http://h/v1", **settings})
    assert KEY not in str(caught.value) and "sk-0123" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_variable_that_is_not_set_is_named(server, tmp_path, monkeypatch):
    monkeypatch.delenv("MY_KEY")
    with client_of(server, tmp_path) as client, pytest.raises(PactError, match="MY_KEY is not set"):
        client.complete(HI)


def test_a_redirect_does_not_get_the_key(server, tmp_path):
    with llm_server(lambda body: said("other")) as other:
        server.answer = lambda body: Reply([], 307, {"location": f"{other.url}/chat/completions"})
        with client_of(server, tmp_path) as client, pytest.raises(LLMError) as caught:
            client.complete(HI)
        assert caught.value.reason == "refused" and other.bodies == []


def test_the_packages_own_variables_add_nothing(server, tmp_path, monkeypatch):
    """OPENAI_API_KEY goes nowhere unless a configuration names it, and OPENAI_BASE_URL redirects nothing."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    server.answer = lambda body: said("hello")
    server.keys.clear()
    with client_of(server, tmp_path, api_key_env=None) as client:
        client.complete(HI)
    assert server.keys == ["Bearer none"]
