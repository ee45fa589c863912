"""The engine that a configuration asks for."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pact_fast.config import Config
from pact_fast.data.rendering import ChatRenderer
from pact_fast.errors import PactError
from pact_fast.rollout.engine import Engine
from pact_fast.rollout.transformers_engine import TransformersEngine
from pact_fast.rollout.vllm_engine import Host, VllmEngine
from pact_fast.tree.hf import unsupported


def make_engine(
    config: Config,
    model: PreTrainedModel,
    renderer: ChatRenderer,
    *,
    folder: Path | None = None,
    autocast: AbstractContextManager | None = None,
) -> Engine:
    """`folder`: the run's, where an engine may keep its files and its log; default: a temporary one."""
    stop = renderer.stop_ids(config.rollout.stop_at_tool_call)
    if config.rollout.engine == "transformers":
        check_embedded(model)
        return TransformersEngine(model, stop, slots=config.rollout.max_batch_size, autocast=autocast)
    dtype = getattr(torch, config.model.dtype)
    work = (folder or Path(tempfile.mkdtemp(prefix="pact-fast-"))) / "engine"
    host = _vllm_host(config, _model_folder(model, renderer, work / "model"), work)
    return VllmEngine(host, stop, deadline=config.rollout.engine_timeout, dtype=dtype)


def check_embedded(model: PreTrainedModel) -> None:
    """PactError if the embedded engine cannot sample from the model: its cache holds whole contexts, as trees do."""
    reason = unsupported(model)
    if reason is not None:
        raise PactError(
            f"the embedded rollout engine does not serve this model ({reason}); use rollout.engine=vllm, or another model"
        )


def _vllm_host(config: Config, model: Path, work: Path) -> Host:
    rollout = config.rollout
    args = {
        "dtype": config.model.dtype,
        "max_model_len": rollout.max_prompt_length + rollout.max_completion_length,
        "max_num_seqs": rollout.max_batch_size,
        "tensor_parallel_size": rollout.vllm_tensor_parallel_size,
        "seed": config.seed,
        **(_lora_args(config.model.lora.r) if config.model.lora else {}),
        **rollout.vllm_args,
    }
    if torch.cuda.is_available():
        args.setdefault("gpu_memory_utilization", rollout.vllm_gpu_memory_utilization)
    if rollout.vllm_mode == "colocate":
        from pact_fast.rollout.vllm_local import LocalVllm

        return LocalVllm(model, sleep=rollout.vllm_enable_sleep_mode, **args)
    from pact_fast.rollout.vllm_server import ManagedVllm, RemoteVllm

    weights = _weights_folder(rollout.vllm_weights_dir, work)
    limits = {"timeout": rollout.engine_timeout, "start_timeout": rollout.vllm_server_timeout}
    if rollout.vllm_server_base_url:
        return RemoteVllm(rollout.vllm_server_base_url, model, weights, **limits)
    return ManagedVllm(model, weights, log=work / "vllm.log", **limits, **args)


def _lora_args(rank: int) -> dict[str, object]:
    """Room for one adapter, of a rank that vLLM has kernels for."""
    sizes = (8, 16, 32, 64, 128, 256, 320, 512)
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": next(size for size in sizes if size >= rank)}


def _model_folder(model: PreTrainedModel, renderer: ChatRenderer, folder: Path) -> Path:
    """Configuration and tokenizer, which vLLM reads; weights come later."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings = model.config.to_dict() | {"architectures": [type(model).__name__]}
    type(model.config).from_dict(settings).save_pretrained(folder)
    renderer.tokenizer.save_pretrained(folder)
    return folder


def _weights_folder(wanted: str | None, work: Path) -> Path:
    """A folder of this run's own, in shared memory if there is any. What a killed run left there is removed."""
    memory = Path("/dev/shm")
    base = Path(wanted) if wanted else memory if memory.is_dir() else work
    run = hashlib.sha256(str(work.resolve()).encode()).hexdigest()[:12]
    folder = base / f"pact-fast-{run}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
    return folder
