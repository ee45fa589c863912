"""Connections to MCP servers through the official client, on the event loop of the environments."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from pydantic import Field, model_validator

from pact_fast.data.types import ToolSchema
from pact_fast.envs.adapters.options import Args, need
from pact_fast.envs.adapters.results import cut
from pact_fast.errors import PactError, error_line
from pact_fast.text import visible

INSTALL = "mcp"
START = 30.0  # seconds that a server may take to start and to list its tools
PING = 2.0  # seconds after which a server that has missed a deadline counts as dead
CONNECTION_CLOSED = -32000  # the client's error code for requests of a connection that has ended
SESSION_LOST = (
    "session not found",
    "session terminated",
)  # after a restart of an HTTP server; its error code is generic
MAX_TOOLS = 1000
MAX_DESCRIPTION = 8000

T = TypeVar("T")


class McpServer(Args):
    """A server of `env.args.servers`: a program that speaks over its standard streams, or a URL.

    command, args, cwd  the program
    env                 names of environment variables that it gets beside PATH, HOME, USER, LOGNAME, SHELL and TERM
    url                 address of a streamable HTTP server
    headers             {HTTP header: name of the environment variable that holds its value}
    """

    command: str | None = None
    args: list[str] = Field(default_factory=list)
    cwd: str | None = None
    env: list[str] = Field(default_factory=list)
    url: str | None = None
    headers: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_transport(self) -> McpServer:
        if (self.command is None) == (self.url is None):
            raise ValueError("a server has either a command or a url")
        return self


class ServerFailed(Exception):
    """A server does not start, or has ended; the text says why."""


class Connection:
    """A session with one server, which begins with the first request and again after the server has ended.

    Everything but the constructor and `stop` runs on the event loop.

    Args:
        name: Of the server, for messages.
        server: How it is reached.
    """

    def __init__(self, name: str, server: McpServer):
        self.name, self._server = name, server
        self._starting = asyncio.Lock()
        self._session: Any = None
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def request(self, send: Callable[[Any], Awaitable[T]], timeout: float) -> T:
        """The answer to one request.

        Raises:
            TimeoutError: There is none within `timeout` seconds. A server that does not answer a ping, either, is ended.
            ServerFailed: The server cannot be started, or has ended. The next request restarts it.
            Exception: Any other exception of the client; the session continues.
        """
        session = await self._started()
        try:
            return await asyncio.wait_for(send(session), timeout)
        except TimeoutError:
            await self._end_if_dead(session)
            raise
        except Exception as error:
            if _ended(error):
                await self.end(session)
                raise ServerFailed(f"the server {self.name} has ended ({_words(error)})") from error
            raise

    async def tools(self) -> list[ToolSchema]:
        """The tools of the server. PactError if it cannot be reached."""
        types = need("mcp.types", INSTALL)
        found: list[dict[str, Any]] = []
        cursor = None
        while len(found) < MAX_TOOLS:
            parameters = types.PaginatedRequestParams(cursor=cursor) if cursor else None
            page = await self.request(lambda session, p=parameters: session.list_tools(params=p), START)  # type: ignore[misc]
            listed = page.model_dump(by_alias=True, mode="json", exclude_none=True)
            found += listed.get("tools", [])
            cursor = listed.get("nextCursor")
            if not cursor:
                break
        return [_schema(tool) for tool in found[:MAX_TOOLS]]

    async def end(self, session: Any = None) -> None:
        """End the session, if it still is `session`; None: whichever there is."""
        if session is not None and session is not self._session:
            return
        task, self._task, self._session = self._task, None, None
        self._stop.set()
        if task:
            await asyncio.wait([task], timeout=10)

    async def _end_if_dead(self, session: Any) -> None:
        try:
            await asyncio.wait_for(session.send_ping(), PING)
        except Exception:
            await self.end(session)

    async def _started(self) -> Any:
        async with self._starting:
            if self._session is None:
                self._stop = asyncio.Event()
                ready: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
                # one task opens and closes the session: the client's cancel scopes belong to the task that enters them
                self._task = asyncio.create_task(self._hold(ready, self._stop))
                self._session = await ready
            return self._session

    async def _hold(self, ready: asyncio.Future[Any], stop: asyncio.Event) -> None:
        mcp = need("mcp", INSTALL)
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            try:
                async with AsyncExitStack() as stack:
                    streams = await stack.enter_async_context(await _transport(self.name, self._server, stack, log))
                    session = await stack.enter_async_context(mcp.ClientSession(streams[0], streams[1]))
                    await asyncio.wait_for(session.initialize(), START)
                    ready.set_result(session)
                    await stop.wait()
            except BaseException as error:
                if ready.done():
                    return  # how a session ends says nothing that a request has not said
                said = _tail(log)
                problem = (
                    f"the server {self.name} does not start: {_words(error)}{f'; it wrote: {said}' if said else ''}"
                )
                ready.set_exception(error if isinstance(error, PactError) else ServerFailed(problem))


async def _transport(name: str, server: McpServer, stack: AsyncExitStack, log: Any) -> Any:
    """The context manager of the server's streams."""
    mcp = need("mcp", INSTALL)
    if server.command is not None:
        passed = {variable: _variable(name, variable) for variable in server.env}
        parameters = mcp.StdioServerParameters(command=server.command, args=server.args, env=passed, cwd=server.cwd)
        return mcp.stdio_client(parameters, errlog=log)
    http = need("mcp.client.streamable_http", INSTALL)
    headers = {header: _variable(name, variable) for header, variable in server.headers.items()}
    # the client library that this release of mcp is built on
    library = getattr(http, "httpx2", None) or http.httpx
    client = await stack.enter_async_context(
        library.AsyncClient(headers=headers, timeout=library.Timeout(START, read=300))
    )
    return http.streamable_http_client(server.url, http_client=client)


def _variable(server: str, name: str) -> str:
    if name not in os.environ:
        raise PactError(f"env.args.servers.{server}: the environment variable {name} is not set")
    return os.environ[name]


def _ended(error: Exception) -> bool:
    """Whether an error of the client means that the connection is over, and not that the server refuses the request."""
    code = getattr(getattr(error, "error", None), "code", None)
    if code is not None:
        return code == CONNECTION_CLOSED or str(error).lower().startswith(SESSION_LOST)
    return not isinstance(error, RuntimeError | ValueError)


def _words(error: BaseException) -> str:
    """The text of an error; of a group, that of its first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return visible(error_line(error)) or type(error).__name__


def _tail(log: Any) -> str:
    log.seek(0)
    return visible(" ".join(log.read()[-400:].split()))


def _schema(tool: dict[str, Any]) -> ToolSchema:
    """A tool as a server lists it, as an OpenAI schema."""
    parameters = tool.get("inputSchema")
    return {
        "type": "function",
        "function": {
            "name": str(tool.get("name")),
            "description": cut(str(tool.get("description") or ""), MAX_DESCRIPTION),
            "parameters": parameters if isinstance(parameters, dict) else {"type": "object", "properties": {}},
        },
    }
