"""Installation of adapters, and their comparison with the host's own code on the first batch."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from pact_fast.errors import PactError
from pact_fast.integrations.fused_forward import replace_forward
from pact_fast.integrations.self_check import check_head
from pact_fast.kernels import Head, head_of
from tests.support.models import make

HIDDEN = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def layer() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(8, 19, bias=False)


def check(layer: torch.nn.Linear, weight: torch.Tensor, tokens: int) -> list[int]:
    """Rows of the calls of `layer`."""
    rows: list[int] = []
    layer.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    at = torch.arange(tokens)
    check_head(layer, Head(weight), HIDDEN, at, at, 0.7, "host")
    return rows


def test_without_a_token_the_layer_runs_as_on_ranks_that_have_some(layer):
    """Its hooks may gather a weight that is split over the ranks."""
    assert check(layer, layer.weight, 0) == [0] and check(layer, layer.weight, 3)[-1] == 3


def test_the_layer_runs_after_the_last_use_of_its_weight(layer):
    """ZeRO-3 gathers it for the layer's own forward, and releases it then."""
    whole = layer.weight.data

    def set_weight(data):
        layer.weight.data = data

    layer.register_forward_pre_hook(lambda *_: set_weight(whole))
    layer.register_forward_hook(lambda *_: set_weight(whole.new_empty(0)))
    check(layer, layer.weight, 3)
    assert not layer.weight.numel()


def test_another_weight_than_that_of_the_layer_is_an_error(layer):
    with pytest.raises(PactError, match="host: log-probs"):
        check(layer, layer.weight * 1.5, 3)


@pytest.mark.slow  # DeepSpeed looks for compilers
def test_a_model_that_zero3_partitioned_when_it_was_loaded_is_gathered_to_install(monkeypatch):
    pytest.importorskip("deepspeed", reason="install deepspeed for models that ZeRO-3 partitions")
    model = make("llama")
    weight = model.lm_head.weight
    whole, weight.ds_shape = weight.data, weight.shape

    @contextmanager
    def gathered(parameters):
        assert [id(p) for p in parameters] == [id(weight)]
        weight.data = whole
        yield
        weight.data = whole.new_empty(0)

    monkeypatch.setattr("deepspeed.runtime.zero.GatheredParameters", gathered)
    weight.data = whole.new_empty(0)
    remove = replace_forward(model, lambda causal_lm, before: lambda *args, **options: "ours")
    assert model() == "ours" and not weight.numel()
    remove()
    with pytest.raises(PactError, match="ZeRO-3 has partitioned the head"):
        head_of(model)
