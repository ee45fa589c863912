"""The tokens of verl's micro-batches that are scored: where they are, their columns, and results as verl's losses read them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pact_fast.integrations.prompt_tree import PromptTrees


class VerlBatch:
    """N tokens of a micro-batch of B sequences, T tokens in verl's packed order.

    data         the micro-batch
    at           (sequence, position in its response) [N]; empty without responses
    row          int64 [N], the packed token that predicts each
    target       int64 [N]
    old_logprob  float32 [N] of the policy before the step; 0 where there is none
    temperature  a number, or [N]

    everything: All tokens of responses, not only those with a loss.
    """

    def __init__(self, data: Any, everything: bool):
        self.data, ids = data, data["input_ids"]
        self._offsets, self._entropy = ids.offsets(), _setting(data, "calculate_entropy")
        packed, self.at = ids.values(), (ids.offsets()[:0], ids.offsets()[:0])
        self._before = torch.zeros(len(packed), device=packed.device)
        if "responses" in data:
            mask, place = self._responses()
            scored = mask if everything else mask & _padded(data, "response_mask").bool()
            sequence, position = scored.nonzero(as_tuple=True)
            self.at, self.row = (sequence, position), place[sequence, position]
            if "old_log_probs" in data:
                self._before[place[mask]] = _padded(data, "old_log_probs")[mask].float()
        else:
            kept = torch.roll(data["loss_mask"].values(), -1).bool()
            self.row = (torch.ones_like(kept) if everything else kept).nonzero().squeeze(1)
        self.target, self.old_logprob = torch.roll(packed, -1)[self.row], self._before[self.row]
        self.temperature = data["temperature"]
        if isinstance(self.temperature, torch.Tensor):
            of_sequence = torch.bucketize(self.row, self._offsets[1:], right=True)
            self.temperature = self.temperature.float().expand(len(ids))[of_sequence]
        else:
            self.temperature = float(self.temperature)

    def _responses(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(mask, packed row that predicts) [B, R] of all tokens of responses, found by verl's own slicing."""
        from verl.workers.utils.padding import no_padding_2_padding

        total = int(self._offsets[-1])
        place = no_padding_2_padding(torch.arange(1, total + 1, device=self._offsets.device), self.data)
        return place > 0, place - 1

    def rows_in(self, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """[N] rows of hidden states that are packed (None), or padded as the mask [B, L] says and flattened."""
        return self.row if attention_mask is None else attention_mask.flatten().nonzero().squeeze(1)[self.row]

    def model_output(self, logprob: torch.Tensor, entropy: torch.Tensor) -> dict[str, torch.Tensor]:
        """verl's nested [B, length of each]; tokens that are not scored have entropy 0 and their old log-prob, ratio 1."""
        columns = {"log_probs": (self._before, logprob)}
        if self._entropy:
            columns["entropy"] = torch.zeros_like(self._before), entropy
        return {
            name: torch.nested.nested_tensor_from_jagged(
                before.to(values.dtype).index_put((self.row,), values), self._offsets
            )
            for name, (before, values) in columns.items()
        }

    def shares_prompts(self) -> bool:
        """Whether two responses have the same prompt."""
        return "responses" in self.data and len({p.tobytes() for p in self._split()[0]}) < len(self.data)

    def trees(self) -> PromptTrees:
        """The micro-batch with every prompt once."""
        return PromptTrees(*self._split())

    def _split(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        return split(self.data, self._responses()[0].sum(1).tolist())


def split(data: Any, lengths: list[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(prompts, responses) of sequences whose responses have these lengths."""
    sequences = [ids.cpu().numpy() for ids in data["input_ids"].unbind()]
    cuts = [len(ids) - n for ids, n in zip(sequences, lengths, strict=True)]
    pairs = list(zip(sequences, cuts, strict=True))
    return [ids[:cut] for ids, cut in pairs], [ids[cut:] for ids, cut in pairs]


def group_size(data: Any) -> int:
    """Responses per prompt if all prompts have as many, one after the other, and a group fits into a micro-batch; else 1."""
    from verl.workers.utils.padding import no_padding_2_padding

    if "responses" not in data:
        return 1
    ids = data["input_ids"]
    lengths = (no_padding_2_padding(torch.ones_like(ids.values()), data) > 0).sum(1).tolist()
    prompts = [prompt.tobytes() for prompt in split(data, lengths)[0]]
    starts = [i for i, prompt in enumerate(prompts) if not i or prompt != prompts[i - 1]]
    sizes = set(np.diff([*starts, len(prompts)]).tolist())
    size = sizes.pop() if len(sizes) == 1 else 1
    tokens = ids.offsets().diff().view(-1, size).sum(1).max().item()
    return size if tokens <= data["max_token_len_per_gpu"] * _setting(data, "sp_size", 1) else 1


def _setting(data: Any, name: str, default: Any = False) -> Any:
    from verl.utils import tensordict_utils as tu

    return tu.get_non_tensor_data(data, name, default)


def _padded(data: Any, name: str) -> torch.Tensor:
    """A column [B, R] as verl's losses read it."""
    return data.select(name).to_padded_tensor()[name]
