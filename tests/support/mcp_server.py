"""A server of the Model Context Protocol for tests: `python mcp_server.py [http PORT]`."""

from __future__ import annotations

import os
import sys

import anyio
from mcp.types import ImageContent

try:
    from mcp.server.mcpserver import MCPServer
except ImportError:  # mcp 1
    from mcp.server.fastmcp import FastMCP as MCPServer

server = MCPServer("tests")
kept: list[str] = []


@server.tool()
def put(text: str) -> int:
    """Keep a text, and say how many there are."""
    kept.append(text)
    return len(kept)


@server.tool()
def record(name: str) -> dict[str, str]:
    """Structured content."""
    return {"name": name}


@server.tool()
def fail(why: str) -> str:
    """Fail."""
    raise RuntimeError(why)


@server.tool()
async def wait(seconds: float) -> str:
    """Wait, and stay responsive."""
    await anyio.sleep(seconds)
    return "done"


@server.tool()
def end() -> str:
    """End the server's process."""
    os._exit(3)


@server.tool()
def variables() -> str:
    """Names of the environment variables."""
    return " ".join(sorted(os.environ))


@server.tool()
def large(characters: int) -> str:
    """A large text."""
    return "x" * characters


@server.tool()
def picture() -> ImageContent:
    """An image."""
    return ImageContent(type="image", data="aGk=", mimeType="image/png")


@server.tool()
def process() -> int:
    """The id of the server's process."""
    return os.getpid()


if __name__ == "__main__":
    if sys.argv[1:2] == ["http"]:
        try:
            server.run(transport="streamable-http", port=int(sys.argv[2]))
        except TypeError:  # mcp 1
            server.settings.port = int(sys.argv[2])
            server.run(transport="streamable-http")
    else:
        server.run()
