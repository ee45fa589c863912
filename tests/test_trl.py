"""The adapter for TRL in its real trainers: gradients are those of TRL's own code, and a broken kernel is an error."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pact_fast.errors import PactError
from pact_fast.integrations import trl_loss
from pact_fast.integrations.trl import install
from pact_fast.tree import tree_forward
from tests.support.optional import needs
from tests.support.processes import environment, run_ranks
from tests.support.trl_trainers import (
    compare_steps,
    dpo_trainer,
    grpo_trainer,
    rloo_trainer,
    sft_trainer,
    tiny_model,
)

needs("trl", reason="install trl for the tests of its adapter")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ACCUMULATED = {"gradient_accumulation_steps": 4, "gradient_checkpointing": True}
CAST = {"cast_lm_head_to_fp32": True}


def lora(*targets: str, **options):
    import peft

    return peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj", *targets], init_lora_weights=False, **options)


def check_steps(trainer, mode, served, bound=1e-5):
    """Three steps; every micro-batch is computed by TRL's own code, too."""
    installed = install(trainer, mode)
    assert installed.served.keys() == set(served.split()) and not installed.reasons
    differences = compare_steps(trainer)
    assert len(differences) == 3 * trainer.args.gradient_accumulation_steps
    assert max(differences) < bound, differences


LOSSES: dict[str, dict] = {
    "dapo": {},
    "grpo": ACCUMULATED,
    "sapo": {"use_bias_correction_kl": False, "entropy_coef": 0.0},
    "cispo": {"epsilon_high": 5.0, "num_iterations": 2, **CAST},
    "dr_grpo": {"delta": 1.5, "num_iterations": 2, "beta": 0.0},
    "bnpo": {"steps_per_generation": 2, "entropy_target": 5.0, "use_adaptive_entropy": True},
    "luspo": {"mask_truncated_completions": True},
}
# The mode tree computes loss and head as the mode loss does. The mode head leaves the loss to TRL: what differs there
# is whether an entropy is asked for and in which dtype.
PAIRS = [("tree", name) for name in LOSSES]
PAIRS += [("loss", name) for name in ("dapo", "grpo", "cispo", "bnpo")] + [("head", name) for name in ("sapo", "cispo")]


@pytest.mark.parametrize(("mode", "loss"), PAIRS)
def test_steps_of_grpo_have_the_gradients_of_trls_own_code(mode, loss, tmp_path):
    trainer = grpo_trainer(tmp_path, per_device_train_batch_size=8, loss_type=loss, **LOSSES[loss])
    served = {"head": "head", "loss": "head loss", "tree": "head loss tree"}[mode]
    check_steps(trainer, mode, served)


@pytest.mark.parametrize("mode", ["loss", "tree"])
def test_grpo_with_lora_checkpointing_and_accumulation(mode, tmp_path):
    check_steps(grpo_trainer(tmp_path, lora(), **ACCUMULATED), mode, "head loss" + " tree" * (mode == "tree"))


@pytest.mark.parametrize("options", [{}, ACCUMULATED], ids=["plain", "accumulated"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_steps_of_sft_have_the_gradients_of_trls_own_code(adapter, options, tmp_path):
    check_steps(sft_trainer(tmp_path, lora() if adapter else None, **options), "loss", "head loss")


def test_a_loss_of_sft_that_weighs_tokens_differently_keeps_the_head(tmp_path):
    trainer = sft_trainer(tmp_path, loss_type="dft")
    installed = install(trainer)
    assert installed.served.keys() == {"head"} and "weights depend on the model" in installed.reasons["loss"]
    assert max(compare_steps(trainer)) < 1e-5


@pytest.mark.parametrize("make", [rloo_trainer, dpo_trainer])
def test_the_head_serves_other_trainers(make, tmp_path):
    trainer = make(tmp_path)
    installed = install(trainer)
    assert installed.served.keys() == {"head"} and "has no loss of ours" in installed.reasons["loss"]
    assert max(compare_steps(trainer)) < 1e-5


def test_steps_of_two_ranks_under_zero3_have_the_gradients_of_trls_own_code(tmp_path):
    from tests.support import trl_ranks

    tiny_model().save_pretrained(tmp_path / "model")
    run_ranks(trl_ranks.steps, tmp_path)


def test_bf16_steps_differ_by_the_roundings_of_trls_own_head(tmp_path):
    """TRL rounds its logits to bf16; ours come from the fp32 accumulator."""
    for mode in ("loss", "tree"):
        trainer = grpo_trainer(tmp_path, lora(), bf16=True, **ACCUMULATED)
        check_steps(trainer, mode, "head loss" + " tree" * (mode == "tree"), bound=0.1)


def test_a_head_that_peft_trains_as_a_whole_gets_trls_gradients(tmp_path):
    """LoRA on the head is refused by TRL itself."""
    import peft

    adapter = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["lm_head"])
    check_steps(grpo_trainer(tmp_path, adapter), "loss", "head loss")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"importance_sampling_level": "sequence"}, "a ratio per sequence"),
        ({"loss_type": "vespo"}, "loss_type='vespo'"),
        ({"top_entropy_quantile": 0.5}, "a mask depends"),
    ],
    ids=["sequence", "vespo", "entropy mask"],
)
def test_losses_of_whole_sequences_are_left_to_trl_on_our_head(options, reason, tmp_path):
    trainer = grpo_trainer(tmp_path, **options)
    installed = install(trainer, "tree")
    assert installed.served.keys() == {"head"} and reason in installed.reasons["loss"]
    assert max(compare_steps(trainer)) < 1e-5


def test_completions_of_a_prompt_stay_together_in_micro_batches(tmp_path):
    for mode, distinct in (("loss", False), ("tree", True)):
        trainer = grpo_trainer(tmp_path, gradient_accumulation_steps=4)
        install(trainer, mode)
        prompts = []
        step = trainer._compute_loss
        trainer._compute_loss = lambda model, inputs, step=step, found=prompts: (
            found.append(len(inputs["prompt_ids"].unique(dim=0))),
            step(model, inputs),
        )[1]
        trainer.train()
        assert (set(prompts) == {1}) is distinct


def test_generation_evaluation_and_saving_are_the_hosts_own_between_steps(tmp_path):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "num_generations": 2,
    }
    for mode in ("loss", "tree"):
        trainer = grpo_trainer(tmp_path / mode, evaluate=True, gradient_checkpointing=True, **settings)
        installed = install(trainer, mode)
        trainer.train()
        assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 3
        assert (tmp_path / mode / "checkpoint-3" / "model.safetensors").exists()
        installed.remove()
        assert "_compute_loss" not in vars(trainer) and not hasattr(trainer.model.forward, "own")
        trainer.evaluate()
    trainer = sft_trainer(tmp_path / "sft", **{k: v for k, v in settings.items() if k != "num_generations"})
    install(trainer)
    trainer.train()
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 3


def scaled(function, position, factor):
    """`function` with one of its results multiplied, as a broken kernel would return it."""

    def broken(*args, **options):
        result = function(*args, **options)
        changed = [value * factor if i == position else value for i, value in enumerate(result)]
        return type(result)(*changed) if hasattr(result, "_fields") else tuple(changed)

    return broken


def break_logprob(monkeypatch):
    from pact_fast.kernels.head import logprob

    monkeypatch.setattr(logprob, "linear_logprob_op", scaled(logprob.linear_logprob_op, 0, 1.01))


def break_gradient(monkeypatch):
    from pact_fast.kernels.head import logprob

    monkeypatch.setattr(logprob, "linear_logprob_backward_op", scaled(logprob.linear_logprob_backward_op, 0, 1.01))


def break_weight_gradient(monkeypatch):
    from pact_fast.kernels.head import logprob

    monkeypatch.setattr(logprob, "linear_logprob_backward_op", scaled(logprob.linear_logprob_backward_op, 1, 1.01))


def break_entropy(monkeypatch):
    from pact_fast.kernels.head import loss

    monkeypatch.setattr(loss, "run_pact_loss", scaled(loss.run_pact_loss, 2, 1.01))


def break_tree(monkeypatch):
    from pact_fast.integrations import prompt_tree

    monkeypatch.setattr(prompt_tree, "tree_forward", lambda *args: tree_forward(*args).flip(-1))


def break_formula(monkeypatch):
    own = trl_loss.loss_of_token

    def broken(*arguments):
        loss = own(*arguments)
        return lambda logprob, entropy, index: 1.01 * loss(logprob, entropy, index)

    monkeypatch.setattr(trl_loss, "loss_of_token", broken)


@pytest.mark.parametrize(
    ("make", "mode", "breaks", "what"),
    [
        (sft_trainer, "head", break_logprob, "log-probs"),
        (sft_trainer, "loss", break_gradient, "gradients of hidden states"),
        (grpo_trainer, "head", break_weight_gradient, "gradients of the head"),
        (grpo_trainer, "loss", break_entropy, "entropies"),
        (grpo_trainer, "loss", break_formula, "(the loss|derivatives by log-probs)"),
        (grpo_trainer, "tree", break_tree, "log-probs"),
    ],
    ids=["log-probs", "hidden", "weight", "entropies", "formula", "tree"],
)
def test_a_broken_kernel_is_an_error_on_the_first_batch(make, mode, breaks, what, tmp_path, monkeypatch):
    trainer = make(tmp_path)
    install(trainer, mode)
    breaks(monkeypatch)
    with pytest.raises(PactError, match=f"{what} of the kernels and of the host's own code differ") as caught:
        trainer.train()
    assert trainer.state.global_step == 0 and "\n" not in str(caught.value)


def test_dropout_is_the_same_for_both_and_trees_are_left_out(tmp_path):
    trainer = grpo_trainer(tmp_path, lora(lora_dropout=0.3), disable_dropout=False)
    installed = install(trainer, "tree")
    assert installed.served.keys() == {"head", "loss"} and "has dropout" in installed.reasons["tree"]
    assert max(compare_steps(trainer)) < 1e-5
    trainer = sft_trainer(tmp_path, lora(lora_dropout=0.3))
    install(trainer)
    assert max(compare_steps(trainer)) < 1e-5


def test_unsupported_settings_are_an_error_when_it_is_installed(tmp_path):
    trainer = sft_trainer(tmp_path)
    with pytest.raises(PactError, match="mode='fast' is unknown"):
        install(trainer, "fast")
    install(trainer)
    with pytest.raises(PactError, match="install once"):
        install(trainer)


def test_torch_transformers_and_trl_are_enough():
    """In an environment without the trainer's other packages."""
    blocked = {"deepspeed", "scipy", "pyarrow", "tensorboard", "httpx", "pydantic", "peft", "wandb", "vllm", "jinja2"}
    hide = (
        "import sys\nfrom importlib.machinery import PathFinder\n"
        "class Hiding(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        f"        return None if name.partition('.')[0] in {blocked!r} else super().find_spec(name, path, target)\n"
        "sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding\n"
    )
    code = (
        hide + "from pact_fast.integrations import hf_trainer, trl, trl_grpo\nfrom pact_fast.tree import tree_forward\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
