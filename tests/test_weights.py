"""The weights as a checkpoint would name them, and the comparison of those that were sent with those that arrived."""

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from pact_fast.kernels.fingerprint import fingerprint
from pact_fast.model.weights import (
    WeightMismatch,
    WeightShard,
    WeightSnapshot,
    WeightsUnavailable,
    checkpoint_weights,
    tied_head,
    verify,
)

SIZES = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
)  # fmt: skip
MIXTURE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1)


def build(kind: str, **more):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **more), dtype=torch.float32)


@pytest.mark.parametrize(
    "kind, more",
    [("qwen3", {"tie_word_embeddings": True}), ("llama", {"tie_word_embeddings": False}), ("qwen3_moe", MIXTURE)],
)
def test_names_and_values_are_those_of_a_saved_checkpoint(kind, more, tmp_path):
    model = build(kind, **more)
    model.save_pretrained(tmp_path)
    saved = {}
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            saved |= {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    sent = dict(checkpoint_weights(model))
    assert sorted(sent) == sorted(saved)
    assert all(torch.equal(sent[name], saved[name]) for name in saved)
    halves = dict(checkpoint_weights(model, torch.bfloat16))
    assert {t.dtype for t in halves.values()} == {torch.bfloat16}


def test_small_buckets_change_nothing(monkeypatch):
    model = build("qwen3_moe", **MIXTURE)
    whole = {name: fingerprint(tensor) for name, tensor in checkpoint_weights(model)}
    monkeypatch.setattr("pact_fast.model.weights.BUCKET", 1)
    assert {name: fingerprint(tensor) for name, tensor in checkpoint_weights(model)} == whole


@pytest.mark.parametrize("kind, more", [("qwen3", {"tie_word_embeddings": True}), ("qwen3_moe", MIXTURE)])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_that_are_sent_are_those_that_were_announced(kind, more, dtype, monkeypatch):
    monkeypatch.setattr("pact_fast.model.weights.BUCKET", 4000)
    weights = WeightSnapshot(build(kind, **more), dtype)
    announced = [tuple(shape) for shape in weights.metadata()]
    assert announced == [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights]
    assert list(weights.expected) == [name for name, *_ in announced]


def test_weights_are_sent_again_as_they_were_or_not_at_all(monkeypatch):
    model = build("qwen3")
    weights = WeightSnapshot(model)
    first = iter(weights)
    next(first)  # nobody receives the rest
    assert [name for name, _ in weights] == list(weights.expected)
    assert weights.bytes == sum(parameter.nbytes for parameter in model.parameters())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    with pytest.raises(WeightsUnavailable, match=r"changed them since \(model.layers.1.mlp.up_proj.weight\)"):
        list(weights)


def test_tied_head_is_recognised():
    assert tied_head(build("qwen3", tie_word_embeddings=True)) == ("lm_head.weight", "model.embed_tokens.weight")
    assert tied_head(build("qwen3", tie_word_embeddings=False)) is None


class TestVerify:
    matrix = torch.arange(48.0).view(8, 6).sin()

    @property
    def expected(self):
        return {"a": (8, 6, fingerprint(self.matrix)), "b": (6, 1, fingerprint(self.matrix[0]))}

    def pieces(self, row=4):
        m = self.matrix
        return [
            WeightShard("a", 0, 0, row, 6, fingerprint(m[:row])),
            WeightShard("a", row, 0, 8 - row, 6, fingerprint(m[row:], row)),
            WeightShard("b", 0, 0, 6, 1, fingerprint(m[0])),
        ]

    def test_shards_and_equal_copies_pass(self):
        verify(self.expected, self.pieces())
        verify(self.expected, [*self.pieces(), self.pieces()[2]])  # a norm that every device has

    def test_every_fault_is_named(self):
        p = self.pieces()
        faults = {
            "a": [p[0]._replace(fingerprint=p[0].fingerprint ^ 1), *p[1:]],
            "a (incomplete)": p[1:],
            "b (missing)": p[:2],
            "b (copies differ)": [*p, p[2]._replace(fingerprint=1)],
            "c (unknown to the trainer)": [*p, p[2]._replace(name="c")],
        }
        for shown, pieces in faults.items():
            with pytest.raises(WeightMismatch) as error:
                verify(self.expected, pieces)
            assert f"({shown})" in str(error.value)
