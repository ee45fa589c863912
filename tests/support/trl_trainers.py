"""Real trainers of TRL on a tiny model and a tiny tokenizer, with the gradients of the host's own code beside ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.chat_tokenizers import chatml_like

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
}  # fmt: skip
PROMPTS = ["The weather in Paris", "I need", "the lazy dog", "Then I answer. Then"]


def tiny_model(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = AutoConfig.for_model("qwen3", vocab_size=len(chatml_like()), **SHAPE | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.generation_config.pad_token_id = chatml_like().pad_token_id
    return model


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 4,
        "report_to": [], "use_cpu": True, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
        "gradient_checkpointing": False, "bf16": False, "seed": 3, "dataloader_pin_memory": False,
    } | changes  # fmt: skip


def some_reward(completions: list[str], **_: Any) -> list[float]:
    """Different within a group."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


def grpo_trainer(
    folder: Path, peft_config: Any = None, model: Any = None, evaluate: bool = False, **changes: Any
) -> Any:
    from trl import GRPOConfig, GRPOTrainer

    options = {"num_generations": 4, "max_completion_length": 6, "temperature": 0.9, "beta": 0.1, "entropy_coef": 0.01}
    args = GRPOConfig(model_init_kwargs={"dtype": "float32"}, **settings(folder, **options | changes))
    if not (folder / "model").exists():
        tiny_model(**model or {}).save_pretrained(folder / "model")  # the reference is read from there
    return GRPOTrainer(
        str(folder / "model"), some_reward, args, prompts(), eval_dataset=prompts() if evaluate else None,
        processing_class=chatml_like(), peft_config=peft_config,
    )  # fmt: skip


def prompts() -> Any:
    import datasets

    return datasets.Dataset.from_dict({"prompt": PROMPTS * 2})


def rloo_trainer(folder: Path) -> Any:
    from trl import RLOOConfig, RLOOTrainer

    args = RLOOConfig(**settings(folder, num_generations=4, max_completion_length=6, beta=0.0, temperature=0.9))
    return RLOOTrainer(tiny_model(), some_reward, args, prompts(), processing_class=chatml_like())


def dpo_trainer(folder: Path) -> Any:
    import datasets
    from trl import DPOConfig, DPOTrainer

    pairs = {"prompt": PROMPTS, "chosen": [" is warm today."] * 4, "rejected": [" jumps over", " the fox"] * 2}
    tiny_model().save_pretrained(folder / "model")
    args = DPOConfig(model_init_kwargs={"dtype": "float32"}, **settings(folder))
    return DPOTrainer(
        str(folder / "model"),
        args=args,
        train_dataset=datasets.Dataset.from_dict(pairs),
        processing_class=chatml_like(),
    )


def sft_trainer(folder: Path, peft_config: Any = None, model: str | None = None, **changes: Any) -> Any:
    import datasets
    from trl import SFTConfig, SFTTrainer

    rows = {"prompt": PROMPTS * 4, "completion": [" is warm today.", " the weather.", " jumps over the fox", ""] * 4}
    init = {"model_init_kwargs": {"dtype": "float32"}} if model else {}
    args = SFTConfig(**settings(folder, max_length=32, **init | changes))
    data = datasets.Dataset.from_dict(rows)
    return SFTTrainer(
        model or tiny_model(),
        args,
        train_dataset=data,
        eval_dataset=data,
        processing_class=chatml_like(),
        peft_config=peft_config,
    )


def compare_steps(trainer: Any) -> list[float]:
    """The largest relative difference of any parameter's gradient in every micro-batch, ours against the host's."""
    differences: list[float] = []
    own_step = trainer.training_step
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]

    def gradients(run: Any) -> tuple[list[torch.Tensor], Any]:
        """Return the gradients that `run` adds, and its result."""
        before = [0 if p.grad is None else p.grad.clone() for p in parameters]
        result = run()
        after = (torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)
        return [new - old for new, old in zip(after, before, strict=True)], result

    def training_step(model: Any, inputs: Any, count: Any = None) -> Any:
        prepared = trainer._prepare_inputs(inputs)
        original = trainer._prepare_inputs
        trainer._prepare_inputs = lambda _: {k: v.clone() if torch.is_tensor(v) else v for k, v in prepared.items()}
        step, state = getattr(trainer, "_step", None), torch.get_rng_state()
        held = [None if p.grad is None else p.grad.clone() for p in parameters]
        theirs, _ = without(trainer, lambda: gradients(lambda: own_step(model, inputs, count)))
        for parameter, grad in zip(parameters, held, strict=True):
            parameter.grad = grad
        if step is not None:
            trainer._step = step
        torch.set_rng_state(state)
        ours, loss = gradients(lambda: own_step(model, inputs, count))
        trainer._prepare_inputs = original
        scale = max(float(b.norm()) for b in theirs)
        differences.append(
            max(
                float((a - b).norm()) / max(float(b.norm()), 1e-3 * scale, 1e-30)
                for a, b in zip(ours, theirs, strict=True)
            )
        )
        return loss

    def without(trainer: Any, run: Any) -> Any:
        """The host's own code, with its forward and loss of before `install`."""
        from pact_fast.kernels.head.logit_transform import causal_lm_of

        causal_lm = causal_lm_of(trainer.model)
        forward, loss = causal_lm.forward, vars(trainer).get("_compute_loss")
        causal_lm.forward = forward.own if hasattr(forward, "own") else forward
        if loss is not None:
            del trainer._compute_loss
        try:
            return run()
        finally:
            causal_lm.forward = forward
            if loss is not None:
                trainer._compute_loss = loss

    trainer.training_step = training_step
    trainer.train()
    return differences
