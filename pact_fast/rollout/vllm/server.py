"""vLLM in a process of its own: one that we start and restart, or a running `vllm serve` behind a URL.

Both are stock servers. Requests go through the completions endpoint; weights from GPU to GPU (vllm_transfer.py), or through
files that the server reads (`collective_rpc("reload_weights")`), best in shared memory. A server of ours listens on a Unix
socket in a private folder: vLLM's endpoints for weights ask for no password, and a port is open to everybody on the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import save_file

from pact_fast.errors import EngineDied, EngineError, EngineTimeout, PactError
from pact_fast.model.adapter import write_adapter
from pact_fast.model.weights import WeightShard, WeightSnapshot
from pact_fast.rollout.vllm.colocated import EXTENSION, engine_args, import_vllm, merged
from pact_fast.rollout.vllm.engine import Sampled, Turn
from pact_fast.rollout.vllm.weight_transfer import FILES, NCCL, Transfer

log = logging.getLogger(__name__)
# found before any fork: between fork and exec, a process that has had threads must not import or load anything
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
# what our launcher has set for us is not the server's
FOREIGN = {
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "VLLM_ENABLE_V1_MULTIPROCESSING",
}  # fmt: skip
SHARD = 1 << 30  # bytes of a weight file
LOG_TAIL = 4000  # characters of a dead server's log in its error


class VllmServer:
    """The HTTP part of a VllmTransport.

    `folder` holds the weights, if `transfer` is `files`, and adapters; both sides must see it under the same path.
    """

    synchronous = False

    def __init__(
        self,
        name: str,
        base_url: str,
        model: Path,
        folder: Path,
        *,
        timeout: float,
        transfer: str = FILES,
        uds: str | None = None,
    ):
        self.name, self._timeout = name, timeout
        self._model, self._folder = model, folder
        self._results: queue.SimpleQueue[Sampled | EngineError] = queue.SimpleQueue()
        self._http = _Background(base_url, uds)
        self._tasks: dict[str, Any] = {}
        self._transfer = None if transfer == FILES else Transfer(name, self._call, timeout)
        self._weights: tuple[Path | WeightSnapshot, int] | None = (
            None  # what was last loaded, or its folder; its version
        )
        self._served = ""
        self._adapter: tuple[Path, int] | None = None

    def add(self, turn: Turn) -> None:
        self._tasks[turn.key] = self._http.start(self._complete(turn))

    def poll(self, timeout: float) -> list[Sampled]:
        found: list[Sampled] = []
        wait = max(timeout, 0.0)
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._results.get(timeout=wait) if wait else self._results.get_nowait()
                wait = 0.0
                if isinstance(item, Sampled):
                    self._tasks.pop(item.key, None)
                    found.append(item)
                elif found:  # first what has ended
                    self._results.put(item)
                    return found
                else:
                    raise item
        return found

    def abort(self, keys: list[str]) -> None:
        for key in keys:
            task = self._tasks.pop(key, None)
            if task:
                task.cancel()  # a closed connection makes vLLM drop the request

    def load(self, weights: WeightSnapshot, version: int) -> None:
        self._weights = (weights if self._transfer else self._write(iter(weights), version)), version
        self._apply()

    def load_adapter(self, tensors: dict[str, torch.Tensor], version: int) -> None:
        folder = self._folder / f"adapter-{version}"
        shutil.rmtree(folder, ignore_errors=True)
        with self._room():
            write_adapter(folder, tensors)
        self._adapter = folder, version
        self._apply_adapter()

    def reload(self) -> None:
        """Wait until the server answers again, and give it the last weights."""
        self._forget()
        self._disconnect()
        self._wait_ready()
        self._apply()
        self._apply_adapter()

    def report(self) -> tuple[int, list[WeightShard]]:
        return merged(self._rpc("pact_weights"))

    def report_adapter(self) -> tuple[int, list[WeightShard]]:
        return merged(self._rpc("pact_adapter"))

    def reset_prefix_cache(self) -> None:
        self._call("POST", "/reset_prefix_cache")

    def sleep(self) -> None:
        """The server has its own devices."""

    def wake(self) -> None: ...

    def close(self) -> None:
        self._forget()
        if self._transfer:
            self._transfer.close()
        self._http.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    # -- parts ---------------------------------------------------------------------------------------------------------------

    async def _complete(self, turn: Turn) -> None:
        body = {
            "model": self._adapter_name() or self._served,
            "prompt": turn.ids, "max_tokens": turn.max_tokens, "temperature": turn.temperature, "top_p": 1.0, "top_k": -1,
            "seed": turn.seed, "logprobs": 0, "stop_token_ids": turn.stop, "ignore_eos": True,
            "return_token_ids": True, "skip_special_tokens": False,
        }  # fmt: skip
        try:
            answer = _checked(await self._http.client.post("/v1/completions", json=body), self.name)
            choice = answer["choices"][0]
            if answer.get("prompt_token_ids", choice.get("prompt_token_ids", turn.ids)) != turn.ids:
                raise EngineError(self.name, "it sampled after other tokens than it was given")
            logprobs = choice["logprobs"]["token_logprobs"]
            self._results.put(Sampled(turn.key, choice["token_ids"], logprobs, _cached(answer)))
        except EngineError as error:
            self._results.put(error)
        except httpx.TransportError as error:
            self._results.put(EngineDied(self.name, f"the connection broke: {error or type(error).__name__}"))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            self._results.put(EngineError(self.name, f"an answer that is no completion with token ids: {error!r}"))

    def _apply(self) -> None:
        assert self._weights is not None
        weights, version = self._weights
        if isinstance(weights, WeightSnapshot):
            assert self._transfer is not None
            self._transfer.send(weights)
        else:
            self._rpc("reload_weights", kwargs={"weights_path": str(weights)})
        self._loaded(version)

    def _disconnect(self) -> None:
        """Before the last weights are sent again; WeightsUnavailable if they cannot be."""
        if self._transfer:
            self._transfer.close()
        if self._weights and isinstance(self._weights[0], WeightSnapshot):
            self._weights[0].check_available()

    def _adapter_name(self) -> str | None:
        return f"pact-{self._adapter[1]}" if self._adapter else None

    def _apply_adapter(self) -> None:
        if self._adapter is None:
            return
        (path, version), name = self._adapter, self._adapter_name()
        for old in self._folder.glob("adapter-*"):
            with contextlib.suppress(EngineError):  # not loaded, for example by a server that was started again
                self._call("POST", "/v1/unload_lora_adapter", json={"lora_name": f"pact-{_version(old)}"})
        try:
            self._call("POST", "/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(path)})
        except EngineDied:
            raise
        except EngineError as error:
            raise PactError(
                f"{self.name} does not take the adapter ({error.problem}); a server of your own must be started with "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora and a --max-lora-rank of at least model.lora.r"
            ) from None
        self._loaded(version)

    def _loaded(self, version: int) -> None:
        self._rpc("pact_loaded", args=[str(version)])
        used = [kept[0] for kept in (self._weights, self._adapter) if kept]
        for old in (*self._folder.glob("weights-*"), *self._folder.glob("adapter-*")):
            if old not in used:
                shutil.rmtree(old, ignore_errors=True)

    def _write(self, weights: Iterator[tuple[str, torch.Tensor]], version: int) -> Path:
        """A checkpoint folder with these weights; it appears when it is complete."""
        target = self._folder / f"weights-{version}"
        partial = self._folder / f"weights-{version}.partial"
        for path in (target, partial):
            shutil.rmtree(path, ignore_errors=True)
        with self._room():
            shutil.copytree(self._model, partial)
            _write_shards(weights, partial)
            partial.rename(target)
        return target

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            for partial in self._folder.glob("*.partial"):
                shutil.rmtree(partial, ignore_errors=True)
            raise PactError(
                f"cannot write the weights for the engine to {self._folder}: {error.strerror or error}; set "
                "rollout.vllm_weights_dir to a folder with room"
            ) from None

    def _rpc(self, method: str, args: list[str] | None = None, kwargs: dict[str, str] | None = None) -> list:
        body = {"method": method, "args": args or [], "kwargs": kwargs or {}, "timeout": self._timeout}
        return (self._call("POST", "/collective_rpc", json=body) or {}).get("results", [])

    def _call(self, method: str, path: str, **kwargs: Any) -> Any:
        try:
            return _checked(self._http.request(method, path, timeout=self._timeout, **kwargs), self.name)
        except httpx.TimeoutException:
            raise EngineTimeout(
                self.name, f"no answer to {path} within {self._timeout:g} s (rollout.engine_timeout)"
            ) from None
        except httpx.TransportError as error:
            raise EngineDied(self.name, f"{path}: {error or type(error).__name__}") from None

    def _wait_ready(self, deadline: float | None = None) -> None:
        """Until the server serves; learns the name of its model."""
        end = time.monotonic() + (deadline or self._timeout)
        while True:
            self._check_alive()
            try:
                self._served = _checked(self._http.request("GET", "/v1/models", timeout=5.0), self.name)["data"][0][
                    "id"
                ]
                return
            except (httpx.HTTPError, EngineDied):
                if time.monotonic() > end:
                    raise EngineDied(self.name, f"it does not serve within {deadline or self._timeout:g} s") from None
                time.sleep(0.2)

    def _check_alive(self) -> None:
        """Raises EngineDied if it is known that nobody will answer."""

    def _forget(self) -> None:
        """Drop all requests under way and what they may have answered."""
        self.abort(list(self._tasks))
        with contextlib.suppress(queue.Empty):
            while True:
                self._results.get_nowait()


class RemoteVllm(VllmServer):
    """A server that somebody else runs: `VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --worker-extension-cls …`.

    `insist`: on `transfer`; otherwise weights go through files if the server was not started for it.
    """

    def __init__(
        self,
        url: str,
        model: Path,
        folder: Path,
        *,
        timeout: float,
        start_timeout: float,
        transfer: str = FILES,
        insist: bool = False,
    ):
        super().__init__(f"vLLM at {url}", url, model, folder, timeout=timeout, transfer=transfer)
        self._wait_ready(start_timeout)
        try:
            self._rpc("pact_weights")
        except EngineError as error:
            raise PactError(
                f"{self.name} cannot report its weights ({error.problem}); start it with VLLM_SERVER_DEV_MODE=1 vllm serve "
                f"MODEL --logprobs-mode processed_logprobs --generation-config vllm --worker-extension-cls {EXTENSION}, "
                "and pact-fast installed beside it"
            ) from None
        if self._transfer and set(self._rpc("pact_transfer")) != {NCCL}:
            problem = f'{self.name} was not started with --weight-transfer-config \'{{"backend": "{NCCL}"}}\''
            if insist:
                raise PactError(f"{problem}; do so, or set rollout.vllm_weight_transfer=files")
            log.warning("%s; its weights go through files in %s", problem, folder)
            self._transfer = None


class ManagedVllm(VllmServer):
    """A server that we start with the first weights, watch, and start again when it dies or hangs."""

    def __init__(
        self,
        model: Path,
        folder: Path,
        *,
        log: Path,
        timeout: float,
        start_timeout: float,
        devices: list[int] | None = None,
        transfer: str = FILES,
        **args: Any,
    ):
        import_vllm()
        self._devices = devices  # of this process's GPUs; None: as they come
        self._socket = Path(tempfile.mkdtemp(prefix="pact-fast-vllm-")) / "socket"
        super().__init__(
            "the vLLM server", "http://vllm", model, folder, timeout=timeout, transfer=transfer, uds=str(self._socket)
        )
        self._start_timeout = start_timeout
        self._args = engine_args(args)
        self._log = log
        self._process: subprocess.Popen | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def reload(self) -> None:
        self._kill()
        self._forget()
        self._disconnect()
        self._apply()
        self._apply_adapter()

    def close(self) -> None:
        super().close()
        self._kill()
        shutil.rmtree(self._socket.parent, ignore_errors=True)

    def _apply(self) -> None:
        if self._process is not None:
            return super()._apply()
        assert self._weights is not None
        weights, version = self._weights
        if isinstance(weights, Path):
            self._start(weights)
            self._loaded(version)
        else:
            self._start(self._model)  # with random weights
            super()._apply()

    def _start(self, model: Path) -> None:
        self._socket.unlink(missing_ok=True)
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
            "--uds", str(self._socket), "--generation-config", "vllm", "--worker-extension-cls", EXTENSION,
            "--enable-prompt-tokens-details",
            *_flags(self._args | self._transfer_args()),
        ]  # fmt: skip
        environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
        if self._args.get("enable_lora"):
            environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "True"
        for name in [name for name in environment if name in FOREIGN or name.startswith("TORCHELASTIC_")]:
            del environment[name]
        if self._devices is not None:
            seen = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(seen[i] if seen else str(i) for i in self._devices)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True,
                preexec_fn=_die_with_parent,
            )  # fmt: skip
        self._wait_ready(self._start_timeout)

    def _transfer_args(self) -> dict[str, Any]:
        if self._transfer is None:
            return {}
        return {"load_format": "dummy", "weight_transfer_config": {"backend": NCCL}}

    def _check_alive(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            raise EngineDied(
                self.name, f"it ended with status {self._process.returncode}; its log {self._log} ends:\n{self._tail()}"
            )

    def _tail(self) -> str:
        with contextlib.suppress(OSError):
            return self._log.read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:].strip()
        return ""

    def _kill(self) -> None:
        """The server and its workers, which are one process group."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None


class _Background:
    """An event loop in a thread, and one HTTP client in it."""

    def __init__(self, base_url: str, uds: str | None):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-http", daemon=True)
        self._thread.start()
        self.client: httpx.AsyncClient = asyncio.run_coroutine_threadsafe(_client(base_url, uds), self._loop).result()

    def start(self, coroutine) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def request(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        return self.start(self.client.request(method, path, **kwargs)).result()

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.start(self.client.aclose()).result(timeout=5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)


async def _client(base_url: str, uds: str | None) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    key = os.environ.get("VLLM_API_KEY")
    return httpx.AsyncClient(
        base_url=base_url,
        transport=httpx.AsyncHTTPTransport(uds=uds, limits=limits),
        timeout=httpx.Timeout(None, connect=10.0),  # how long a turn may take is the engine's business
        headers={"Authorization": f"Bearer {key}"} if key else None,
    )


def _checked(response: httpx.Response, name: str) -> Any:
    if response.status_code >= 500:
        raise EngineDied(name, f"status {response.status_code} from {response.request.url.path}: {response.text[:300]}")
    if response.status_code >= 400:
        raise EngineError(name, f"{response.request.url.path} refused ({response.status_code}): {response.text[:300]}")
    return response.json() if "json" in response.headers.get("content-type", "") else None


def _version(folder: Path) -> str:
    return folder.name.partition("-")[2]


def _cached(answer: dict) -> int | None:
    """Tokens of the prompt that the server found in its prefix cache; None unless it was asked to tell."""
    details = (answer.get("usage") or {}).get("prompt_tokens_details")
    return details and (details.get("cached_tokens") or 0)


def _write_shards(weights: Iterator[tuple[str, torch.Tensor]], folder: Path) -> None:
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        name = f"model-{len(set(index.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in weights:
        shard[name] = tensor.cpu().contiguous().clone()  # gathered tensors live no longer than their bucket
        size += tensor.numel() * tensor.element_size()
        total += tensor.numel() * tensor.element_size()
        if size > SHARD:
            flush()
            size = 0
    if shard:
        flush()
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")


def _flags(args: dict[str, Any]) -> list[str]:
    """{max_model_len: 640, enable_lora: True, x: False} → --max-model-len 640 --enable-lora --no-x"""
    flags: list[str] = []
    for key, value in args.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            flags += [f"--{name}", json.dumps(value) if isinstance(value, (dict, list)) else str(value)]
    return flags


def _die_with_parent() -> None:
    """A trainer that is killed leaves no server behind (Linux)."""
    if _LIBC is not None:
        _LIBC.prctl(1, signal.SIGTERM)
