"""OpenRLHF's real actor and policy trainer on the CPU, a batch for them, and their steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.support.flash_attn_standin import openrlhf_models, ppo_trainer

SHAPE = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
host = openrlhf_models()


def make_actor(*, packing=False, temperature=1.0, tied=False, lora=False) -> Any:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=tied))
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"], lora_dropout=0.0))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    actor = host.Actor(model, temperature=temperature)
    actor.packing_samples = packing
    return actor


def batch(seed: int = 1) -> tuple[torch.Tensor, ...]:
    """Prompts padded on the left, completions on the right: [3, 12], of which 7 columns are actions."""
    generator = torch.Generator().manual_seed(seed)
    sequences = torch.randint(1, 300, (3, 12), generator=generator)
    attention, action = torch.ones(3, 12, dtype=torch.long), torch.ones(3, 7)
    attention[0, :3] = attention[1, 10:] = 0
    action[1, 5:] = action[2, 2] = 0  # the end, and an observation in the middle
    sequences = sequences * attention
    values = [torch.randn(3, 7, generator=generator) for _ in range(2)]
    return sequences, attention, action, *values


def gradients(actor: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in actor.named_parameters() if p.grad is not None}
    actor.zero_grad()
    return found


def make_trainer(actor: Any, loss: Any, **settings: Any) -> Any:
    """OpenRLHF's trainer of a policy, with its real `training_step`, without DeepSpeed, Ray and optimizer."""
    kl = SimpleNamespace(use_loss=False, init_coef=0.1, estimator="k3", unbiased_gradient=False)
    vars(kl).update({name: value for name, value in settings.items() if hasattr(kl, name)})
    args = SimpleNamespace(
        actor=SimpleNamespace(entropy_coef=settings.get("entropy_coef"), aux_loss_coef=0.0),
        algo=SimpleNamespace(kl=kl), train=SimpleNamespace(dynamic_batch_enable=False),
    )  # fmt: skip
    trainer = ppo_trainer().__new__(ppo_trainer())
    scale = settings.get("scale", 1.0)  # as DeepSpeed's accumulation and loss scaling do
    trainer.strategy = SimpleNamespace(
        args=args, ring_attn_group=None, backward=lambda loss, *_: (loss * scale).backward(),
        optimizer_step=lambda *_, **__: None, get_grad_norm=lambda _: 0.0,
    )  # fmt: skip
    trainer.args, trainer.actor, trainer.actor_loss_fn, trainer.aux_loss = args, actor, loss, False
    trainer.replay_buffer = trainer.ema_model = trainer.actor_optim = None
    trainer.actor_scheduler = SimpleNamespace(get_last_lr=lambda: [0.0])
    return trainer


def training_step(trainer: Any, seed: int = 1) -> dict[str, torch.Tensor]:
    """Gradients of all parameters, where none else takes them, and metrics of a step."""
    from openrlhf.trainer.ppo_utils.experience import Experience

    sequences, attention, action, noise, advantages = batch(seed)
    near = -5.7 + 0.3 * noise  # about log 1/300
    experience = Experience(
        sequences=sequences, attention_mask=attention, action_mask=action, action_log_probs=near * action,
        base_action_log_probs=(near + 0.2) * action, rollout_log_probs=(near - 0.1) * action, advantages=advantages,
        info={},
    )  # fmt: skip
    status = trainer.training_step(experience, 0.1, 0)
    metrics = {n: v.detach() for n, v in status["metrics"].items() if isinstance(v, torch.Tensor) and v.dim() == 0}
    return gradients(trainer.actor) | metrics
