"""The adapter for the Hugging Face Trainer: SFT without logits."""

from __future__ import annotations

import pytest
import torch
import transformers

from pact_fast.errors import PactError
from pact_fast.integrations.hf_trainer import install
from tests.support.models import TINY

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ROWS = [{"input_ids": [(7 * i + j) % 512 for j in range(9 + i % 4)]} for i in range(24)]


def collate(rows):
    """Padded on the right; the first three labels of a row have no loss."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trainer(folder, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**TINY), dtype=dtype)
    settings = {
        "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": [], "use_cpu": True,
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "prediction_loss_only": True,
        "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0,
    }  # fmt: skip
    args = transformers.TrainingArguments(str(folder), **settings | changes)
    return transformers.Trainer(model, args, data_collator=collate, train_dataset=ROWS, eval_dataset=ROWS[:8])


def losses(host):
    return [entry["loss"] for entry in host.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 4, "gradient_checkpointing": True}, {"bf16": True}],
    ids=["plain", "accumulated", "bf16"],
)
def test_three_steps_end_where_the_models_own_loss_ends(options, tmp_path):
    own, ours = trainer(tmp_path, **options), trainer(tmp_path, **options)
    start = [p.detach().clone() for p in own.model.parameters()]
    install(ours)
    for host in (own, ours):
        host.train()
    bound = 5e-2 if options.get("bf16") else 1e-5
    torch.testing.assert_close(torch.tensor(losses(ours)), torch.tensor(losses(own)), rtol=bound, atol=0)
    for a, b, before in zip(ours.model.parameters(), own.model.parameters(), start, strict=True):
        moved = (b - before).norm()
        assert moved > 0 and (a - b).norm() <= bound * moved  # plain SGD: differences of gradients
    assert ours.evaluate()["eval_loss"] == pytest.approx(
        own.evaluate()["eval_loss"], rel=1e-2 if bound > 1e-4 else 1e-5
    )


def test_training_makes_no_logits_and_evaluation_runs_the_models_own_code(tmp_path, monkeypatch):
    host = trainer(tmp_path)
    remove = install(host)
    host.train()
    calls = []
    host.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    batch = collate(ROWS[:2])
    assert host.model.train()(**batch).logits is None and not calls
    assert host.model.eval()(**batch).logits is not None and len(calls) == 1
    assert host.model.generate(batch["input_ids"][:1], max_new_tokens=2, pad_token_id=0).shape[1] > 9
    host.save_model(str(tmp_path / "saved"))
    remove()
    assert host.model.train()(**batch).logits is not None


def test_generation_evaluation_and_saving_are_the_hosts_own_between_steps(tmp_path):
    own, ours = (trainer(tmp_path / name, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=2)
                 for name in ("own", "ours"))  # fmt: skip
    said: dict[str, list[list[int]]] = {"own": [], "ours": []}

    class Generate(transformers.TrainerCallback):
        def __init__(self, name):
            self.name = name

        def on_step_end(self, *_, model, **__):
            ids = torch.arange(5)[None] + 3
            answer = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
            said[self.name].append(answer[0].tolist())
            model.train()

    install(ours)
    for name, host in (("own", own), ("ours", ours)):
        host.add_callback(Generate(name))
        host.train()
    assert said["ours"] == said["own"] and len(said["own"]) == 3
    evaluated = [
        [entry["eval_loss"] for entry in host.state.log_history if "eval_loss" in entry] for host in (own, ours)
    ]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-5) and len(evaluated[0]) == 3
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours" / "checkpoint-3")
    torch.testing.assert_close(saved.state_dict(), ours.model.state_dict(), rtol=0, atol=0)
    resumed = trainer(tmp_path / "ours", max_steps=4, save_strategy="no")
    install(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-2"))
    assert resumed.state.global_step == 4


def test_a_broken_kernel_is_an_error_on_the_first_batch(tmp_path, monkeypatch):
    from pact_fast.kernels.head import cross_entropy

    op = cross_entropy.linear_cross_entropy_op
    monkeypatch.setattr(
        cross_entropy, "linear_cross_entropy_op", lambda *a, **k: (op(*a, **k)[0] * 1.01, *op(*a, **k)[1:])
    )
    host = trainer(tmp_path)
    install(host)
    with pytest.raises(PactError, match="the loss of the kernels and of the host's own code differ"):
        host.train()
    assert host.state.global_step == 0


def test_losses_of_logits_are_refused(tmp_path):
    with pytest.raises(PactError, match="need logits"):
        install(trainer(tmp_path, label_smoothing_factor=0.1))
