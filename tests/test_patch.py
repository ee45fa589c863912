"""Kernels patched into real decoders (norms, gated MLPs, rotary): which modules, for how long, and with which results."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pact_fast.kernels.runtime import build
from pact_fast.model import recognition
from pact_fast.model.build import enable_gradient_checkpointing
from pact_fast.model.patch import fused_kernels, without_fused_kernels
from tests.support.memory import decoder_step, peak_bytes
from tests.support.models import KINDS, make
from tests.support.trees import as_tree, gradients, trees

NORMS = {"qwen2": 5, "qwen3": 9, "qwen3_moe": 9, "llama": 5, "mistral": 5, "phi3": 5}  # in two layers
GATED = {"qwen2": 2, "qwen3": 2, "llama": 2, "mistral": 2, "olmo2": 2}


@pytest.fixture(autouse=True)
def kernel():
    if (status := build.status()) != "ready":
        pytest.skip(f"no C++ library: {status}")


def changed(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.modules() if "forward" in vars(m)]


@pytest.mark.parametrize("kind", KINDS)
def test_modules_that_compute_what_the_kernels_do_are_served_while_it_lasts(kind):
    model = make(kind)
    with fused_kernels(model):
        names = changed(model)
        assert sum(name.endswith("Norm") for name in names) == NORMS.get(kind, 0)
        assert sum(name.endswith("MLP") for name in names) == GATED.get(kind, 0)
    assert not changed(model)
    with pytest.raises(KeyError), fused_kernels(model):
        raise KeyError
    assert not changed(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_as_good_as_without(kind, dtype):
    forest = trees()
    truth = gradients(model := make(kind), as_tree(model, forest))
    error = []
    for context in (nullcontext, without_fused_kernels):
        model = make(kind).to(dtype)
        with context():
            error.append((gradients(model, as_tree(model, forest)) - truth).norm())
    assert error[0] <= 2 * error[1] + torch.finfo(dtype).eps * truth.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_rotary_functions_are_served_while_it_lasts(kind):
    model = make(kind)
    code = vars(sys.modules[type(model).__module__])
    own = code["apply_rotary_pos_emb"]
    with fused_kernels(model):
        assert code["apply_rotary_pos_emb"] is not own
    assert code["apply_rotary_pos_emb"] is own


def test_a_rotary_embedding_of_part_of_a_head_goes_the_models_own_way():
    model = make("phi3")
    code = vars(sys.modules[type(model).__module__])
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    cos, sin = torch.randn(2, 1, 5, 4)
    own = code["apply_rotary_pos_emb"](q, k, cos, sin)
    with fused_kernels(model):
        assert all(map(torch.equal, code["apply_rotary_pos_emb"](q, k, cos, sin), own))


def test_a_rotary_function_that_turns_pairs_is_left_alone():
    """As some models lay out a head: one number's partner is its neighbour."""

    def neighbours(q, k, cos, sin):
        turned = [torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) for x in (q, k)]
        return tuple(x * cos[:, None] + y * sin[:, None] for x, y in zip((q, k), turned, strict=True))

    assert not recognition.is_rotary(neighbours)


def test_a_probe_on_fake_tensors_is_not_remembered():
    """The first model that a process sees may be one of sizes alone (estimate/update_trace.py)."""
    recognition.forget()
    model = make("qwen3")
    with FakeTensorMode(), fused_kernels(model):
        pass
    with fused_kernels(model):
        assert len(changed(model)) == NORMS["qwen3"] + GATED["qwen3"]


def test_the_kernels_run_forward_and_backward():
    """The check that anything is served at all."""
    model = make("qwen3").bfloat16()
    with torch.profiler.profile() as profile:
        as_tree(model, trees()).backward()
    names = {event.key for event in profile.key_averages()}
    assert {f"pact_fast::{name}{end}" for name in ("rms_norm", "silu_mul") for end in ("", "_backward")} <= names
    assert "pact_fast::rotary" in names and not {"aten::rsqrt", "aten::silu", "aten::neg"} & names


def test_autocast_serves_each_in_its_own_dtype():
    """Norms stay fp32 there, and gates are bf16."""
    forest = trees()
    truth = gradients(model := make("qwen3"), as_tree(model, forest))
    error = []
    for context in (nullcontext, without_fused_kernels):
        model = make("qwen3").float()
        with context(), torch.autocast("cpu", torch.bfloat16):
            total = as_tree(model, forest)
        error.append((gradients(model, total) - truth).norm())
    assert error[0] <= 2 * error[1]


class Shifted(nn.Module):
    """A norm by its parts, but with another formula, like Gemma's."""

    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.zeros(8)), 1e-6

    def forward(self, x):
        return (1.0 + self.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class Gated(nn.Module):
    def __init__(self, act_fn: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8) for _ in range(3))
        self.act_fn = act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class ClampedUp(Gated):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(max=7.0))


class ClampedGate(Gated):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(min=-7.0)) * self.up_proj(x))


class Scaled(Gated):
    factor = 1.0

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * self.factor


def test_modules_that_only_look_alike_are_left_alone():
    gated = [kind(nn.SiLU()) for kind in (ClampedUp, ClampedGate, Scaled, Gated)]
    model = nn.ModuleList([Shifted(), Gated(nn.GELU()), *gated])
    with fused_kernels(model):
        assert ["forward" in vars(m) for m in model] == [False] * 5 + [True]


def test_a_forward_that_was_replaced_before_stays():
    model = Gated(nn.SiLU())
    model.forward = other = lambda x: x
    with fused_kernels(nn.ModuleList([model])):
        assert model.forward is other
    assert model.forward is other


def test_hooks_and_adapters_inside_are_called():
    model, x = Gated(nn.SiLU()), torch.randn(3, 8)
    model.gate_proj.register_forward_hook(lambda module, args, out: out + 1.0)
    seen = []
    model.register_forward_hook(lambda module, args, out: seen.append(out))
    expected = model(x)
    with fused_kernels(nn.ModuleList([model])):
        torch.testing.assert_close(model(x), expected)
    assert len(seen) == 2


def test_gradient_checkpointing_is_left_alone():
    """The layers run again after the context has ended, and have to save the same tensors then."""
    model = make("qwen3").float().train()
    enable_gradient_checkpointing(model)
    with fused_kernels(model):
        assert not changed(model)
    model.gradient_checkpointing_disable()
    with fused_kernels(model):
        assert changed(model)


def test_a_decoder_on_another_device_is_left_alone():
    model = make("qwen3").to("meta")
    with fused_kernels(model):
        assert not changed(model)


def test_a_decoder_in_bf16_holds_less():
    """The chain keeps every norm's input a second time, in fp32."""
    step = decoder_step(torch.bfloat16)
    ours = peak_bytes(step)
    with without_fused_kernels():
        assert ours < 0.9 * peak_bytes(step)
