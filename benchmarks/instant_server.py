"""A server that answers every turn at once: prints its port, and serves until its input ends."""

from __future__ import annotations

import asyncio
import json
import resource
import sys

COMPLETION = {"choices": [{"token_ids": [7] * 31 + [1], "logprobs": {"token_logprobs": [-0.5] * 32}}]}
BODY = json.dumps(COMPLETION | {"data": [{"id": "model"}]}).encode()  # of turns, and of the list of models
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(BODY), BODY)


class Connection(asyncio.Protocol):
    """Reads requests as far as their content-length says, and answers each."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.data = transport, bytearray()

    def data_received(self, data: bytes) -> None:
        self.data += data
        while (end := self.data.find(b"\r\n\r\n")) >= 0:
            _, _, after = self.data[:end].lower().partition(b"content-length:")
            size = end + 4 + int(after.split(b"\r")[0] or 0)
            if len(self.data) < size:
                return
            del self.data[:size]
            self.transport.write(ANSWER)


async def serve() -> None:
    """Print the port, and serve until standard input ends."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Connection, "127.0.0.1", 0, backlog=16_384)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(serve())
