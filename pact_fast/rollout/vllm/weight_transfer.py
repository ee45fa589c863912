"""Weights from the trainer's GPU to a server's through vLLM's weight transfer API, with no file in between.

vLLM packs, broadcasts, receives and loads. Here is the rest: how both sides meet, when they give up, and when this way is
taken at all. They meet by an NCCL id that goes through the server's own endpoint, because vLLM's rendezvous opens a port
from which workers unpickle what anybody on the network puts there. Its other backend, CUDA IPC, is left out for the same
reason: over HTTP, its handles are pickles (VLLM_ALLOW_INSECURE_SERIALIZATION); one GPU is shared in colocate mode instead.
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

FILES, NCCL = "files", "nccl"


def choose_transfer(config: Config, model: PreTrainedModel, *, apart: bool) -> str:
    """`nccl` or `files`; PactError if the one that is asked for cannot be. `apart`: the server has GPUs of its own."""
    wanted = config.rollout.vllm_weight_transfer
    if wanted == FILES:
        return FILES
    obstacle = _obstacle(config, apart)
    if wanted == NCCL and obstacle:
        raise PactError(f"rollout.vllm_weight_transfer=nccl does not work here: {obstacle}; use auto or files")
    return FILES if wanted == "auto" and (obstacle or not _can_be_sent_again(config, model)) else NCCL


def _obstacle(config: Config, apart: bool) -> str | None:
    if config.device == "cpu" or not torch.cuda.is_available():
        return "the trainer has no GPU"
    if not apart:
        return "trainer and server share a GPU"
    try:
        import_vllm()
        from vllm.distributed.weight_transfer import nccl_common, nccl_engine

        _ = nccl_common.uid_init_process_group, nccl_engine.NCCLTrainerWeightTransferEngine
    except (PactError, ImportError, AttributeError) as error:
        return f"the trainer needs a vLLM whose weight transfer API can meet by an NCCL id ({error})"
    return None


def _can_be_sent_again(config: Config, model: PreTrainedModel) -> bool:
    """Whether a server that dies can be given its weights, of which there is no copy, in the middle of a step."""
    trained_meanwhile = config.trainer.max_off_policy_steps > 0 and config.model.lora is None
    return not trained_meanwhile and not needs_all_ranks(model)


class Transfer:
    """The trainer's end; vLLM's `VLLMWeightSyncClient`. Workers join it at the first update and after every failure."""

    def __init__(self, name: str, call: Callable[..., Any], timeout: float):
        self.name, self.timeout = name, timeout
        self.call = call  # (method, path, json=…) of the server; each has its deadline
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
        self._sender: Any = None
        self._outgoing: _Outgoing | None = None

    def send(self, weights: WeightSnapshot) -> None:
        """EngineDied or EngineTimeout when it has failed and has to begin anew."""
        self._outgoing = outgoing = _Outgoing(weights, self.device)
        try:
            with torch.cuda.device(self.device) if self.device else contextlib.nullcontext():
                self._send(outgoing)
        except Exception as error:
            self.close()
            if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):  # NCCL's
                broken = EngineDied(self.name, f"the transfer of weights broke: {error}")
                raise outgoing.failed or broken from error
            raise
        finally:
            outgoing.finish()

    def _send(self, outgoing: _Outgoing) -> None:
        if self._sender is None:
            self._sender = _meet(self, outgoing)
        if self.device:
            # vLLM sends from streams of its own, which do not wait for the one that the optimizer wrote on
            torch.cuda.synchronize()
        self._sender.source = outgoing
        self._sender.send_weights()

    def close(self) -> None:
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.shutdown()

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.call("POST", "/shutdown_weight_transfer_engine")  # what an earlier trainer has left
        self.call("POST", "/init_weight_transfer_engine", json={"init_info": init_info})

    def start_weight_update(self) -> None:
        self.call("POST", "/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """In a thread of its own while the weights are broadcast, which waits for ever for a worker that is gone."""
        try:
            self.call("POST", "/update_weights", json={"update_info": update_info})
        except EngineError as error:
            if self._outgoing:
                self._outgoing.failed = error
            self.close()
            raise

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.call("POST", "/finish_weight_update")


class _Outgoing:
    """One pass through the weights, on the device that sends them, for as long as somebody receives them."""

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
            # packed with later ones; gathered tensors live no longer than their bucket
            yield name, tensor.to(self._device or tensor.device, copy=self._weights.shared)

    def finish(self) -> None:
        """What was begun goes on to its end, because other processes gather along. What was not can begin later."""
        for _ in self._pass or ():
            pass


def _meet(client: Transfer, source: _Outgoing) -> Any:
    """vLLM's sender, after its group of this process and the server's workers has come together."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerWeightTransferEngine

    size = int(client.call("GET", "/get_world_size")["world_size"]) + 1
    nccl_id = _new_id()
    joining = _in_background(lambda: _join(nccl_id, size, client.device))
    client.init_weight_transfer_engine(_workers_part(nccl_id, size))
    chosen: Any = source  # vLLM's classes are followed in shape only, as it need not be installed
    sender: Any = NCCLTrainerWeightTransferEngine(
        client=client, source=chosen, packed=True, packed_buffer_size_bytes=BUCKET
    )
    try:
        sender.model_update_group = joining.result(client.timeout)
    except TimeoutError:
        problem = f"its workers and the trainer did not meet within {client.timeout:g} s (rollout.engine_timeout)"
        raise EngineTimeout(client.name, problem) from None
    return sender


def _new_id() -> bytes:
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    return bytes(NCCLLibrary().ncclGetUniqueId().internal)


def _join(nccl_id: bytes, size: int, device: Any) -> Any:
    """As number 0; returns when all others have come, and cannot be given up."""
    from vllm.distributed.weight_transfer.nccl_common import uid_init_process_group

    return uid_init_process_group(nccl_id, 0, size, device.index)


def _workers_part(nccl_id: bytes, size: int) -> dict[str, Any]:
    from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_payload

    encoded = base64.b64encode(nccl_id).decode()
    return worker_init_payload(
        NCCLWeightTransferInitInfo(
            nccl_unique_id_b64=encoded, rank_offset=1, world_size=size, packed=True, packed_buffer_size_bytes=BUCKET
        )
    )


def _in_background(work: Callable[[], Any]) -> Future:
    """Its result. The thread keeps no process from ending."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, name="weight-transfer", daemon=True).start()
    return future
