"""Thousands of open turns: a limit of open files makes them wait, and is never taken for a dead server."""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from pact_fast.rollout.engine import Request
from pact_fast.rollout.vllm import http_client
from pact_fast.rollout.vllm.client import VllmServerTransport
from pact_fast.rollout.vllm.descriptors import MAX_OPEN, open_request_limit
from pact_fast.rollout.vllm.engine import VllmEngine
from tests.support.processes import WARM

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")]
EOT = 1
ANSWER = {"choices": [{"token_ids": [7, EOT], "logprobs": {"token_logprobs": [-0.5, -0.25]}}]}


class InstantServer:
    """Answers every turn after `delay` seconds; asyncio, in a thread."""

    def __init__(self, delay: float):
        self.delay, self.open, self.most_open = delay, 0, 0
        self._ready = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True).start()
        assert self._ready.wait(10)

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._answer, "127.0.0.1", 0, backlog=4096)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await server.serve_forever()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                _, _, after = head.lower().partition(b"content-length:")
                await reader.readexactly(int(after.split(b"\r")[0] or 0))
                completion = b"/v1/completions" in head
                if completion:
                    self.open += 1
                    self.most_open = max(self.most_open, self.open)
                    await asyncio.sleep(self.delay)
                    self.open -= 1
                body = json.dumps(ANSWER if completion else {"data": [{"id": "model"}]}).encode()
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
                )
                writer.write(body)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def sample(folder: Path, turns: int, limit: int) -> None:
    """In a process of its own, which may open `limit` files: a client, and the server's ends of its connections."""
    server = InstantServer(0.05)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    http_client.open_request_limit = lambda: open_request_limit() // 2  # the other half is the server's
    transport = VllmServerTransport("the server", f"http://127.0.0.1:{server.port}", folder, folder, timeout=60)
    engine = VllmEngine(transport, [EOT], deadline=60, vocab_size=100)
    engine.version = 0
    for session in range(turns):
        engine.submit(Request(session, np.array([5, 6]), 4))
    done = 0
    while done < turns:
        done += len(engine.step(1.0))
    (folder / "found.json").write_text(json.dumps([done, engine.restarts, server.most_open]))


def test_more_turns_than_files_may_be_open_wait_for_each_other(tmp_path):
    process = WARM.Process(target=sample, args=(tmp_path, 600, 256))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    done, restarts, most_open = json.loads((tmp_path / "found.json").read_text())
    assert (done, restarts) == (600, 0) and 50 < most_open < 128


def test_the_soft_limit_is_raised_and_counts():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        found = open_request_limit()
        assert found == MAX_OPEN or resource.getrlimit(resource.RLIMIT_NOFILE)[0] == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
