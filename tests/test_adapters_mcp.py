"""The adapter of MCP servers, against real servers over stdio and HTTP."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pact_fast.data.types import Task
from pact_fast.envs.adapters.mcp import observation
from pact_fast.envs.registry import environment
from pact_fast.errors import PactError
from tests.support.optional import needs

needs("mcp", reason="pip install mcp")

pytestmark = pytest.mark.slow

SERVER = str(Path(__file__).parent / "support" / "mcp_server.py")
STDIO = {"command": sys.executable, "args": [SERVER]}
TASK = Task("t", [{"role": "user", "content": "Go."}])


def make(server=STDIO, timeout=20.0, **args):
    return environment.get("mcp").factory({"servers": {"s": server}, **args}, timeout)


def started(make_env):
    env = make_env()
    env.reset(TASK)
    return env


def is_running(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def ends(pid: int, seconds: float = 15) -> bool:
    end = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not is_running(pid)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def serve(port: int) -> subprocess.Popen:
    """A server over HTTP that accepts connections."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, SERVER, "http", str(port)], **quiet)
    for _ in range(400):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    return server


@pytest.fixture(scope="module")
def url():
    port = free_port()
    server = serve(port)
    yield f"http://127.0.0.1:{port}/mcp"
    server.kill()
    server.wait(10)


def test_a_server_over_http_that_was_started_anew_is_joined_again():
    port = free_port()
    server = serve(port)
    try:
        env = started(make({"url": f"http://127.0.0.1:{port}/mcp"}))
        assert env.call("put", {"text": "a"}) == "1"
        server.kill()
        server.wait(10)
        server = serve(port)
        assert "the server s has ended" in env.call("put", {"text": "b"})
        assert env.call("put", {"text": "c"}) == "1"
    finally:
        server.kill()
        server.wait(10)


def test_tools_results_errors_and_limits_over_stdio(monkeypatch):
    monkeypatch.setenv("SERVICE_TOKEN", "s3cret")
    monkeypatch.setenv("LISTED", "1")
    env = started(make({**STDIO, "env": ["LISTED"]}, timeout=1.0, max_output=1000))
    schemas = {schema["function"]["name"]: schema["function"] for schema in env.tools}
    assert schemas["put"]["description"].startswith("Keep a text") and schemas["put"]["parameters"]["required"] == [
        "text"
    ]
    assert [env.call("put", {"text": "a"}), env.call("put", {"text": "é\u2028\x00"})] == ["1", "2"]
    assert '"name"' in env.call("record", {"name": "x"})
    assert env.call("fail", {"why": "no"}).startswith("error: ") and env.call("put", {}).startswith("error: ")
    assert env.call("picture", {}) == "[image: image/png]"
    assert len(env.call("large", {"characters": 10**6})) < 1100
    assert env.call("wait", {"seconds": 30}) == "error: the tool did not finish within 1 s"
    assert env.call("put", {"text": "b"}) == "3"  # it answers pings, so it was left alone
    passed = set(env.call("variables", {}).split())
    assert "LISTED" in passed and "SERVICE_TOKEN" not in passed


def test_a_server_that_ends_is_started_anew():
    env = started(make())
    first = int(env.call("process", {}))
    assert env.call("put", {"text": "a"}) == "1"
    assert "the server s has ended" in env.call("end", {})
    assert env.call("put", {"text": "b"}) == "1" and int(env.call("process", {})) != first
    os.kill(int(env.call("process", {})), 9)
    assert "the server s has ended" in env.call("put", {"text": "c"})
    assert env.call("put", {"text": "d"}) == "1"


def test_episodes_have_servers_of_their_own_which_end_with_them():
    make_env = make()
    one, two = started(make_env), started(make_env)
    assert [one.call("put", {"text": "a"}), one.call("put", {"text": "a"}), two.call("put", {"text": "a"})] == [
        "1",
        "2",
        "1",
    ]
    pids = [int(env.call("process", {})) for env in (one, two)]
    assert one.reward(TASK, None) == {} and ends(pids[0]) and is_running(pids[1])
    del two  # a rollout that is cancelled has no reward
    gc.collect()
    assert ends(pids[1])


def test_a_shared_server_keeps_its_state_until_the_run_ends():
    make_env = make(session="shared")
    one, two = started(make_env), started(make_env)
    assert [one.call("put", {"text": "a"}), two.call("put", {"text": "a"})] == ["1", "2"]
    pid = int(one.call("process", {}))
    one.reward(TASK, None)
    assert two.call("put", {"text": "a"}) == "3"
    one.close()
    assert ends(pid)


def test_http_serves_the_same_and_sends_headers_from_variables(url, monkeypatch):
    monkeypatch.setenv("TOKEN_OF_SERVICE", "Bearer x")
    env = started(make({"url": url, "headers": {"Authorization": "TOKEN_OF_SERVICE"}}, timeout=5.0))
    first = int(env.call("put", {"text": "a"}))
    assert env.call("put", {"text": "b"}) == str(first + 1)
    assert env.call("fail", {"why": "no"}).startswith("error: ")
    assert env.call("put", {"text": "c"}) == str(first + 2)


def test_tools_can_be_chosen_and_servers_must_not_share_names():
    env = started(make(tools=["put"]))
    assert [schema["function"]["name"] for schema in env.tools] == ["put"]
    assert "there is no tool" in env.call("end", {})
    with pytest.raises(PactError, match="no server has a tool 'sing'"):
        make(tools=["sing"])
    with pytest.raises(PactError, match="a and b both have a tool 'put'"):
        environment.get("mcp").factory({"servers": {"a": STDIO, "b": STDIO}}, 5.0)


@pytest.mark.parametrize(
    ("server", "message"),
    [
        ({"command": "no_such_program"}, "the server s does not start: .*no_such_program"),
        ({"command": sys.executable, "args": ["-c", "import sys; sys.exit('no licence')"]}, "it wrote: no licence"),
        ({"url": "http://127.0.0.1:9/mcp"}, "the server s does not start"),
    ],
)
def test_a_server_that_does_not_start_says_why(server, message):
    with pytest.raises(PactError, match=message) as caught:
        make(server)
    assert "\n" not in str(caught.value)


def test_a_result_without_text_is_its_structured_content():
    assert observation({"structuredContent": {"a": [1]}}) == '{"a": [1]}'
    assert observation({"content": [], "isError": True}) == "error: "
    blocks = [{"type": "text", "text": "a"}, {"type": "resource", "resource": {"uri": "x:y", "text": "b"}}]
    assert observation({"content": blocks}) == "a\nb"
    assert observation({"content": [{"type": "resource_link", "uri": "x:y"}]}) == "[resource_link: x:y]"
