"""vLLM in this process: it shares the trainer's device and sleeps during updates."""

from __future__ import annotations

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

from pact_fast.errors import EngineError, PactError
from pact_fast.model.adapter import write_adapter
from pact_fast.model.weights import WeightShard, WeightSnapshot
from pact_fast.rollout.vllm.engine import Sampled, Turn

EXTENSION = "pact_fast.rollout.vllm.worker.WeightReport"


class LocalVllm:
    """See VllmTransport. `model`: a folder with configuration and tokenizer; its weights are not read. `args`: vLLM's own."""

    name = "vLLM in this process"
    synchronous = True

    def __init__(self, model: Path, *, sleep: bool = False, **args: Any):
        self._sleeps, self._asleep = sleep, False
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        vllm = import_vllm()
        with _random_state():  # vLLM seeds the generators of this process
            from vllm.v1.engine.llm_engine import LLMEngine

            settings = vllm.EngineArgs(
                model=str(model), load_format="dummy", enable_sleep_mode=sleep, worker_extension_cls=EXTENSION,
                **engine_args(args),
            )  # fmt: skip
            self._engine = LLMEngine.from_engine_args(settings)
        self._vllm = vllm
        self._folder = model.parent  # adapters go beside it
        self._adapter: Any = None  # vLLM's LoRARequest

    def add(self, turn: Turn) -> None:
        self._engine.add_request(
            turn.key, {"prompt_token_ids": turn.ids}, sampling_params(self._vllm, turn), lora_request=self._adapter
        )

    def poll(self, timeout: float) -> list[Sampled]:
        outputs = self._engine.step()
        return [_sampled(output) for output in outputs if output.finished]

    def abort(self, keys: list[str]) -> None:
        self._engine.abort_request(keys)

    def load(self, weights: WeightSnapshot, version: int) -> None:
        tensors = iter(weights)
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
        for _ in tensors:  # a loader that stops early must not leave collective gathering half way
            pass
        self._engine.collective_rpc("pact_loaded", args=(version,))

    def load_adapter(self, tensors: dict[str, torch.Tensor], version: int) -> None:
        from vllm.lora.request import LoRARequest

        if self._adapter:
            self._engine.remove_lora(self._adapter.lora_int_id)
            shutil.rmtree(self._adapter.lora_path, ignore_errors=True)
        folder = self._folder / f"adapter-{version}"
        shutil.rmtree(folder, ignore_errors=True)
        write_adapter(folder, tensors)
        self._adapter = LoRARequest(f"pact-{version}", version + 1, str(folder))  # vLLM counts from 1
        self._engine.add_lora(self._adapter)
        self._engine.collective_rpc("pact_loaded", args=(version,))

    def reload(self) -> None:
        raise EngineError(self.name, "it cannot be started again inside a running process; resume the run")

    def report(self) -> tuple[int, list[WeightShard]]:
        return merged(self._engine.collective_rpc("pact_weights"))

    def report_adapter(self) -> tuple[int, list[WeightShard]]:
        return merged(self._engine.collective_rpc("pact_adapter"))

    def reset_prefix_cache(self) -> None:
        if not self._engine.reset_prefix_cache():
            raise EngineError(self.name, "the prefix cache could not be reset after a weight update")

    def sleep(self) -> None:
        if self._sleeps and not self._asleep:
            self._engine.sleep(level=1)
            self._asleep = True

    def wake(self) -> None:
        if self._asleep:
            self._engine.wake_up()
            self._asleep = False

    def close(self) -> None:
        self._engine.engine_core.shutdown()
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


def import_vllm():
    """The vllm package; PactError that says what to install."""
    # CPU build: this much memory for keys and values, instead of half of the machine's
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        import vllm
    except ImportError as error:
        raise PactError(
            f"rollout.engine=vllm needs the vllm package ({error}); pip install 'pact-fast[vllm]', on a machine without GPU "
            "see docs/rollouts.md, or use rollout.engine=transformers"
        ) from None
    # it warns of every module that a checkpoint does not hold, at each update; what is held is verified
    logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
    return vllm


def engine_args(args: dict[str, Any]) -> dict[str, Any]:
    """What every placement sets: log-probs of the distribution that is sampled from, shared prefixes."""
    fixed: dict[str, Any] = {"logprobs_mode": "processed_logprobs", "enable_prefix_caching": True}
    if not torch.cuda.is_available():
        # there, seeds of requests do not survive a prompt that is computed in parts
        fixed |= {"enforce_eager": True, "enable_chunked_prefill": False, "block_size": 32}
        fixed["max_num_batched_tokens"] = max(2048, args.get("max_model_len") or 0)
    return {**fixed, **args}


def sampling_params(vllm, turn: Turn):
    """vLLM's parameters of a turn. Nothing but temperature shapes the distribution, and only our tokens end a turn."""
    from vllm.sampling_params import RequestOutputKind

    return vllm.SamplingParams(
        temperature=turn.temperature, top_p=1.0, top_k=-1, max_tokens=turn.max_tokens, seed=turn.seed, logprobs=0,
        stop_token_ids=turn.stop, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip


def merged(reports: list[dict]) -> tuple[int, list[WeightShard]]:
    """One report of the workers' reports; PactError if weights cannot be read, and so not be verified."""
    for report in reports:
        if "error" in report:
            raise PactError(f"the engine's weights cannot be verified: {report['error']}")
    versions = {report["version"] for report in reports}
    pieces = [WeightShard(*piece) for report in reports for piece in report["pieces"]]
    return (versions.pop() if len(versions) == 1 else -1), pieces


def _sampled(output) -> Sampled:
    (one,) = output.outputs
    ids = list(one.token_ids)
    logprobs = [row[token].logprob for row, token in zip(one.logprobs, ids, strict=True)]
    return Sampled(output.request_id, ids, logprobs, output.num_cached_tokens)


@contextmanager
def _random_state() -> Iterator[None]:
    """Leave the process's random generators as they were."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)
