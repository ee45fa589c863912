"""LoRA with the embedded engine: trained weights, checkpoints, resuming and export."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from pact_fast.algorithms.registry import make_algorithm
from pact_fast.chat.rendering import make_renderer
from pact_fast.cli.main import main
from pact_fast.config import Config, LoraConfig, parse_config
from pact_fast.errors import PactError
from pact_fast.kernels import LossContext
from pact_fast.kernels.fingerprint import fingerprint
from pact_fast.model import lora
from pact_fast.model.adapter import adapter_tensors
from pact_fast.model.build import make_model, make_policy
from pact_fast.model.weights import checkpoint_weights
from pact_fast.rollout.embedded.engine import TransformersEngine
from pact_fast.rollout.engine import Request
from pact_fast.train.learner import Learner
from pact_fast.train.user_model import with_frozen_model
from tests.support.groups import make_groups, step_context_of
from tests.support.optional import needs
from tests.support.runs import TOKENIZERS

needs("peft", reason="needs the extra lora: pip install 'pact-fast[lora]'")

SETTINGS = {
    "model": {
        "random_init": {
            "model_type": "qwen3", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 1024,
        },
        "lora": {"r": 4, "alpha": 8.0},
        "tokenizer": str(TOKENIZERS["tiny"]),
    },
    "env": {"name": "lookup_chain"},
    "rollout": {"num_generations": 4, "max_turn_tokens": 8, "max_completion_length": 24, "max_prompt_length": 500},
    "trainer": {
        "max_steps": 2, "prompts_per_step": 2, "prompts_per_update": 1, "eval_tasks": 3, "save_steps": 1,
        "learning_rate": 1e-2,
    },
    "algorithm": {"beta": 0.05},
    "pretrain": {"steps": 2, "batch_size": 2},
    "threads": 1,
}  # fmt: skip


def recipe(folder: Path, pretrain: dict | None = SETTINGS["pretrain"], **model) -> Path:
    path = folder / "tiny.yaml"
    own = {"model": {**SETTINGS["model"], **model}, "pretrain": pretrain, "output_dir": str(folder / "run")}
    path.write_text(yaml.safe_dump({**SETTINGS, **own}))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    assert main(["train", str(recipe(folder))]) == 0
    return folder / "run"


def config_of(run: Path) -> Config:
    return parse_config(yaml.safe_load((run / "config.yaml").read_text()))


def tokenizer_of(run: Path):
    return AutoTokenizer.from_pretrained(run / "tokenizer")


def base_of(run: Path) -> Path | None:
    return run / "base" if (run / "base").exists() else None


def policy(run: Path, step: int | None = None) -> torch.nn.Module:
    checkpoint = run / f"checkpoints/step_{step}/model" if step else None
    return make_policy(config_of(run), tokenizer_of(run), base=base_of(run), checkpoint=checkpoint).eval()


def base(run: Path) -> torch.nn.Module:
    return make_model(config_of(run), tokenizer_of(run), path=base_of(run)).eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    model.set_attn_implementation("sdpa")  # trees and the embedded engine set their own
    return model(torch.arange(3, 40)[None]).logits[0]


def metrics(run: Path) -> list[dict]:
    """All records without values that depend on a clock."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("time/") and k != "tokens_per_second"} for r in records]


def test_only_adapters_train_and_are_saved(run):
    folder = run / "checkpoints/step_2"
    assert {p.name for p in (folder / "model").glob("*.safetensors")} == {"adapter_model.safetensors"}
    start, end = policy(run), policy(run, 2)
    moved = {name for name, p in end.named_parameters() if not torch.equal(p, start.state_dict()[name])}
    assert moved == {name for name, p in end.named_parameters() if p.requires_grad}
    assert len(moved) == 2 * 2 * 7 and all(".lora_" in name for name in moved)
    from safetensors import safe_open

    with safe_open(folder / "optimizer.safetensors", "pt") as optimizer:
        assert {name.rpartition("/")[0] for name in optimizer.keys()} == moved  # noqa: SIM118


def test_the_reference_is_the_model_without_its_adapters(run):
    config, plain, model = config_of(run), base(run), policy(run, 2)
    renderer = make_renderer(config.model, tokenizer_of(run))
    groups = make_groups(renderer, config.algorithm, prompts=2, rollouts=2)
    algorithm = make_algorithm(config.algorithm)
    batches = [algorithm.prompt_batch(group, step_context_of(renderer, config.algorithm, groups)) for group in groups]

    def of_reference(reference) -> np.ndarray:
        Learner(model, config.trainer, make_algorithm(config.algorithm), total_updates=1, reference=reference).prepare(
            batches
        )
        return np.concatenate([s.ref_logprob for b in batches for s in b.scored if s.context != LossContext.EXPERT])

    trained = logits(model)
    assert np.array_equal(of_reference(model), of_reference(plain))
    assert torch.equal(logits(model), trained)
    assert not torch.equal(trained, logits(base(run)))
    assert all(p.requires_grad for p in adapter_tensors(model).values())
    assert any(v > 0 for r in metrics(run) for k, v in r.items() if k.endswith("/kl"))


def test_saved_adapters_that_are_merged_compute_what_they_do_beside_the_weights(run):
    merged = base(run)
    lora.merge_saved(merged, run / "checkpoints/step_2/model")
    torch.testing.assert_close(logits(merged), logits(policy(run, 2)), rtol=0, atol=1e-5)
    assert (logits(merged) - logits(base(run))).abs().max() > 1e-3  # and they do something


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"use_dora": True}, "use use_dora"), ({"r": 0}, "cannot be read"), ({"lora_alpha": None}, "cannot be read")],
)
def test_adapters_of_another_kind_are_not_merged(run, tmp_path, settings, message):
    folder = tmp_path / "adapter"
    shutil.copytree(run / "checkpoints/step_2/model", folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(PactError, match=message):
        lora.merge_saved(base(run), folder)


def test_adapters_of_another_model_are_not_merged(run):
    config = config_of(run)
    assert config.model.random_init
    config.model.random_init["intermediate_size"] = 64
    with pytest.raises(PactError, match=r"do not fit the model: .*its own base model"):
        lora.merge_saved(make_model(config, tokenizer_of(run)), run / "checkpoints/step_2/model")


def test_a_resumed_run_ends_with_the_same_bits(run, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints/step_2")
    assert main(["train", str(run.parent / "tiny.yaml"), f"output_dir={again}", "resume=auto"]) == 0
    assert metrics(again) == metrics(run)
    for name in ("model/adapter_model.safetensors", "optimizer.safetensors"):
        ours, theirs = ((r / "checkpoints/step_2" / name).read_bytes() for r in (again, run))
        assert ours == theirs


def test_peft_loads_a_checkpoint(run):
    import peft

    theirs = peft.PeftModel.from_pretrained(base(run), run / "checkpoints/step_2/model").eval()
    assert torch.equal(logits(theirs), logits(policy(run, 2)))


def test_export_writes_merged_weights_that_transformers_loads(run, tmp_path, capsys):
    out = tmp_path / "some/where"
    assert main(["export", str(run), str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    loaded, ours = AutoModelForCausalLM.from_pretrained(out), policy(run, 2)
    assert (logits(loaded.eval()) - logits(ours)).abs().max() <= 1e-5
    assert (logits(loaded) - logits(base(run))).abs().max() > 1e-3
    assert sorted(loaded.state_dict()) == sorted(base(run).state_dict())
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer_of(run).chat_template
    assert main(["export", str(run), str(out)]) == 2 and "exists" in capsys.readouterr().err


def test_weights_that_come_from_the_seed_are_found_again(tmp_path):
    assert main(["train", str(recipe(tmp_path, pretrain=None)), "trainer.max_steps=1"]) == 0
    run, out = tmp_path / "run", tmp_path / "out"
    assert base_of(run) is None and main(["export", str(run), str(out)]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    assert (logits(loaded) - logits(policy(run, 1))).abs().max() <= 1e-5


@pytest.mark.slow
def test_export_without_adapters_is_the_checkpoint(tmp_path, capsys):
    assert main(["train", str(recipe(tmp_path, lora=None)), "trainer.max_steps=1"]) == 0
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["export", str(run), str(out)]) == 0
    saved = AutoModelForCausalLM.from_pretrained(run / "checkpoints/step_1/model").state_dict()
    ours = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert saved.keys() == ours.keys() and all(torch.equal(saved[k], ours[k]) for k in saved)


def test_export_needs_a_checkpoint(tmp_path, capsys):
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "config.yaml" in capsys.readouterr().err


def test_a_run_can_be_evaluated_and_sampled_from(run, tmp_path, capsys):
    assert main(["eval", str(run), "trainer.eval_tasks=2"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"] == 2
    out = tmp_path / "rollouts.jsonl"
    assert main(["rollout", str(run), "--tasks", "2", "--out", str(out)]) == 0
    assert len(out.read_text().splitlines()) == 2


def sampled(model) -> tuple[list[int], list[float]]:
    engine = TransformersEngine(model.eval(), [0])
    engine.submit(Request(0, np.arange(3, 40), 16, (1,)))
    while not (done := engine.step()):
        pass
    return done[0].ids.tolist(), done[0].logprobs.tolist()


def test_the_embedded_engine_samples_with_the_adapters_however_they_were_put_on(run):
    ours = sampled(policy(run, 2))
    import peft

    wrapped = peft.PeftModel.from_pretrained(base(run), run / "checkpoints/step_2/model")
    assert sampled(wrapped) == ours
    assert sampled(base(run))[1] != ours[1]


@pytest.mark.parametrize("side", ["agent", "user"])
def test_the_other_side_of_a_dialogue_is_played_by_a_frozen_adapter(run, side):
    """Beside a policy with adapters of its own: each samples as it does alone, and updates reach the policy."""
    saved = run / "checkpoints/step_2/model"
    plays = {"user": "model", "user_model": str(saved)}
    if side == "user":
        plays = {"user": "policy", "train_as": "user", "agent_model": str(saved)}
    config = config_of(run)
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update=plays)})
    renderer, device = make_renderer(config.model, tokenizer_of(run)), torch.device("cpu")
    own = TransformersEngine(policy(run).eval(), [0])
    engine = with_frozen_model(own, config, tokenizer_of(run), renderer, run, device=device, autocast=None)
    for session, user in enumerate((False, True)):
        engine.submit(Request(session, np.arange(3, 40), 16, (1,), user=user))
    done = {}
    while len(done) < 2:
        done |= {completion.session: completion for completion in engine.step()}
    trained, frozen = (done[1], done[0]) if side == "user" else (done[0], done[1])
    for found, alone in ((trained, policy(run)), (frozen, policy(run, 2))):
        ids, logprobs = sampled(alone)
        n = min(len(ids), len(found.ids))  # the stop tokens of the two differ
        assert found.ids[:n].tolist() == ids[:n] and n > 4
        np.testing.assert_allclose(found.logprobs[:n], logprobs[:n], atol=1e-5)
    engine.update_weights(policy(run, 1), 7)
    assert engine.version == 7 and engine.frozen.version != 7


def test_weights_for_engines_are_those_under_the_adapters(run):
    expected = {name: fingerprint(tensor) for name, tensor in checkpoint_weights(base(run))}
    assert {name: fingerprint(tensor) for name, tensor in checkpoint_weights(policy(run, 2))} == expected


def test_gradient_checkpointing_changes_nothing(run, tmp_path):
    path = recipe(tmp_path, gradient_checkpointing=True)
    assert main(["train", str(path), "trainer.max_steps=1"]) == 0
    ours, theirs = (adapter_tensors(policy(r, 1)) for r in (tmp_path / "run", run))
    assert all((ours[name] - theirs[name]).abs().max() <= 1e-6 for name in ours)


@pytest.mark.parametrize("modules, hint", [(["nope"], "nope"), (["lm_head"], "head"), (["embed_tokens"], "embedding")])
def test_layers_that_cannot_be_adapted_are_refused(run, modules, hint):
    with pytest.raises(PactError, match=rf"model.lora.target_modules.*{hint}"):
        lora.attach(base(run), LoraConfig(target_modules=modules), 0)


def test_adapters_of_another_run_are_refused(run):
    other = base(run)
    lora.attach(other, LoraConfig(r=2), 0)
    with pytest.raises(PactError, match=r"do not fit model\.lora"):
        lora.load(other, run / "checkpoints/step_2/model")


def test_without_peft_the_error_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(PactError, match=r"pip install 'pact-fast\[lora\]'"):
        lora.attach(base(run), LoraConfig(), 0)


def test_doctor_counts_what_trains(run, capsys):
    assert main(["doctor", str(run.parent / "tiny.yaml")]) == 0
    assert "of them in adapters" in capsys.readouterr().out
