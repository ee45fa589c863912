"""Small inputs of the head's operators."""

from __future__ import annotations

import torch

from pact_fast.kernels import LossTokens

ROWS, WIDTH, VOCAB = 12, 6, 31


def inputs(dtype: torch.dtype = torch.float32, grad: bool = True) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = (ROWS, WIDTH), (VOCAB, WIDTH), (VOCAB,)
    return [torch.randn(*shape).to(dtype).requires_grad_(grad) for shape in shapes]


def tokens(n: int = 20, seed: int = 0) -> LossTokens:
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> torch.Tensor:
        return torch.rand(n, generator=generator)

    context = torch.arange(n) % 3
    return LossTokens(
        row=torch.randint(ROWS, (n,), generator=generator),
        target=torch.randint(VOCAB, (n,), generator=generator),
        context=context,
        component=torch.arange(n) % 5,
        sequence=torch.arange(n) // 4,
        advantage=uniform() - 0.5,
        old_logprob=-4.0 * uniform(),
        rl_weight=uniform() * (context < 2),
        sft_weight=uniform() * (context == 2),
        ref_logprob=-4.0 * uniform(),
        sampler_logprob=-4.0 * uniform(),
    )
