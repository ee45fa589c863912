"""Weights from the trainer's GPU to a server's GPUs over NCCL, through vLLM's weight transfer API.

vLLM packs, broadcasts, receives and loads. This module does the rest: choose between NCCL and files, form the NCCL
group, and give up when the other side is gone.

Security: the NCCL id goes through the server's own endpoint. vLLM's rendezvous is not used, because it opens a port,
and workers unpickle whatever anybody on the network sends there. vLLM's other backend, CUDA IPC, is not used either:
over HTTP its handles are pickles (VLLM_ALLOW_INSECURE_SERIALIZATION). To share one GPU, use vllm_mode=colocate.
"""

from __future__ import annotations

import base64
import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import torch
from transformers import PreTrainedModel

from pact_fast.config import Config
from pact_fast.errors import EngineDied, EngineError, EngineTimeout, PactError
from pact_fast.model.weights import BUCKET, TensorSpec, WeightSnapshot, needs_all_ranks
from pact_fast.rollout.vllm.colocated import import_vllm
from pact_fast.rollout.vllm.responses import read_world_size

FILES, NCCL = "files", "nccl"


def choose_transfer(config: Config, model: PreTrainedModel, *, separate_devices: bool) -> str:
    """`nccl` or `files`, from rollout.vllm_weight_transfer.

    Args:
        config: The run's configuration.
        model: The trainer's model.
        separate_devices: True if the server has GPUs of its own.

    Raises:
        PactError: `nccl` is set, and does not work here.
    """
    wanted = config.rollout.vllm_weight_transfer
    if wanted == FILES:
        return FILES
    obstacle = _nccl_obstacle(config, separate_devices)
    if wanted == NCCL and obstacle:
        raise PactError(f"rollout.vllm_weight_transfer=nccl does not work here: {obstacle}; use auto or files")
    return FILES if wanted == "auto" and (obstacle or not _can_resend(config, model)) else NCCL


def _nccl_obstacle(config: Config, separate_devices: bool) -> str | None:
    """Why NCCL cannot be used; None if it can."""
    if config.device == "cpu" or not torch.cuda.is_available():
        return "the trainer has no GPU"
    if not separate_devices:
        return "trainer and server share a GPU"
    try:
        import_vllm()
        from vllm.distributed.weight_transfer import nccl_common, nccl_engine

        _ = nccl_common.uid_init_process_group, nccl_engine.NCCLTrainerWeightTransferEngine
    except (PactError, ImportError, AttributeError) as error:
        return f"the trainer needs a vLLM whose weight transfer API takes an NCCL id ({error})"
    return None


def _can_resend(config: Config, model: PreTrainedModel) -> bool:
    """True if a server that dies in the middle of a step can be sent the same weights; there is no copy of them."""
    trained_meanwhile = config.trainer.max_off_policy_steps > 0 and config.model.lora is None
    return not trained_meanwhile and not needs_all_ranks(model)


class NcclTransfer:
    """The trainer's end of the transfer; implements vLLM's `VLLMWeightSyncClient`.

    The NCCL group is formed at the first update, and again after every failure.

    Args:
        name: Of the server, for messages.
        call: `call(method, path, json=…)` sends a request to the server, with a deadline.
        timeout: Seconds to wait for the workers to join.
    """

    def __init__(self, name: str, call: Callable[..., Any], timeout: float):
        self.name, self.timeout, self.call = name, timeout, call
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
        self._sender: Any = None
        self._stream: _WeightStream | None = None

    def send(self, weights: WeightSnapshot) -> None:
        """Send all weights. After an EngineDied or EngineTimeout, the next call starts with a new group."""
        self._stream = stream = _WeightStream(weights, self.device)
        try:
            with torch.cuda.device(self.device) if self.device else contextlib.nullcontext():
                self._send(stream)
        except Exception as error:
            self.close()
            if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):  # raised by NCCL
                broken = EngineDied(self.name, f"the transfer of weights broke: {error}")
                raise stream.failed or broken from error
            raise
        finally:
            stream.finish()

    def _send(self, stream: _WeightStream) -> None:
        if self._sender is None:
            self._sender = _connect(self, stream)
        if self.device:
            # vLLM sends from its own CUDA streams, which do not wait for the optimizer's
            torch.cuda.synchronize()
        self._sender.source = stream
        self._sender.send_weights()

    def close(self) -> None:
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.shutdown()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.call("POST", "/shutdown_weight_transfer_engine")  # left by an earlier trainer
        self.call("POST", "/init_weight_transfer_engine", json={"init_info": init_info})

    def start_weight_update(self) -> None:
        self.call("POST", "/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Called by vLLM in a thread of its own during the broadcast, which would wait for ever for a dead worker."""
        try:
            self.call("POST", "/update_weights", json={"update_info": update_info})
        except EngineError as error:
            if self._stream:
                self._stream.failed = error
            self.close()
            raise

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.call("POST", "/finish_weight_update")


class _WeightStream:
    """One pass through the weights, on the sending device; stops when `failed` is set. vLLM's `WeightSource`."""

    def __init__(self, weights: WeightSnapshot, device: torch.device | None):
        self._weights, self._device = weights, device
        self._pass: Iterator[tuple[str, torch.Tensor]] | None = None
        self.failed: EngineError | None = None

    def metadata(self) -> list[TensorSpec]:
        return self._weights.metadata()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self._pass = iter(self._weights)
        for name, tensor in self._pass:
            if self.failed:
                raise self.failed
            # copy: vLLM packs it with later ones, but gathered tensors exist only during their iteration
            yield name, tensor.to(self._device or tensor.device, copy=self._weights.partitioned)

    def finish(self) -> None:
        """Exhaust a pass that has begun, because gathering is a collective; one that has not may begin later."""
        for _ in self._pass or ():
            pass


def _connect(client: NcclTransfer, source: _WeightStream) -> Any:
    """vLLM's sender, once this process and the server's workers have formed their NCCL group."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

    size = read_world_size(client.name, client.call("GET", "/get_world_size")) + 1
    nccl_id = new_nccl_id()
    group = _in_background(lambda: init_nccl_group(nccl_id, size, client.device))
    client.init_weight_transfer_engine(_worker_init_info(nccl_id, size))
    untyped: Any = source  # follows vLLM's protocol without importing it, as vLLM need not be installed
    sender: Any = NCCLTrainerWeightTransferEngine(
        client=client, source=untyped, packed=True, packed_buffer_size_bytes=BUCKET
    )
    try:
        sender.model_update_group = group.result(client.timeout)
    except TimeoutError:
        problem = f"its workers did not join the NCCL group within {client.timeout:g} s (rollout.engine_timeout)"
        raise EngineTimeout(client.name, problem) from None
    return sender


def new_nccl_id() -> bytes:
    """A unique id of an NCCL group. Tests without a GPU replace it, and `init_nccl_group`."""
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    return bytes(NCCLLibrary().ncclGetUniqueId().internal)


def init_nccl_group(nccl_id: bytes, size: int, device: Any) -> Any:
    """Join the group of `size` as rank 0. Returns when all ranks have joined, and cannot be interrupted."""
    from vllm.distributed.weight_transfer.nccl_common import uid_init_process_group

    return uid_init_process_group(nccl_id, 0, size, device.index)


def _worker_init_info(nccl_id: bytes, size: int) -> dict[str, Any]:
    """Return the payload with which the server's workers join the group as ranks 1 to size − 1."""
    from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_payload

    encoded = base64.b64encode(nccl_id).decode()
    return worker_init_payload(
        NCCLWeightTransferInitInfo(
            nccl_unique_id_b64=encoded, rank_offset=1, world_size=size, packed=True, packed_buffer_size_bytes=BUCKET
        )
    )


def _in_background(work: Callable[[], Any]) -> Future:
    """Run `work` in a daemon thread, which does not keep the process alive."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, name="weight-transfer", daemon=True).start()
    return future
