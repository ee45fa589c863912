"""The environment `mcp`: tools of MCP servers."""

from __future__ import annotations

import asyncio
import json
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Literal

from pydantic import Field

from pact_fast.data.types import Task, ToolSchema, Trajectory
from pact_fast.envs.adapters.arguments import BadCall, copy_arguments
from pact_fast.envs.adapters.background import event_loop, run
from pact_fast.envs.adapters.mcp_session import INSTALL, Connection, McpServer, ServerFailed
from pact_fast.envs.adapters.options import Args, need, read_args
from pact_fast.envs.adapters.results import MAX_OUTPUT, cut, failure
from pact_fast.envs.registry import environment
from pact_fast.errors import PactError, error_line


class McpArgs(Args):
    """`env.args` of the environment.

    servers     {name: McpServer}
    session     episode: every rollout has sessions of its own, begun with its first call; shared: one for all
    tools       names of the tools that are offered; None: all
    timeout     seconds per call; None: rollout.tool_timeout
    max_output  characters of an observation
    """

    servers: dict[str, McpServer] = Field(min_length=1)
    session: Literal["episode", "shared"] = "episode"
    tools: list[str] | None = None
    timeout: float | None = Field(None, gt=0)
    max_output: int = Field(MAX_OUTPUT, gt=0)


@environment("mcp")
class Mcp:
    """Serves the tools of the servers; the outcome is decided by the user's reward functions.

    Args:
        args: The settings.
        timeout: Seconds per call.
        listed: {tool: (server, schema)}.
        shared: Connections that all instances use, by server; None: each has its own.
    """

    blocking = True
    ordered = True

    @classmethod
    def factory(cls, args: dict[str, Any], tool_timeout: float) -> Callable[[], Mcp]:
        """PactError if the package is missing, a server does not start, or there are no tools."""
        read = read_args(McpArgs, args)
        need("mcp", INSTALL)
        connections = _connect(read)
        try:
            listed = _listed(read, connections)
        finally:
            if read.session == "episode":
                _end(connections.values())
        shared = connections if read.session == "shared" else None
        return lambda: cls(read, read.timeout or tool_timeout, listed, shared)

    @staticmethod
    def gives_success(task: Task) -> bool:
        return False

    def __init__(
        self,
        args: McpArgs,
        timeout: float,
        listed: dict[str, tuple[str, ToolSchema]],
        shared: dict[str, Connection] | None = None,
    ):
        self._args, self._timeout, self._listed, self._shared = args, timeout, listed, shared
        self._own: dict[str, Connection] = {}
        if shared is None:  # an episode that is cancelled has no end of its own
            weakref.finalize(self, _end_own, self._own)

    def reset(self, task: Task) -> str | None:
        _end_own(self._own)
        return None

    @property
    def tools(self) -> list[ToolSchema]:
        return [schema for _, schema in self._listed.values()]

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        if name not in self._listed:
            return f"error: there is no tool {name[:60]!r}; the tools are: {', '.join(self._listed)}"
        try:
            given = copy_arguments(arguments)
            connection = self._connection(self._listed[name][0])
            result = run(connection.request(lambda session: session.call_tool(name, given), self._timeout))
        except BadCall as error:
            return f"error: {error}"
        except TimeoutError:
            return f"error: the tool did not finish within {self._timeout:g} s"
        except ServerFailed as error:
            return cut(f"error: {error}; it is restarted by the next call, without its state", self._args.max_output)
        except PactError:
            raise
        except Exception as error:  # the server refuses the request, or its answer does not fit its schema
            refused = f"error: {error_line(error)}" if hasattr(error, "error") else failure(error)
            return cut(refused, self._args.max_output)
        return cut(observation(result.model_dump(by_alias=True, mode="json", exclude_none=True)), self._args.max_output)

    def reward(self, task: Task, trajectory: Trajectory) -> dict[str, float]:
        """Nothing; ends the sessions of the episode."""
        _end_own(self._own)
        return {}

    def machine_report(self) -> list[str]:
        """The servers, for `pact-fast doctor`."""
        lines = []
        for name, server in self._args.servers.items():
            count = sum(owner == name for owner, _ in self._listed.values())
            where = server.url or f"{server.command}, which runs with all rights of this user"
            lines.append(f"server {name}: {count} tools, {where}")
        return lines

    def close(self) -> None:
        """End the sessions that the instances share."""
        if self._shared:
            _end(self._shared.values())

    def _connection(self, server: str) -> Connection:
        if self._shared is not None:
            return self._shared[server]
        if server not in self._own:
            self._own[server] = run(_new(server, self._args.servers[server]))
        return self._own[server]


def observation(result: dict[str, Any]) -> str:
    """The text of a tool's result in the protocol's JSON: its texts, else its structured content."""
    parts = [_part(block) for block in result.get("content") or []]
    structured = result.get("structuredContent")
    text = "\n".join(parts) if parts or structured is None else json.dumps(structured, ensure_ascii=False)
    return f"error: {text}" if result.get("isError") else text


def _part(block: dict[str, Any]) -> str:
    kind = block.get("type")
    if kind == "text":
        return str(block.get("text", ""))
    resource = block.get("resource") or {}
    if kind == "resource" and "text" in resource:
        return str(resource["text"])
    return f"[{kind}: {block.get('uri') or resource.get('uri') or block.get('mimeType') or 'not shown'}]"


async def _new(name: str, server: McpServer) -> Connection:
    return Connection(name, server)


def _connect(args: McpArgs) -> dict[str, Connection]:
    return {name: run(_new(name, server)) for name, server in args.servers.items()}


def _listed(args: McpArgs, connections: dict[str, Connection]) -> dict[str, tuple[str, ToolSchema]]:
    """{tool: (server, schema)} of the tools on offer. PactError if there are none, or a name is unknown or taken."""
    found: dict[str, tuple[str, ToolSchema]] = {}
    for server, connection in connections.items():
        try:
            schemas = run(connection.tools())
        except (ServerFailed, TimeoutError) as error:
            raise PactError(f"env.args.servers.{server}: {error or 'it does not list its tools in time'}") from None
        for schema in schemas:
            name = schema["function"]["name"]
            if name in found:
                raise PactError(
                    f"env.args.servers: {found[name][0]} and {server} both have a tool '{name}'; leave one out"
                )
            if args.tools is None or name in args.tools:
                found[name] = server, schema
    unknown = [name for name in args.tools or () if name not in found]
    if unknown:
        raise PactError(f"env.args.tools: no server has a tool '{unknown[0]}'")
    if not found:
        raise PactError("env.args.servers: the servers offer no tools")
    return found


def _end_own(own: dict[str, Connection]) -> None:
    """End connections without waiting for it."""
    for connection in own.values():
        asyncio.run_coroutine_threadsafe(connection.end(), event_loop())
    own.clear()


def _end(connections: Iterable[Connection]) -> None:
    for connection in connections:
        run(connection.end(), 10)
