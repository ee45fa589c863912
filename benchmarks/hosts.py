"""TRL's GRPO step against the same step with these kernels: time, memory, gradients and log-prob errors.

python -m benchmarks.hosts                                       2 prompts × 4 completions, fp32
python -m benchmarks.hosts --dtype bf16 --rounds 5 --out results.json

One micro-batch of a real GRPOTrainer (loss and backward, without generation and optimizer), the same data and weights for all:

trl          as installed; without Triton it scores prompts, too
trl compact  scores completions only, as it does on a GPU
head         our log-probs in TRL's loss (install(trainer, "head"))
loss         one pass over the logits (install(trainer, "loss"))
tree         one pass, and a prompt is computed once for its completions (install(trainer, "tree"))

ms           median over paired rounds in rotating order; the first batch, which is checked against TRL, is not timed;
             where other programs run beside it: --cpu-time, with OMP_NUM_THREADS=1
ratio        time of trl compact relative to the method: median over rounds of the ratio within a round
MiB          peak memory of a call beyond what was held before
gradient     largest relative difference of a parameter's gradient from that of trl
log-prob     largest error of the head's log-probs in nats, against fp64 logits of the same hidden states

Exit status 1: in fp32, gradients differ from TRL's by more than 1e-4.
"""

from __future__ import annotations

if not __package__:  # started as a file
    from as_module import run_as_module

    run_as_module(__file__)

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from benchmarks.harness import (
    Case,
    add_case_options,
    add_clock_option,
    log,
    make_parser,
    markdown,
    new_report,
    number,
    probe_in_process,
    run_cases,
)
from benchmarks.measure import MIB, PeakMemory, median_ratio, paired_rounds
from pact_fast.integrations.trl import install

METHODS = ("trl", "trl compact", "head", "loss", "tree")
MODES = ("head", "loss", "tree")
LIMIT = 1e-4


@dataclass(frozen=True)
class StepCase(Case):
    """Shapes of one micro-batch, and of the model that is trained on it.

    prompts            of the micro-batch
    completions        of a prompt
    prompt_tokens      of every prompt
    completion_tokens  of every completion
    vocab              size of the vocabulary
    width              hidden size
    layers             of the decoder
    dtype              of the weights: fp32 or bf16
    """

    prompts: int = 2
    completions: int = 4
    prompt_tokens: int = 256
    completion_tokens: int = 128
    vocab: int = 32768
    width: int = 512
    layers: int = 2
    dtype: str = "fp32"

    def __str__(self) -> str:
        return (
            f"{self.prompts} × {self.completions} × ({self.prompt_tokens} + {self.completion_tokens}) tokens, "
            f"V {self.vocab}, D {self.width}, {self.layers} layers, {self.dtype}"
        )


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "hosts")
    add_case_options(parser, rounds=3)
    add_clock_option(parser)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default: fp32)")
    for name, default in StepCase().request().items():
        if name != "dtype":
            option = f"--{name.replace('_', '-')}"
            parser.add_argument(option, type=int, default=default, help="of the micro-batch (default: %(default)s)")
    return parser.parse_args(argv)


class Step:
    """One method's trainer and its micro-batch; calling it is loss and backward."""

    def __init__(self, case: StepCase, method: str):
        self.method, self.trainer = method, trainer_of(case)
        self.inputs = inputs_of(case)
        if method in MODES:
            install(self.trainer, method)  # type: ignore[arg-type]
        compact = method == "trl compact"
        self._patch = mock.patch("trl.trainer.utils._use_triton", lambda _: True) if compact else None

    def __call__(self) -> None:
        if self._patch is None:
            return self._run()
        with self._patch:
            self._run()

    def _run(self) -> None:
        trainer = self.trainer
        self.clear()
        with trainer.accelerator.autocast():
            trainer._compute_loss(trainer.model, dict(self.inputs)).backward()

    def share_weights(self, other: Step) -> None:
        """Use the weights of `other`: of a real model there is no room for five."""
        for mine, theirs in zip(self.trainer.model.parameters(), other.trainer.model.parameters(), strict=True):
            mine.data = theirs.data

    def gradients(self) -> list[torch.Tensor]:
        """Gradients of the last call, in the order of the model's parameters; without those that have none."""
        return [p.grad for p in self.trainer.model.parameters() if p.grad is not None]

    def clear(self) -> None:
        """Free the gradients."""
        self.trainer.model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def logprob_error(self) -> float:
        """Largest error in nats of the head's log-probs of completion tokens, against fp64 logits of its hidden states."""
        model, ids = self.trainer.model.eval(), torch.cat([self.inputs["prompt_ids"], self.inputs["completion_ids"]], 1)
        labels = ids.clone()
        labels[:, : self.inputs["prompt_ids"].shape[1]] = -100
        given = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs[labels[:, 1:] != -100]
        hidden = model.base_model(input_ids=ids).last_hidden_state[:, :-1][labels[:, 1:] != -100]
        worst, target = 0.0, labels[:, 1:][labels[:, 1:] != -100]
        for part in torch.arange(len(target)).split(64):
            z = hidden[part].double() @ model.lm_head.weight.double().T / self.trainer.temperature
            exact = z.log_softmax(-1).gather(1, target[part, None])[:, 0]
            worst = max(worst, float((given[part].double() - exact).abs().max()))
        model.train()
        return worst


def trainer_of(case: StepCase) -> Any:
    """TRL's GRPOTrainer of a Qwen3 with random weights (seed 0), on the CPU; it is never asked to generate."""
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    words = Tokenizer(models.WordLevel({"<eos>": 0, "word": 1}, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    torch.manual_seed(0)
    heads = max(case.width // 64, 1)
    shared = next(n for n in range(max(heads // 2, 1), 0, -1) if heads % n == 0)
    config = AutoConfig.for_model(
        "qwen3", vocab_size=case.vocab, hidden_size=case.width, intermediate_size=3 * case.width, head_dim=64,
        num_hidden_layers=case.layers, num_attention_heads=heads, num_key_value_heads=shared,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if case.dtype == "bf16" else torch.float32)
    count = case.prompts * case.completions
    args = GRPOConfig(
        tempfile.mkdtemp(), per_device_train_batch_size=count, num_generations=case.completions, report_to=[],
        max_completion_length=case.completion_tokens, use_cpu=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    rows = datasets.Dataset.from_dict({"prompt": ["word"] * count})
    trainer = GRPOTrainer(
        model, lambda completions, **_: [0.0] * len(completions), args, rows, processing_class=tokenizer
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def inputs_of(case: StepCase) -> dict[str, torch.Tensor]:
    """A micro-batch with B = prompts · completions rows, as TRL's `_compute_loss` takes it, random with seed 1.

    Token ids and masks are int64, [B, prompt_tokens] and [B, completion_tokens]; advantages are fp32 [B].
    """
    generator = torch.Generator().manual_seed(1)
    count = case.prompts * case.completions
    prompts = torch.randint(case.vocab, (case.prompts, case.prompt_tokens), generator=generator)
    completions = torch.randint(case.vocab, (count, case.completion_tokens), generator=generator)
    return {
        "prompt_ids": prompts.repeat_interleave(case.completions, 0),
        "prompt_mask": torch.ones(count, case.prompt_tokens, dtype=torch.int64),
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "advantages": torch.randn(count, generator=generator),
        "num_items_in_batch": torch.tensor(completions.numel()),
    }


def difference(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Largest relative difference of a parameter's gradient, in the Frobenius norm.

    A gradient below a thousandth of the largest is measured against that thousandth.
    """
    scale = max(float(b.norm()) for b in theirs)
    pairs = zip(ours, theirs, strict=True)
    return max(float((a.float() - b.float()).norm()) / max(float(b.norm()), 1e-3 * scale) for a, b in pairs)


def measure(args: argparse.Namespace) -> Callable[[StepCase], dict[str, Any]]:
    """A function that measures all methods on a case: milliseconds, gradients, log-prob errors in nats, peak bytes."""

    def run(case: StepCase) -> dict[str, Any]:
        steps = {name: Step(case, name) for name in METHODS}
        expected, differences = [], {}
        for name, step in steps.items():
            step.share_weights(steps["trl"])
            log(f"  {name}: first call")
            step()  # ours are checked
            expected = expected or step.gradients()  # of trl, the first
            differences[name] = difference(step.gradients(), expected)
            step.clear()

        def clear() -> None:
            for step in steps.values():
                step.clear()

        rounds = dict.fromkeys(METHODS, args.rounds)
        times = paired_rounds(steps, rounds, torch.device("cpu"), clear, args.clock)
        results: dict[str, Any] = {}
        for name, step in steps.items():
            results[name] = {
                "ms": statistics.median(times[name]), "rounds": times[name],
                "ratio": median_ratio(times["trl compact"], times[name]), "gradient": differences[name],
                "logprob_error": step.logprob_error() if name in ("trl", "head") else None,
            }  # fmt: skip
            if not args.no_memory:
                log(f"  {name}: memory")
                results[name] |= probe_in_process("hosts", {"case": case.request(), "method": name}, "memory_note")
        wrong = [f"{n}: gradient {r['gradient']:.1e}" for n, r in results.items() if r["gradient"] > LIMIT]
        return {"case": case.request(), "methods": results, "failures": wrong if case.dtype == "fp32" else []}

    return run


def probe(request: dict[str, Any]) -> None:
    """Print the peak memory of one call of one method, in bytes beyond what was held before; in this process."""
    step = Step(StepCase(**request["case"]), request["method"])
    step()
    step.clear()
    with PeakMemory(torch.device("cpu")) as peak:
        step()
    print(json.dumps({"bytes": peak.bytes}))


def table(result: dict[str, Any]) -> str:
    """One row for each method: ms, ratio, MiB and errors, as the module describes them."""
    rows = [
        [
            name, number(r["ms"], ".0f"), number(r["ratio"], ".2f"),
            number(None if r.get("bytes") is None else r["bytes"] / MIB, ".0f"), number(r["gradient"], ".1e"),
            number(r["logprob_error"], ".1e"),
        ]
        for name, r in result["methods"].items()
    ]  # fmt: skip
    return markdown(["method", "ms", "ratio", "MiB", "gradient", "log-prob"], rows)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.probe:
        probe(json.loads(args.probe))
        return 0
    case = StepCase(**{name: getattr(args, name) for name in StepCase().request()})
    return run_cases(args, new_report("hosts", args, clock=args.clock.__name__), [case], measure(args), table)


if __name__ == "__main__":
    sys.exit(main())
