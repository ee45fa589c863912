"""verl's real fused head: gradients with the adapter are those without."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

pytest.importorskip("verl", reason="install verl (--no-deps) for the tests of its adapter")

import hydra
import verl
from transformers import Qwen3Config, Qwen3ForCausalLM
from verl.models.transformers.dense_common import forward_with_torch_backend
from verl.utils.experimental.torch_functional import FusedLinearForPPO

from pact_fast.errors import PactError
from pact_fast.integrations import verl as adapter
from pact_fast.integrations.verl import install
from tests.support import verl_plugin
from tests.support.processes import run_ranks

ROOT = Path(__file__).parents[1]


@pytest.fixture
def installed():
    remove = install()
    yield
    remove()


def head_step(shape: tuple[int, ...], temperature: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, 32, generator=generator, requires_grad=True)
    weight = torch.randn(300, 32, generator=generator, requires_grad=True)
    ids = torch.randint(0, 300, shape, generator=generator)
    logprob, entropy = FusedLinearForPPO()(hidden, weight, ids, temperature)
    assert logprob.shape == entropy.shape == shape
    upstream = torch.randn(2, *shape, generator=generator)
    ((logprob * upstream[0]).sum() + 0.1 * (entropy * upstream[1]).sum()).backward()
    return [logprob.detach(), entropy.detach(), hidden.grad, weight.grad]


@pytest.mark.parametrize("shape", [(7,), (2, 5), (1, 600)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_head_has_verls_results_and_gradients(shape, temperature):
    theirs = head_step(shape, temperature)
    remove = install()
    try:
        ours = head_step(shape, temperature)
    finally:
        remove()
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    for a, b in zip(head_step(shape, temperature), theirs, strict=True):
        assert torch.equal(a, b)


def test_a_model_has_verls_gradients():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    ids = torch.randint(0, 300, (2, 9))

    def step() -> dict[str, torch.Tensor]:
        out = forward_with_torch_backend(model, input_ids=ids, return_dict=True, temperature=0.8)
        (out.log_probs[:, 3:-1].sum() - 0.01 * out.entropy[:, 3:-1].sum()).backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        return found

    theirs = step()
    remove = install()
    try:
        ours = step()
    finally:
        remove()
    for name, expected in theirs.items():
        assert (ours[name] - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def test_bf16_keeps_fp32_log_probs(installed):
    hidden, weight, ids = torch.randn(50, 64), torch.randn(3000, 64), torch.randint(0, 3000, (50,))
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    logprob, entropy = FusedLinearForPPO()(hidden, weight, ids)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(1, ids[:, None])[:, 0]
    assert logprob.dtype == torch.float32 and entropy.dtype == torch.bfloat16
    assert (logprob - exact).abs().max() < 1e-4


def test_a_broken_kernel_is_an_error_on_the_first_batch(installed, monkeypatch):
    from pact_fast.integrations import self_check

    own = self_check.linear_logprob

    def broken(*args, **options):
        out = own(*args, **options)
        return type(out)(out.logprob * 1.01, out.entropy, out.statistics)

    monkeypatch.setattr(self_check, "linear_logprob", broken)
    with pytest.raises(PactError, match="verl: log-probs"):
        head_step((7,), 1.0)
    assert adapter.HOST == "verl"


@pytest.mark.slow  # a process of its own
def test_verl_loads_the_plugin_that_the_environment_names():
    run_ranks(verl_plugin.check_head, {"VERL_USE_EXTERNAL_MODULES": "pact_fast.integrations.verl_plugin"}, ranks=1)


@pytest.mark.slow  # a process of its own
def test_the_examples_settings_are_verls_and_choose_our_engine():
    text = (ROOT / "examples" / "verl_ppo.sh").read_text("utf-8")
    words = shlex.split(text[text.index("-m verl.trainer.main_ppo") :].replace("\\\n", " "))
    settings = [word for word in words if "=" in word]
    assert len(settings) > 10
    config = Path(verl.__file__).parent / "trainer" / "config"
    with hydra.initialize_config_dir(str(config), version_base=None):
        found = hydra.compose("ppo_trainer", settings).actor_rollout_ref
    assert found.actor.use_prefix_grouper and found.rollout.n == 8 and found.actor.strategy == "fsdp2"
    variables = dict(re.findall(r"^export (\w+)=(\S+)", text, re.M))
    run_ranks(verl_plugin.check_engine, variables, "Engine_pact_tree", ranks=1)
