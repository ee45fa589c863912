"""The loss kernel in a plain PyTorch loop: no trainer, no environment, no [tokens, vocabulary] tensor.

    python examples/loss_in_pytorch.py

A toy policy (an embedding as the decoder, a linear language-model head) is trained on made-up rollouts of one prompt. Each
supervised token is one row of `LossTokens`: the hidden state that predicts it, the token, under which context it is
scored, and its weights. Weights hold every normaliser, so the losses of micro-batches simply add up.
"""

from __future__ import annotations

import torch

from pact_fast.kernels import LossTokens, pact_loss, summarise

VOCABULARY, WIDTH, ROLLOUTS, LENGTH = 1000, 64, 4, 16
REASONING, TOOL_CALL = 1, 2  # components, for the statistics


def make_tokens(ids: torch.Tensor, rewards: torch.Tensor) -> LossTokens:
    """The loss table of a batch of rollouts.

    Args:
        ids: int64 [K, L], sampled tokens; token t is predicted by the hidden state of token t − 1.
        rewards: float [K].
    """
    advantage = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)  # group-relative, as in GRPO
    components = torch.where(torch.arange(ids.shape[1]) % 2 == 0, REASONING, TOOL_CALL).expand_as(ids)
    return LossTokens.from_batch(ids, torch.ones_like(ids), advantage, components=components)


def main(steps: int = 20) -> list[float]:
    """Train for some steps; returns the mean log-probability of the best rollout's tokens after each."""
    torch.manual_seed(0)
    decoder = torch.nn.Embedding(VOCABULARY, WIDTH)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    optimizer = torch.optim.AdamW([*decoder.parameters(), *head.parameters()], lr=1e-2)
    ids = torch.randint(VOCABULARY, (ROLLOUTS, LENGTH))
    tokens = make_tokens(ids, rewards=torch.tensor([1.0, 0.0, 0.0, 0.5]))
    best = tokens.sequence == 0
    history = []
    for step in range(steps):
        hidden = decoder(ids).flatten(0, 1)  # [T, D]
        output = pact_loss(hidden, head.weight, tokens, clip=(0.2, 0.28))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(float(output.logprob[best].mean()))
        if step % 5 == 0:
            entropy = summarise(output.stats)["prompt/tool_call/entropy"]
            print(f"step {step:2}  loss {output.loss.item():+.4f}  log-prob {history[-1]:.2f}  entropy {entropy:.2f}")
    return history


if __name__ == "__main__":
    main()
