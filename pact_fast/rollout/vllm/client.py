"""vLLM servers over HTTP: the transport that all servers share, and the client of a running server behind a URL.

Servers are stock vLLM. Turns go through the completions endpoint. Weights go from GPU to GPU (weight_transfer), or
through files that the server reads (weight_files, `collective_rpc("reload_weights")`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch

from pact_fast.errors import EngineDied, EngineError, EngineTimeout, PactError
from pact_fast.model.weights import WeightShard, WeightSnapshot
from pact_fast.rollout.vllm import http_client
from pact_fast.rollout.vllm.colocated import WORKER_EXTENSION, filter_params, merge_reports
from pact_fast.rollout.vllm.http_connection import Exchange, HttpResponse
from pact_fast.rollout.vllm.responses import read_completion, read_reports, read_results, read_served_model
from pact_fast.rollout.vllm.transport import TurnOutput, TurnRequest, VllmTransport
from pact_fast.rollout.vllm.weight_files import WeightFiles
from pact_fast.rollout.vllm.weight_transfer import FILES, NCCL, NcclTransfer

log = logging.getLogger(__name__)
READY_POLL = 0.2  # seconds between tries while a server starts


class _Turn(Exchange):
    """A turn on its way to a server and back."""

    __slots__ = ("_transport", "request")

    def __init__(self, transport: VllmServerTransport, request: TurnRequest):
        super().__init__("POST", "/v1/completions", http_client.MAX_TURN_BYTES, turn=True)
        self._transport, self.request = transport, request

    def body(self) -> bytes:
        return self._transport.encode_turn(self.request)

    def finish(self, outcome: HttpResponse | EngineError) -> None:
        self._transport.finish_turn(self, outcome)


class VllmServerTransport(VllmTransport):
    """A VllmTransport over HTTP.

    Args:
        name: For messages.
        base_url: URL of the server.
        model_folder: Configuration and tokenizer of the model.
        weights_folder: For weights, if `transfer` is `files`, and for adapters.
        timeout: Seconds that the server may take to answer (rollout.engine_timeout); turns excepted.
        transfer: `files` or `nccl`.
        uds: Path of a Unix socket; None: TCP.
    """

    synchronous = False

    def __init__(
        self,
        name: str,
        base_url: str,
        model_folder: Path,
        weights_folder: Path,
        *,
        timeout: float,
        transfer: str = FILES,
        uds: str | None = None,
    ):
        self.name, self._timeout = name, timeout
        self.weight_files = WeightFiles(weights_folder, model_folder)
        self._results: queue.SimpleQueue[list[tuple[_Turn, TurnOutput | EngineError]]] = queue.SimpleQueue()
        self._batch: list[tuple[_Turn, TurnOutput | EngineError]] = []  # for the results; of the connections' thread
        self._errors: deque[EngineError] = deque()  # taken from the results
        self._http = http_client.HttpClient(name, base_url, uds)
        self._turns: dict[str, _Turn] = {}  # under way, by key
        self._transfer = None if transfer == FILES else NcclTransfer(name, self.call, timeout)
        self._weights: tuple[Path | WeightSnapshot, int] | None = None  # last loaded weights (or their folder), version
        self._adapter: tuple[Path, int] | None = None  # last loaded adapter's folder, version
        self._served_model = ""

    # -- turns ---------------------------------------------------------------------------------------------------------

    def submit(self, turn: TurnRequest) -> None:
        exchange = self._turns[turn.key] = _Turn(self, turn)
        self._http.start(exchange)

    def poll(self, timeout: float) -> list[TurnOutput]:
        found: list[TurnOutput] = []
        wait = 0.0 if self._errors else max(timeout, 0.0)
        with contextlib.suppress(queue.Empty):
            while True:
                batch = self._results.get(timeout=wait) if wait else self._results.get_nowait()
                wait = 0.0
                for exchange, outcome in batch:
                    key = exchange.request.key
                    if self._turns.get(key) is not exchange:
                        continue  # aborted; the same turn may have been submitted again since
                    del self._turns[key]
                    if isinstance(outcome, TurnOutput):
                        found.append(outcome)
                    else:
                        self._errors.append(outcome)
        if self._errors and not found:  # finished turns first; the error is raised by the next call
            raise self._errors.popleft()
        return found

    def abort(self, keys: list[str]) -> None:
        for key in keys:
            exchange = self._turns.pop(key, None)
            if exchange:
                self._http.cancel(exchange)

    def encode_turn(self, turn: TurnRequest) -> bytes:
        """The JSON of a turn's request."""
        body = {
            "model": self.adapter_name or self._served_model,
            "prompt": turn.ids, "max_tokens": turn.max_tokens, "temperature": turn.temperature,
            **filter_params(turn), "seed": turn.seed, "logprobs": 0, "stop_token_ids": turn.stop, "ignore_eos": True,
            "return_token_ids": True, "skip_special_tokens": False,
        }  # fmt: skip
        return json.dumps(body, separators=(",", ":")).encode()

    def finish_turn(self, exchange: _Turn, response: HttpResponse | EngineError) -> None:
        """Put the turn's output, or an EngineError, into the results. Called in the thread of the connections."""
        outcome: TurnOutput | EngineError
        try:
            if isinstance(response, EngineError):
                outcome = response
            else:
                outcome = read_completion(self.name, http_client.checked_json(response, self.name), exchange.request)
        except EngineError as error:
            outcome = error
        except Exception as error:  # whatever it is, nobody waits for this call
            outcome = EngineError(self.name, f"the request of a turn failed: {type(error).__name__}: {error}")
        self._batch.append((exchange, outcome))
        if len(self._batch) == 1:
            self._http.call_soon(self._hand_over)

    def _hand_over(self) -> None:
        """Wake the sampling thread once for all turns that have ended together."""
        batch, self._batch = self._batch, []
        self._results.put(batch)

    def _drop_turns(self) -> None:
        """Abort all running turns, and discard results that have not been polled."""
        self.abort(list(self._turns))  # their results will be unknown to `poll`
        self._errors.clear()

    # -- weights -------------------------------------------------------------------------------------------------------

    @property
    def adapter_name(self) -> str | None:
        """Name under which the server knows the current adapter."""
        return f"pact-{self._adapter[1]}" if self._adapter else None

    def load_weights(self, weights: WeightSnapshot, version: int) -> None:
        source = weights if self._transfer else self.weight_files.write_weights(iter(weights), version)
        self._weights = source, version
        self._send_weights()

    def load_adapter(self, tensors: dict[str, torch.Tensor], version: int) -> None:
        self._adapter = self.weight_files.write_adapter(tensors, version), version
        self._send_adapter()

    def restart(self) -> None:
        """Wait until the server answers again, and send the last weights."""
        self._drop_turns()
        self._reset_transfer()
        self._wait_ready(self._timeout)
        self._send_weights()
        self._send_adapter()

    def report_weights(self) -> tuple[int, list[WeightShard]]:
        return merge_reports(read_reports(self.name, self.rpc("pact_report_weights")))

    def report_adapter(self) -> tuple[int, list[WeightShard]]:
        return merge_reports(read_reports(self.name, self.rpc("pact_report_adapter")))

    def reset_prefix_cache(self) -> None:
        self.call("POST", "/reset_prefix_cache")

    def sleep(self) -> None:
        """Does nothing: the server has its own devices."""

    def wake(self) -> None:
        """Does nothing: the server never sleeps."""

    def _send_weights(self) -> None:
        assert self._weights is not None
        weights, version = self._weights
        if isinstance(weights, WeightSnapshot):
            assert self._transfer is not None
            self._transfer.send(weights)
        else:
            self.rpc("reload_weights", kwargs={"weights_path": str(weights)})
        self._finish_loading(version)

    def _send_adapter(self) -> None:
        if self._adapter is None:
            return
        path, version = self._adapter
        for old in self.weight_files.adapter_versions():
            with contextlib.suppress(EngineError):  # not loaded, for example because the server was restarted
                self.call("POST", "/v1/unload_lora_adapter", json={"lora_name": f"pact-{old}"})
        try:
            self.call("POST", "/v1/load_lora_adapter", json={"lora_name": self.adapter_name, "lora_path": str(path)})
        except EngineDied:
            raise
        except EngineError as error:
            raise PactError(
                f"{self.name} does not take the adapter ({error.problem}); a server of your own must be started with "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora and a --max-lora-rank of at least model.lora.r"
            ) from None
        self._finish_loading(version)

    def _finish_loading(self, version: int) -> None:
        """Tell the workers the version, and remove the files of earlier ones."""
        self.rpc("pact_finish_loading", args=[str(version)])
        self.weight_files.prune(
            [kept[0] for kept in (self._weights, self._adapter) if kept and isinstance(kept[0], Path)]
        )

    def _reset_transfer(self) -> None:
        """Prepare to send the last weights again; WeightsUnavailable if they cannot be."""
        if self._transfer:
            self._transfer.close()
        if self._weights and isinstance(self._weights[0], WeightSnapshot):
            self._weights[0].check_available()

    # -- requests ------------------------------------------------------------------------------------------------------

    def rpc(self, method: str, args: list[str] | None = None, kwargs: dict[str, str] | None = None) -> list:
        """Call a method of all workers; returns one result per worker. Errors: see `call`."""
        body = {"method": method, "args": args or [], "kwargs": kwargs or {}, "timeout": self._timeout}
        return read_results(self.name, method, self.call("POST", "/collective_rpc", json=body))

    def call(self, method: str, path: str, **kwargs: Any) -> Any:
        """The JSON that an endpoint answers.

        Raises:
            EngineTimeout: No response within the deadline.
            EngineDied: The connection broke, or status 5xx.
            EngineError: Status 4xx, or a response that cannot be read.
        """
        return http_client.checked_json(self._http.request(method, path, timeout=self._timeout, **kwargs), self.name)

    def close(self) -> None:
        self._drop_turns()
        if self._transfer:
            self._transfer.close()
        self._http.close()
        self.weight_files.remove()

    def _wait_ready(self, deadline: float) -> None:
        """Wait at most `deadline` seconds until the server serves, and store the name of its model."""
        end = time.monotonic() + deadline
        while True:
            self._check_alive()
            try:
                models = http_client.checked_json(self._http.request("GET", "/v1/models", timeout=5.0), self.name)
                self._served_model = read_served_model(self.name, models)
                return
            except (EngineTimeout, EngineDied):
                if time.monotonic() > end:
                    raise EngineDied(self.name, f"it does not serve within {deadline:g} s") from None
                time.sleep(READY_POLL)

    def _check_alive(self) -> None:
        """Raise EngineDied if the server is known to be gone."""


class VllmServerClient(VllmServerTransport):
    """A running server: `VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --worker-extension-cls …`.

    Args:
        url: Base URL of the server.
        model_folder: Configuration and tokenizer of the model.
        weights_folder: For weights through files, and adapters; the server must see it under the same path.
        timeout: Seconds that the server may take to answer (rollout.engine_timeout).
        start_timeout: Seconds that it may take to serve at first (rollout.vllm_server_timeout).
        transfer: `files` or `nccl`.
        transfer_required: If the server was not started for `nccl`: True raises an error, False falls back to files.
    """

    def __init__(
        self,
        url: str,
        model_folder: Path,
        weights_folder: Path,
        *,
        timeout: float,
        start_timeout: float,
        transfer: str = FILES,
        transfer_required: bool = False,
    ):
        super().__init__(f"vLLM at {url}", url, model_folder, weights_folder, timeout=timeout, transfer=transfer)
        try:
            self._connect(start_timeout, transfer_required)
        except BaseException:
            self._http.close()  # nobody else can
            raise

    def _connect(self, start_timeout: float, transfer_required: bool) -> None:
        """Wait for the server, and check that it supports the required features."""
        self._wait_ready(start_timeout)
        self._check_extension()
        if self._transfer and any(found != NCCL for found in self.rpc("pact_transfer_backend") or [None]):
            problem = f'{self.name} was not started with --weight-transfer-config \'{{"backend": "{NCCL}"}}\''
            if transfer_required:
                raise PactError(f"{problem}; restart it with this option, or set rollout.vllm_weight_transfer=files")
            log.warning("%s; its weights go through files in %s", problem, self.weight_files.folder)
            self._transfer = None

    def _check_extension(self) -> None:
        try:
            self.rpc("pact_report_weights")
        except EngineError as error:
            raise PactError(
                f"{self.name} cannot report its weights ({error.problem}); start it with VLLM_SERVER_DEV_MODE=1 vllm "
                "serve MODEL --logprobs-mode processed_logprobs --generation-config vllm --worker-extension-cls "
                f"{WORKER_EXTENSION}, and pact-fast installed beside it"
            ) from None
