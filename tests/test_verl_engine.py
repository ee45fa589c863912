"""verl's real FSDP2 engine on the CPU: gradients, loss and metrics with our engines are those without."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("verl", reason="install verl (--no-deps) for the tests of its adapter")

from pact_fast.errors import PactError
from pact_fast.integrations import host_loss, verl_engine
from pact_fast.integrations.verl import register_engines
from tests.support import verl_engines
from tests.support.broken_kernels import break_kernels
from tests.support.processes import run_ranks
from tests.support.small_chunks import make_small_chunks

pytestmark = pytest.mark.slow
VENDORS = (None, "pact", "pact_tree")


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    verl_engines.use_the_cpu()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def make(group, tmp_path_factory) -> Any:
    """(vendor, options of the model) → engine, one of each; None: verl's own."""
    from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

    register_engines()
    register_engines()  # a second time changes nothing

    @functools.cache
    def engine(vendor: str | None, **options: Any) -> Any:
        tied = options.pop("tied", False)
        path = verl_engines.save_model(tmp_path_factory.mktemp("model"), tie_word_embeddings=tied)
        if vendor is None:
            return verl_engines.make_engine(FSDPEngineWithLMHead, path, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VERL_ENGINE_VENDOR", vendor)
            found = EngineRegistry.get_engine_cls("language_model", options.get("strategy", "fsdp2"))
        return verl_engines.make_engine(found, path, **options)

    return engine


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    make_small_chunks(monkeypatch)


def compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 6
    for name, expected in theirs.items():
        assert (ours[name] - expected).abs().max() <= 1e-5 * max(1e-6, expected.abs().max()), name


@pytest.mark.parametrize("vendor", VENDORS[1:])
@pytest.mark.parametrize(
    ("mode", "settings", "columns"),
    [
        ("vanilla", {"loss_agg_mode": "token-mean"}, {}),
        ("vanilla", {"loss_agg_mode": "seq-mean-token-sum", "entropy_coeff": 0.01}, {"entropy": True}),
        ("cispo", {"use_kl_loss": True, "kl_loss_coef": 0.1}, {"kl": True, "importance": True}),
        ("gspo", {"loss_agg_mode": "seq-mean-token-mean"}, {}),
        ("dppo_tv", {"use_kl_loss": True, "kl_loss_type": "k3+"}, {"kl": True}),
        ("clip_cov", {}, {}),
    ],
)
def test_steps_have_verls_gradients_loss_and_metrics(vendor, mode, settings, columns, make):
    loss = verl_engines.policy_loss(mode, **settings)
    theirs = verl_engines.step(make(None), verl_engines.batch(**columns), loss)
    engine = make(vendor)
    engine._pact_loss = host_loss.HostLoss()
    compare(verl_engines.step(engine, verl_engines.batch(**columns), loss), theirs)
    assert engine._pact_loss.token_wise == (mode != "gspo")
    compare(verl_engines.step(engine, verl_engines.batch(**columns), loss), theirs)


@pytest.mark.parametrize(
    "options", [{"use_remove_padding": False}, {"tied": True}, {"lora_rank": 4}, {"strategy": "fsdp"}]
)
def test_padded_batches_tied_heads_lora_and_fsdp1(options, make):
    loss, padding = verl_engines.policy_loss(), {"use_remove_padding": options.get("use_remove_padding", True)}
    theirs = verl_engines.step(make(None, **options), verl_engines.batch(**padding), loss)
    for vendor in VENDORS[1:]:
        compare(verl_engines.step(make(vendor, **options), verl_engines.batch(**padding), loss), theirs)


def test_supervised_steps(make):
    from verl.workers.utils.losses import sft_loss

    loss = functools.partial(sft_loss, config=None)
    theirs = verl_engines.step(make(None), verl_engines.supervised_batch(), loss)
    compare(verl_engines.step(make("pact"), verl_engines.supervised_batch(), loss), theirs)


@pytest.mark.parametrize("temperature", [0.8, torch.tensor([0.5, 0.7, 0.9, 1.1])])
def test_log_probs_of_the_old_policy(temperature, make):
    outputs = []
    for vendor in VENDORS:
        engine = make(vendor)
        data = verl_engines.batch(entropy=True, temperature=temperature)
        with engine.eval_mode():
            outputs.append(engine.infer_batch(data)["model_output"])
    lengths = [6, 4, 7, 2]
    for ours in outputs[1:]:
        for name in ("log_probs", "entropy"):
            for mine, expected, n in zip(ours[name].unbind(), outputs[0][name].unbind(), lengths, strict=True):
                assert (mine - expected)[-n - 1 : -1].abs().max() < 1e-5


def test_generation_export_and_saving_are_verls_own_between_steps(make, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    for name in ("get_rng_state", "set_rng_state"):  # verl asks the module of the device for them
        monkeypatch.setattr(torch.cpu, name, getattr(torch, name), raising=False)
    engine, loss = make("pact_tree"), verl_engines.policy_loss()
    first = verl_engines.step(engine, verl_engines.batch(), loss)
    plain = AutoModelForCausalLM.from_pretrained(engine.model_config.local_path).eval()  # no step moves a weight
    ids = torch.arange(6)[None] + 5
    said = [m.eval().generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (engine.module, plain)]
    assert torch.equal(*said)
    exported = dict(engine.get_per_tensor_param()[0])
    assert exported.keys() == plain.state_dict().keys()
    for name, weight in plain.state_dict().items():
        assert (exported[name].float() - weight).abs().max() <= 2**-8 * weight.abs().max(), name  # verl sends bf16
    engine.save_checkpoint(str(tmp_path), global_step=1)
    engine.load_checkpoint(str(tmp_path), del_local_after_load=False)
    compare(verl_engines.step(engine, verl_engines.batch(), loss), first)


def test_a_prompt_is_computed_once_and_groups_stay_together(make, monkeypatch):
    rows = []
    own = verl_engine.decoder_of
    monkeypatch.setattr(verl_engine, "decoder_of", lambda model: rows.append("packed") or own(model))
    from pact_fast.integrations import prompt_tree

    forward = prompt_tree.tree_forward
    monkeypatch.setattr(
        prompt_tree, "tree_forward", lambda model, batch: rows.append(len(batch.input_ids)) or forward(model, batch)
    )
    data = verl_engines.batch(use_dynamic_bsz=True, max_token_len_per_gpu=25)
    verl_engines.step(make("pact_tree"), data, verl_engines.policy_loss())
    assert sorted(rows) == [3 + 7 + 2, 5 + 6 + 4]  # two micro-batches, whose prompts have 5 and 3 tokens


def test_images_and_distillation_are_left_to_verl(make, caplog):
    from verl.utils import tensordict_utils as tu

    engine, data = make("pact"), verl_engines.batch()
    tu.assign_non_tensor(data, calculate_sum_pi_squared=True)
    verl_engine._warn_once.cache_clear()
    theirs = verl_engines.step(make(None), data.clone(), verl_engines.policy_loss())
    compare(verl_engines.step(engine, data.clone(), verl_engines.policy_loss()), theirs)
    assert "calculate_sum_pi_squared needs logits" in caplog.text


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_broken_kernel_is_an_error_on_the_first_batch(where, make, monkeypatch):
    engine = make("pact")
    break_kernels(monkeypatch, where)
    monkeypatch.setattr(engine, "_pact_checked", False, raising=False)
    with pytest.raises(PactError, match=r"verl's engine: (log-probs|gradients)"):
        verl_engines.step(engine, verl_engines.batch(), verl_engines.policy_loss())


def test_steps_of_two_ranks_have_verls_gradients(tmp_path):
    from tests.support import verl_ranks

    run_ranks(verl_ranks.steps, verl_engines.save_model(tmp_path))
