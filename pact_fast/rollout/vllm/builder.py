"""Builds the vLLM engine that a configuration asks for."""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pact_fast.chat.rendering import ChatRenderer
from pact_fast.config import Config
from pact_fast.distributed.world import World
from pact_fast.errors import PactError
from pact_fast.model.forward import RECURRENT_LAYERS, layer_kinds
from pact_fast.model.weights import save_model_config
from pact_fast.rollout.engine import Engine
from pact_fast.rollout.registry import EngineBuilder, engine
from pact_fast.rollout.vllm.transport import VllmTransport
from pact_fast.rollout.vllm.weight_transfer import choose_transfer


@engine("vllm")
class VllmBuilder(EngineBuilder):
    """vLLM in the trainer's process (`vllm_mode=colocate`), or as a server."""

    @property
    def _colocated(self) -> bool:
        return self.config.rollout.vllm_mode == "colocate"

    def engine_ranks(self, world: World) -> list[int]:
        """All ranks if colocated; else one rank per server, spread evenly, and so over nodes."""
        count = self.config.rollout.vllm_data_parallel_size
        if self._colocated:
            return list(range(world.size))
        if count > world.size:
            raise PactError(
                f"rollout.vllm_data_parallel_size={count}, but only {world.size} processes train, and each drives at most "
                "one server; lower it, or start more training processes"
            )
        return [i * world.size // count for i in range(count)]

    def check_model(self, model: PreTrainedModel) -> None:
        """vLLM's CPU build computes delta rules in bf16 alone, and finds out only as it samples."""
        config, dtype = model.config.get_text_config(), self.config.model.dtype
        elsewhere = torch.cuda.is_available() or self.config.rollout.vllm_server_base_url
        if not elsewhere and "linear_attention" in layer_kinds(config) and dtype != "bfloat16":
            raise PactError(
                f"vLLM's CPU build computes the linear attention of {config.model_type} in bfloat16 only, and model.dtype is "
                f"{dtype}; set model.dtype=bfloat16, or use a GPU"
            )

    def memory_fraction(self) -> float:
        rollout = self.config.rollout
        return rollout.vllm_gpu_memory_utilization if self._colocated and not rollout.vllm_enable_sleep_mode else 0.0

    def shares_device(self) -> bool:
        return self._colocated

    def devices_per_engine(self) -> int:
        return self.config.rollout.vllm_tensor_parallel_size

    def build(
        self,
        model: PreTrainedModel,
        renderer: ChatRenderer,
        *,
        folder: Path | None,
        autocast: AbstractContextManager | None,
        world: World,
    ) -> Engine:
        from pact_fast.rollout.vllm.engine import VllmEngine

        work = (folder or _temporary_folder()) / (f"engine-{world.rank}" if world.rank else "engine")
        model_folder = _model_folder(model, renderer, work / "model")
        transport = _make_transport(self.config, model, model_folder, work, world, self.engine_ranks(world))
        rollout = self.config.rollout
        stop, dtype = renderer.stop_ids(rollout.stop_at_tool_call), getattr(torch, self.config.model.dtype)
        return VllmEngine(
            transport, stop, deadline=rollout.engine_timeout, dtype=dtype, verify_weights=rollout.verify_weights,
            vocab_size=getattr(model.get_input_embeddings(), "num_embeddings", None),
        )  # fmt: skip


def _temporary_folder() -> Path:
    """A temporary directory, removed at exit."""
    folder = tempfile.mkdtemp(prefix="pact-fast-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _make_transport(
    config: Config, model: PreTrainedModel, folder: Path, work: Path, world: World, engine_ranks: list[int]
) -> VllmTransport:
    rollout = config.rollout
    args = {
        "dtype": config.model.dtype,
        "max_model_len": rollout.max_prompt_length + rollout.max_completion_length,
        "max_num_seqs": rollout.max_batch_size,
        "tensor_parallel_size": rollout.vllm_tensor_parallel_size,
        "seed": config.seed,
        **(_lora_args(config.model.lora.r) if config.model.lora else {}),
        **({} if caches_prefixes(model) else {"enable_prefix_caching": False}),
        **rollout.vllm_args,
    }
    if torch.cuda.is_available():
        args.setdefault("gpu_memory_utilization", rollout.vllm_gpu_memory_utilization)
    if rollout.vllm_mode == "colocate":
        from pact_fast.rollout.vllm.colocated import ColocatedVllm

        if world.size > 1:
            if rollout.vllm_tensor_parallel_size > 1:
                raise PactError(
                    "rollout.vllm_tensor_parallel_size needs rollout.vllm_mode=server when several processes train: in "
                    "colocate mode each has its own engine"
                )
            # vLLM joins the process group of the trainer
            args.setdefault("distributed_executor_backend", "external_launcher")
        return ColocatedVllm(folder, sleep=rollout.vllm_enable_sleep_mode, **args)
    from pact_fast.rollout.vllm.client import VllmServerClient
    from pact_fast.rollout.vllm.process import VllmServerProcess

    weights = _weights_folder(rollout.vllm_weights_dir, work)
    limits = {"timeout": rollout.engine_timeout, "start_timeout": rollout.vllm_server_timeout}
    if rollout.vllm_server_base_url:
        return VllmServerClient(
            rollout.vllm_server_base_url,
            folder,
            weights,
            transfer=choose_transfer(config, model, separate_devices=True),
            transfer_required=rollout.vllm_weight_transfer != "auto",
            **limits,
        )
    devices = server_devices(world, engine_ranks, rollout.vllm_tensor_parallel_size, torch.cuda.device_count())
    transfer = choose_transfer(config, model, separate_devices=devices is not None)
    log = work / "vllm.log"
    return VllmServerProcess(folder, weights, log=log, devices=devices, transfer=transfer, **limits, **args)


def server_devices(world: World, servers: list[int], wanted: int, count: int) -> list[int] | None:
    """GPUs of this rank's server: `wanted` per server, after those of the node's trainers.

    Args:
        world: This rank.
        servers: Ranks that have a server.
        wanted: GPUs per server.
        count: GPUs of this node.

    Returns:
        Indices below `count`; None if there is at most one GPU, which trainer and server share.

    Raises:
        PactError: The node has too few GPUs.
    """
    if count <= 1:
        return None
    trainers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    earlier = sum(world.rank - world.local_rank <= rank < world.rank for rank in servers)  # on this node
    first = trainers + earlier * wanted
    if first + wanted > count:
        raise PactError(
            f"{count} GPUs are too few for {trainers} training processes on this node and a vLLM server on GPUs {first} "
            f"to {first + wanted - 1}; start fewer processes, or lower rollout.vllm_tensor_parallel_size or "
            "rollout.vllm_data_parallel_size"
        )
    return list(range(first, first + wanted))


def caches_prefixes(model: PreTrainedModel) -> bool:
    """Whether vLLM may keep prefixes of contexts. For recurrent states it has to compute prompts in chunks, and on a CPU it
    may not: see `engine_args`."""
    return torch.cuda.is_available() or not RECURRENT_LAYERS.intersection(layer_kinds(model.config.get_text_config()))


def _lora_args(rank: int) -> dict[str, object]:
    """vLLM arguments for one adapter, of the smallest rank that vLLM has kernels for."""
    sizes = (8, 16, 32, 64, 128, 256, 320, 512)
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": next(size for size in sizes if size >= rank)}


def _model_folder(model: PreTrainedModel, renderer: ChatRenderer, folder: Path) -> Path:
    """Write configuration and tokenizer, which vLLM reads; weights are sent later."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_model_config(model, folder)
    renderer.tokenizer.save_pretrained(folder)
    return folder


def _weights_folder(wanted: str | None, work: Path) -> Path:
    """A folder of this run, in shared memory if there is any. Files that a killed run left there are removed."""
    memory = Path("/dev/shm")
    base = Path(wanted) if wanted else memory if memory.is_dir() else work
    run = hashlib.sha256(str(work.resolve()).encode()).hexdigest()[:12]
    folder = base / f"pact-fast-{run}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    return folder
