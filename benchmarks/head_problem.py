"""The inputs of the head benchmark: hidden states, head weight, targets, and a policy loss on a fraction of the tokens."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from pact_fast.kernels import LossTokens

Tensor = torch.Tensor
IGNORE = -100
SEQUENCES = 8
LOGIT_STD = 3.0  # of the logits of a row; over 10⁵ of them, max − min is about 26
TARGET_LIFT = 20.0  # a target's logit is raised by up to this: probabilities from 1e-8 to nearly 1
WIDTHS = {  # name: (D, V)
    "qwen3-0.6b": (1024, 151_936),
    "qwen3-1.7b": (2048, 151_936),
    "qwen3-4b": (2560, 151_936),
    "qwen3-8b": (4096, 151_936),
    "llama3-8b": (4096, 128_256),
    "cpu": (1024, 32_768),
}


@dataclass(frozen=True)
class HeadProblem:
    """Inputs of one case; leaves and columns of all methods.

    hidden               [N, D] leaf
    weight               [V, D] leaf
    target               int64 [N]
    active               bool [N] tokens with a loss
    sequence_advantage   [SEQUENCES] one advantage per sequence of N / SEQUENCES tokens
    """

    hidden: Tensor
    weight: Tensor
    target: Tensor
    active: Tensor  # bool [N]
    sequence_advantage: Tensor  # [SEQUENCES]

    @functools.cached_property
    def labels(self) -> Tensor:
        """int64 [N], IGNORE where a token is inactive."""
        return self.target.masked_fill(~self.active, IGNORE)

    @functools.cached_property
    def advantage(self) -> Tensor:
        """[N] advantage of a token's sequence, 0 where it is inactive."""
        return self.sequence_advantage.repeat_interleave(len(self.target) // SEQUENCES) * self.active

    @functools.cached_property
    def token_weight(self) -> Tensor:
        """[N] weights of a mean over active tokens."""
        return self.active / self.active.sum()

    @functools.cached_property
    def tokens(self) -> LossTokens:
        """The same as a loss table."""
        n, device = len(self.target), self.target.device
        zeros = torch.zeros(n, dtype=torch.int64, device=device)
        return LossTokens(
            row=torch.arange(n, device=device),
            target=self.target,
            context=zeros,
            component=zeros,
            sequence=torch.arange(SEQUENCES, device=device).repeat_interleave(n // SEQUENCES),
            advantage=self.advantage,
            old_logprob=torch.full((n,), torch.nan, device=device),
            rl_weight=self.token_weight,
            sft_weight=torch.zeros(n, device=device),
        )

    @property
    def gradient_bytes(self) -> int:
        """Bytes of dX and dW."""
        return self.hidden.nbytes + self.weight.nbytes

    def clear(self) -> None:
        """Free the gradients."""
        self.hidden.grad = self.weight.grad = None

    def subset(self, rows: int) -> HeadProblem:
        """The first tokens of every sequence, `rows` in total, with the same weight."""
        per = max(1, min(rows, len(self.target)) // SEQUENCES)

        def cut(t: Tensor) -> Tensor:
            return t.detach().view(SEQUENCES, -1, *t.shape[1:])[:, :per].flatten(0, 1)

        hidden = cut(self.hidden).clone().requires_grad_()
        return replace(self, hidden=hidden, target=cut(self.target), active=cut(self.active))

    def double(self) -> HeadProblem:
        """The same in fp64."""
        hidden, weight = (t.detach().double().requires_grad_() for t in (self.hidden, self.weight))
        return replace(self, hidden=hidden, weight=weight)


def make_problem(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, fraction: float, seed: int = 0
) -> HeadProblem:
    """Random inputs whose logits are spread as those of a trained model.

    Logits are normal with standard deviation LOGIT_STD; the target's is raised by a ~ U(0, TARGET_LIFT) through
    hᵢ = ε + a·w_t/‖w_t‖². Values are the same in every dtype up to rounding.

    Args:
        shape: (N, D, V); N a multiple of SEQUENCES.
        dtype: Of hidden and weight.
        device: Of all tensors.
        fraction: Of the tokens that are active, at random places.
        seed: Of the generator.
    """
    n, d, v = shape
    if n % SEQUENCES:
        raise ValueError(f"N = {n} must be a multiple of {SEQUENCES}")
    rng = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(v, d, generator=rng, device=device).mul_(LOGIT_STD / d**0.5)
    target = torch.randint(v, (n,), generator=rng, device=device)
    lift = TARGET_LIFT * torch.rand(n, 1, generator=rng, device=device)
    rows = weight[target]
    hidden = torch.randn(n, d, generator=rng, device=device) + lift * rows / rows.square().sum(1, keepdim=True)
    active = torch.zeros(n, dtype=torch.bool, device=device)
    active[torch.randperm(n, generator=rng, device=device)[: max(1, round(fraction * n))]] = True
    advantage = torch.randn(SEQUENCES, generator=rng, device=device)
    return HeadProblem(hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target, active, advantage)
