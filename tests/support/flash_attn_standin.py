"""The four functions of flash-attn that OpenRLHF imports, in plain torch, for machines without that package."""

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest
import torch


def unpad_input(hidden, attention_mask):
    """hidden [B, L, ...] → ([N, ...], indices [N], cumulated lengths [B + 1], longest, lengths [B])."""
    lengths = attention_mask.sum(-1, dtype=torch.int32)
    indices = attention_mask.flatten().nonzero().flatten()
    cumulated = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return hidden.flatten(0, 1)[indices], indices, cumulated, int(lengths.max()), lengths


def pad_input(hidden, indices, batch, length):
    padded = hidden.new_zeros(batch * length, *hidden.shape[1:])
    return padded.index_put((indices,), hidden).view(batch, length, *hidden.shape[1:])


def index_first_axis(values, indices):
    return values[indices]


def rearrange(values, pattern):
    assert pattern == "b s ... -> (b s) ...", pattern
    return values.flatten(0, 1)


def openrlhf_models() -> ModuleType:
    """openrlhf.models. Skips the tests of the module that asks if there is none."""
    if "flash_attn" not in sys.modules and not importlib.util.find_spec("flash_attn"):
        _install()
    pytest.importorskip("openrlhf", reason="pip install --no-deps openrlhf pylatexenc for the tests of its adapter")
    return importlib.import_module("openrlhf.models")


def ppo_trainer() -> type:
    """openrlhf's ActorPPOTrainer. Its package imports vLLM for two functions that are not called here."""
    name = "openrlhf.trainer.ray.vllm_engine"
    if name not in sys.modules and not importlib.util.find_spec("vllm"):
        module = ModuleType(name)
        vars(module).update({"batch_vllm_engine_call": None, "create_vllm_engines": None})
        sys.modules[name] = module
    return importlib.import_module("openrlhf.trainer.ray.ppo_actor").ActorPPOTrainer


def _install() -> None:
    """Make these functions importable as flash_attn."""
    contents = {
        "flash_attn": {},
        "flash_attn.utils": {},
        "flash_attn.utils.distributed": {"all_gather": None},
        "flash_attn.bert_padding": {f.__name__: f for f in (unpad_input, pad_input, index_first_axis, rearrange)},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        module.__spec__ = importlib.util.spec_from_loader(name, None)
        vars(module).update(attributes)
        sys.modules[name] = module
