"""A server of the Model Context Protocol with two tools, and a policy that calls them.

    pact-fast train quickstart env.name=mcp "env.args={servers: {notes: {command: python, args: [examples/mcp_server.py]}}}" data.train=examples/mcp_server.jsonl pretrain=null

The same server over HTTP: `python examples/mcp_server.py http`, and `{notes: {url: http://127.0.0.1:8000/mcp}}`.
"""  # noqa: E501

import sys

try:
    from mcp.server.mcpserver import MCPServer
except ImportError:  # mcp 1
    from mcp.server.fastmcp import FastMCP as MCPServer

server = MCPServer("notes")
notes: list[str] = []


@server.tool()
def add(a: int, b: int) -> int:
    """The sum of two numbers."""
    return a + b


@server.tool()
def keep(text: str) -> int:
    """Keep a note, and say how many there are."""
    notes.append(text)
    return len(notes)


if __name__ == "__main__":
    server.run(transport="streamable-http" if "http" in sys.argv else "stdio")
