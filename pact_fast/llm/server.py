"""A vLLM server that is started for a client, and ends with it.

It listens on a Unix socket in a private folder: a port is open to every user of the machine.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

from pact_fast.errors import PactError
from pact_fast.llm.config import LLMConfig
from pact_fast.llm.connection import Connection
from pact_fast.vllm_process import command_line, kill, launch, log_tail, server_environment, socket_folder

READY_POLL = 0.2  # seconds between tries while it starts

# JSON may hold any number of blanks: small models fill an answer with them until their tokens end
COMPACT = {"backend": "xgrammar", "disable_any_whitespace": True}


class VllmServer:
    """A running server of `config.model`, under that name.

    Raises:
        PactError: vLLM is not installed, or the server ends or is not ready within `config.server_timeout`.
    """

    def __init__(self, config: LLMConfig):
        if importlib.util.find_spec("vllm") is None:
            raise PactError(
                "a language model without base_url is served by vLLM, which is not installed; pip install "
                "'pact-fast[vllm]', or name an endpoint"
            )
        self._folder = socket_folder()
        self._log, socket = self._folder / "vllm.log", self._folder / "socket"
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", config.model, "--served-model-name",
            config.model, "--uds", str(socket), "--generation-config", "vllm",
            *command_line({"seed": config.seed, "structured_outputs_config": COMPACT, **cpu_args(), **config.vllm_args}),
        ]  # fmt: skip
        self._process, self._stop_waiting = self._launch(command)
        self._connection: Connection | None = None
        try:
            self._wait_for_socket(socket, config.server_timeout)
            self._connection = Connection(config, "http://vllm/v1", str(socket))
        except BaseException:
            self.close()
            raise

    @property
    def connection(self) -> Connection:
        assert self._connection is not None
        return self._connection

    def close(self) -> None:
        """Kill the server and its workers."""
        kill(self._process)
        self._stop_waiting.set()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _launch(self, command: list[str]) -> tuple[subprocess.Popen, threading.Event]:
        """Start the server from a thread that lives as long as it: Linux ends it with the thread that started it, and
        the first question may come from a thread of a pool."""
        started: Future[subprocess.Popen] = Future()
        stop = threading.Event()

        def own() -> None:
            try:
                with self._log.open("ab") as log:
                    process = launch(command, server_environment(self._folder), log)
            except BaseException as error:
                started.set_exception(error)
                return
            started.set_result(process)
            stop.wait()

        threading.Thread(target=own, name="llm-vllm-server", daemon=True).start()
        return started.result(), stop

    def _wait_for_socket(self, socket: Path, timeout: float) -> None:
        """Wait until the server serves: vLLM binds its socket early, and answers when the model is loaded."""
        end = time.monotonic() + timeout
        while not self._is_healthy(socket):
            if self._process.poll() is not None:
                raise PactError(
                    f"the vLLM server ended with status {self._process.returncode}; its log ends:\n{log_tail(self._log)}"
                )
            if time.monotonic() > end:
                raise PactError(
                    f"the vLLM server was not ready within server_timeout={timeout:g} s; its log ends:\n{log_tail(self._log)}"
                )
            time.sleep(READY_POLL)

    @staticmethod
    def _is_healthy(path: Path) -> bool:
        import socket

        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10.0)
            client.connect(str(path))
            client.sendall(b"GET /health HTTP/1.1\r\nHost: vllm\r\nConnection: close\r\n\r\n")
            return client.recv(64).startswith(b"HTTP/1.1 200")
        return False


def cpu_args() -> dict[str, bool]:
    """vLLM's CPU build ends where a request with a seed has its prompt computed in chunks (0.32)."""
    import torch  # what uses a running server needs none

    return {} if torch.cuda.is_available() else {"enable_chunked_prefill": False}
