"""A vLLM server that the trainer starts, supervises and restarts.

It listens on a Unix socket in a private folder: vLLM's endpoints for weights ask for no password, and a port is open to
every user of the machine.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from pact_fast.errors import EngineDied
from pact_fast.rollout.vllm.client import VllmServerTransport
from pact_fast.rollout.vllm.colocated import WORKER_EXTENSION, engine_args, import_vllm
from pact_fast.rollout.vllm.weight_transfer import FILES, NCCL
from pact_fast.vllm_process import command_line, kill, launch, log_tail, server_environment, socket_folder


class VllmServerProcess(VllmServerTransport):
    """A server that starts with the first weights, and is restarted when it dies or hangs.

    Args:
        model_folder: Configuration and tokenizer of the model.
        weights_folder: For weights through files, and adapters.
        log: File to which the server's output is appended.
        timeout: Seconds that the server may take to answer (rollout.engine_timeout).
        start_timeout: Seconds that it may take to start (rollout.vllm_server_timeout).
        devices: Its GPUs, as indices into the GPUs that this process sees; None: vLLM chooses.
        transfer: `files` or `nccl`.
        args: Further vLLM engine arguments.
    """

    def __init__(
        self,
        model_folder: Path,
        weights_folder: Path,
        *,
        log: Path,
        timeout: float,
        start_timeout: float,
        devices: list[int] | None = None,
        transfer: str = FILES,
        **args: Any,
    ):
        import_vllm()
        self._args = engine_args(args)
        self._socket = socket_folder() / "socket"
        super().__init__(
            "the vLLM server", "http://vllm", model_folder, weights_folder, timeout=timeout, transfer=transfer,
            uds=str(self._socket),
        )  # fmt: skip
        self._model_folder, self._devices, self._log = model_folder, devices, log
        self._start_timeout = start_timeout
        self._process: subprocess.Popen | None = None

    @property
    def pid(self) -> int | None:
        """Process id, and process group, of the running server."""
        return self._process.pid if self._process else None

    def restart(self) -> None:
        """Kill the server, start it again, and send the last weights."""
        self._kill()
        self._drop_turns()
        self._reset_transfer()
        self._send_weights()
        self._send_adapter()

    def close(self) -> None:
        super().close()
        self._kill()
        shutil.rmtree(self._socket.parent, ignore_errors=True)

    def _send_weights(self) -> None:
        """Start the server first if it does not run; it then reads weights that are in files as it starts."""
        if self._process is not None:
            return super()._send_weights()
        assert self._weights is not None
        weights, version = self._weights
        if isinstance(weights, Path):
            self._start(weights)
            self._finish_loading(version)
        else:
            self._start(self._model_folder)  # with random weights (load_format=dummy)
            super()._send_weights()

    def _start(self, model: Path) -> None:
        """Start the server with the checkpoint folder `model`, and wait until it serves."""
        self._socket.unlink(missing_ok=True)
        with self._log.open("ab") as log:
            self._process = launch(self._command(model), self._environment(), log)
        self._wait_ready(self._start_timeout)

    def _command(self, model: Path) -> list[str]:
        transfer: dict[str, Any] = {}
        if self._transfer is not None:
            transfer = {"load_format": "dummy", "weight_transfer_config": {"backend": NCCL}}
        return [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
            "--uds", str(self._socket), "--generation-config", "vllm", "--worker-extension-cls", WORKER_EXTENSION,
            "--enable-prompt-tokens-details",
            *command_line(self._args | transfer),
        ]  # fmt: skip

    def _environment(self) -> dict[str, str]:
        environment = server_environment(self._socket.parent, self._devices) | {"VLLM_SERVER_DEV_MODE": "1"}
        if self._args.get("enable_lora"):
            environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
        return environment

    def _check_alive(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            raise EngineDied(
                self.name,
                f"it ended with status {self._process.returncode}; its log {self._log} ends:\n{log_tail(self._log)}",
            )

    def _kill(self) -> None:
        """Kill the server and its workers, which are one process group."""
        if self._process is not None:
            kill(self._process)
        self._process = None
