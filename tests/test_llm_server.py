"""The process of a client's own server, with a small program in vLLM's place: when it ends, why it does not start."""

import importlib.util
import sys
import threading

import pytest

from pact_fast.errors import PactError
from pact_fast.llm import LLMClient, LLMConfig, server
from pact_fast.vllm_process import launch
from tests.support.optional import needs

needs("openai", reason="openai is not installed: pip install 'pact-fast[llm]'")
pytestmark = pytest.mark.slow
HEALTHY = """
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
while True:
    connection = listener.accept()[0]
    connection.recv(1000)
    connection.sendall(b"HTTP/1.1 200 OK\\r\\ncontent-length: 0\\r\\n\\r\\n")
    connection.close()
"""


@pytest.fixture
def program(monkeypatch):
    """A function that puts a Python program in the place of vLLM; its argument is the path of the socket."""

    def put(source):
        def start(command, environment, log):
            return launch([sys.executable, "-S", "-c", source, command[command.index("--uds") + 1]], environment, log)

        monkeypatch.setattr(server, "launch", start)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)

    return put


def test_a_server_outlives_the_thread_that_asked_first_and_ends_with_its_client(program):
    """Linux ends a child with the thread that has started it, and `map` asks from the threads of a pool."""
    program(HEALTHY)
    made = []
    thread = threading.Thread(target=lambda: made.append(server.VllmServer(LLMConfig(model="m"))))
    thread.start()
    thread.join()
    (one,) = made
    try:
        with pytest.raises(Exception, match="timed out"):
            one._process.wait(timeout=0.5)
    finally:
        one.connection.close()
        one.close()
    assert one._process.returncode == -9 and not one._folder.exists()


def test_a_server_that_ends_is_an_error_with_the_end_of_its_log(program):
    program("raise SystemExit('no such model')")
    with (
        LLMClient(LLMConfig(model="m"), "tester") as client,
        pytest.raises(PactError, match=r"(?s)status 1.*no such model"),
    ):
        client.complete([{"role": "user", "content": "hi"}])


def test_a_server_that_does_not_become_ready_is_killed(program):
    program("import time; print('loading', flush=True); time.sleep(600)")
    config = LLMConfig(model="m", server_timeout=0.5)
    with LLMClient(config, "tester") as client, pytest.raises(PactError, match=r"within server_timeout=0\.5 s"):
        client.complete([{"role": "user", "content": "hi"}])


def test_without_vllm_it_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with (
        LLMClient(LLMConfig(model="m"), "tester") as client,
        pytest.raises(PactError, match="vLLM, which is not installed"),
    ):
        client.complete([{"role": "user", "content": "hi"}])
