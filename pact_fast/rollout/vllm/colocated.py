"""vLLM in the trainer's process, on its device."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pact_fast.errors import EngineError, PactError, foreign_errors
from pact_fast.model.adapter import write_adapter
from pact_fast.model.weights import WeightShard, WeightSnapshot
from pact_fast.rollout.vllm.transport import TurnOutput, TurnRequest, VllmTransport

CURE = (
    "docs/models.md says what vLLM needs for which models; install that, change rollout.vllm_args, or use another model or "
    "another rollout.engine"
)
WORKER_EXTENSION = "pact_fast.rollout.vllm.worker.WeightReport"


class ColocatedVllm(VllmTransport):
    """See VllmTransport.

    Args:
        model_folder: Configuration and tokenizer of the model. vLLM starts with random weights.
        sleep: Free vLLM's device memory during updates (GPU only).
        args: Further vLLM engine arguments.
    """

    name = "vLLM in this process"
    synchronous = True

    def __init__(self, model_folder: Path, *, sleep: bool = False, **args: Any):
        self._may_sleep, self._asleep = sleep, False
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        vllm = import_vllm()
        # vLLM seeds the random generators of this process
        with _preserved_rng(), _start_errors(model_folder):
            from vllm.v1.engine.llm_engine import LLMEngine

            settings = vllm.EngineArgs(
                model=str(model_folder), load_format="dummy", enable_sleep_mode=sleep,
                worker_extension_cls=WORKER_EXTENSION, **engine_args(args),
            )  # fmt: skip
            self.llm_engine = LLMEngine.from_engine_args(settings)
        self._vllm = vllm
        self._folder = model_folder.parent  # adapters go beside it
        self._adapter: Any = None  # vLLM's LoRARequest

    @property
    def adapter_name(self) -> str | None:
        """Name of the current adapter."""
        return self._adapter and self._adapter.lora_name

    def submit(self, turn: TurnRequest) -> None:
        self.llm_engine.add_request(
            turn.key, {"prompt_token_ids": turn.ids}, sampling_params(self._vllm, turn), lora_request=self._adapter
        )

    def poll(self, timeout: float) -> list[TurnOutput]:
        with foreign_errors(f"{self.name} cannot sample", CURE):
            outputs = self.llm_engine.step()
        return [_turn_output(output) for output in outputs if output.finished]

    def abort(self, keys: list[str]) -> None:
        self.llm_engine.abort_request(keys)

    def load_weights(self, weights: WeightSnapshot, version: int) -> None:
        tensors = iter(weights)
        with foreign_errors(f"{self.name} cannot load the model's weights", CURE):
            self.llm_engine.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
        for _ in tensors:  # exhaust it, should the loader stop early: gathering is a collective
            pass
        self.llm_engine.collective_rpc("pact_finish_loading", args=(version,))

    def load_adapter(self, tensors: dict[str, torch.Tensor], version: int) -> None:
        from vllm.lora.request import LoRARequest

        if self._adapter:
            self.llm_engine.remove_lora(self._adapter.lora_int_id)
            shutil.rmtree(self._adapter.lora_path, ignore_errors=True)
        folder = self._folder / f"adapter-{version}"
        shutil.rmtree(folder, ignore_errors=True)
        write_adapter(folder, tensors)
        self._adapter = LoRARequest(f"pact-{version}", version + 1, str(folder))  # vLLM counts from 1
        self.llm_engine.add_lora(self._adapter)
        self.llm_engine.collective_rpc("pact_finish_loading", args=(version,))

    def restart(self) -> None:
        raise EngineError(
            self.name, "it cannot be restarted inside a running process; continue the run with resume=auto"
        )

    def report_weights(self) -> tuple[int, list[WeightShard]]:
        return merge_reports(self.llm_engine.collective_rpc("pact_report_weights"))

    def report_adapter(self) -> tuple[int, list[WeightShard]]:
        return merge_reports(self.llm_engine.collective_rpc("pact_report_adapter"))

    def reset_prefix_cache(self) -> None:
        if not self.llm_engine.reset_prefix_cache():
            raise EngineError(self.name, "the prefix cache could not be reset after a weight update")

    def sleep(self) -> None:
        if self._may_sleep and not self._asleep:
            self.llm_engine.sleep(level=1)
            self._asleep = True

    def wake(self) -> None:
        if self._asleep:
            self.llm_engine.wake_up()
            self._asleep = False

    def close(self) -> None:
        self.llm_engine.engine_core.shutdown()
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


def import_vllm() -> Any:
    """The vllm package; PactError that says what to install."""
    # CPU build: GiB of memory for keys and values, instead of half of the machine's
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        import vllm
    except ImportError as error:
        raise PactError(
            f"rollout.engine=vllm needs the vllm package ({error}); pip install 'pact-fast[vllm]', on a machine without "
            "GPU see docs/rollouts.md, or use rollout.engine=transformers"
        ) from None
    # at each update it warns of every module that is not in the checkpoint; weights are verified anyway
    logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
    return vllm


def engine_args(args: dict[str, Any]) -> dict[str, Any]:
    """vLLM's engine arguments for every placement; `args` take precedence.

    Log-probs are those of the distribution that is sampled from (after temperature and filters), and prefixes are cached.
    """
    fixed: dict[str, Any] = {"logprobs_mode": "processed_logprobs", "enable_prefix_caching": True}
    if not torch.cuda.is_available():
        # on a CPU, a request's seed has no effect if its prompt is computed in chunks
        fixed |= {"enforce_eager": True, "enable_chunked_prefill": False, "block_size": 32}
        fixed["max_num_batched_tokens"] = max(2048, args.get("max_model_len") or 0)
    return {**fixed, **args}


def sampling_params(vllm: Any, turn: TurnRequest) -> Any:
    """vLLM's SamplingParams: temperature and filters alone shape the distribution, and only `turn.stop` ends the turn."""
    from vllm.sampling_params import RequestOutputKind

    return vllm.SamplingParams(
        temperature=turn.temperature, **filter_params(turn), max_tokens=turn.max_tokens, seed=turn.seed, logprobs=0,
        stop_token_ids=turn.stop, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip


def filter_params(turn: TurnRequest) -> dict[str, float | int]:
    """vLLM's top_p, top_k and min_p, all given: its defaults may come from the model's generation config."""
    return {**turn.filters.to_json(), "top_k": turn.filters.top_k or -1}


def merge_reports(reports: list[dict]) -> tuple[int, list[WeightShard]]:
    """(version, shards) of all workers' reports; version -1 if they disagree.

    Raises:
        PactError: A worker cannot read its weights, so they cannot be verified.
    """
    for report in reports:
        if "error" in report:
            raise PactError(f"the engine's weights cannot be verified: {report['error']}")
    versions = {report["version"] for report in reports}
    shards = [WeightShard(*shard) for report in reports for shard in report["shards"]]
    return (versions.pop() if len(versions) == 1 else -1), shards


def _turn_output(output: Any) -> TurnOutput:
    (sample,) = output.outputs
    ids = list(sample.token_ids)
    logprobs = [row[token].logprob for row, token in zip(sample.logprobs, ids, strict=True)]
    return TurnOutput(output.request_id, ids, logprobs, output.num_cached_tokens)


@contextmanager
def _start_errors(model_folder: Path) -> Iterator[None]:
    """Turn any exception of vLLM at its start into one line with the cure.

    vLLM imports a model's code in another process first, and if that fails, its error names no reason. So it is imported
    here once more.
    """
    with foreign_errors("vLLM does not start with this model", CURE):
        try:
            yield
        except Exception:
            _import_architecture(model_folder)
            raise


def _import_architecture(model_folder: Path) -> None:
    from vllm.model_executor.models.registry import ModelRegistry

    for name in json.loads((model_folder / "config.json").read_text(encoding="utf-8"))["architectures"]:
        if name in ModelRegistry.models:
            ModelRegistry.models[name].load_model_cls()


@contextmanager
def _preserved_rng() -> Iterator[None]:
    """Restore the state of the process's random generators afterwards."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)
