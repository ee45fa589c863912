"""pact_fast.kernels needs torch and its dependencies, nothing else, not even numpy."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys

import pytest

from tests.support.processes import environment

pytestmark = pytest.mark.slow

USE = """
import sys

from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in BLOCKED else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding

import torch
from pact_fast.kernels import LossTokens, head_of, linear_cross_entropy, linear_logprob, pact_loss

torch.manual_seed(0)
hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
target, index = torch.randint(11, (6,)), torch.arange(6)
zeros, expert = torch.zeros(6, dtype=torch.int64), torch.full((6,), 2)
rl_weight, sft_weight, advantage = torch.rand(6), torch.rand(6), torch.randn(6)
log_p = torch.log_softmax(hidden @ weight.T, -1)[index, target]
# without old log-probs the ratio is 1 and the gradient of the policy loss is that of −A·log π
expected = -(rl_weight * advantage * log_p + sft_weight * log_p).sum()
expected = torch.autograd.grad(expected, (hidden, weight))
tokens = LossTokens(index, target, zeros, zeros, zeros, advantage, torch.full((6,), torch.nan), rl_weight, sft_weight)
loss = pact_loss(hidden, weight, tokens, backend="torch").loss
for ours, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), expected):
    torch.testing.assert_close(ours, theirs)
torch.testing.assert_close(linear_logprob(hidden, weight, target, backend="torch").logprob, log_p)
torch.testing.assert_close(linear_cross_entropy(hidden, weight, target, backend="torch"), -log_p.mean())

class CausalLM(torch.nn.Module):  # the methods of a transformers model that head_of calls
    config = type("Config", (), {"model_type": "own"})

    def __init__(self):
        super().__init__()
        self.base_model, self.lm_head = torch.nn.Embedding(11, 8), torch.nn.Linear(8, 11)

    def get_decoder(self): return self.base_model
    def get_output_embeddings(self): return self.lm_head

    def forward(self, input_ids, use_cache=None):
        return type("Output", (), {"logits": 0.5 * self.lm_head(self.base_model(input_ids).last_hidden_state)})

head = head_of(CausalLM())
assert head.weight.shape == (11, 8) and head.options["logit_scale"] == 0.5
print(*sorted(name for name in sys.modules if name.startswith("pact_fast.") and "kernels" not in name))
"""


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def dependencies(package: str) -> set[str]:
    """Distributions that a package requires on this machine, transitively."""
    found, left = set(), [package]
    while left:
        name = normalized(left.pop())
        if name in found:
            continue
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # for another platform
            continue
        found.add(name)
        left += [re.split(r"[^\w.-]", line)[0] for line in lines if "extra ==" not in line]
    return found


def test_the_kernels_run_where_nothing_but_torch_is_installed():
    needed = dependencies("torch")
    blocked = {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if not needed & {normalized(owner) for owner in owners}
    } - {"pact_fast"}
    assert {"numpy", "transformers", "pydantic"} <= blocked and "torch" not in blocked
    command = [sys.executable, "-c", f"BLOCKED = {blocked!r}\n{USE}"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [
        "pact_fast." + name for name in ("components", "errors", "files", "openmp", "plugins", "registry")
    ]
