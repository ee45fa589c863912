"""A micro-batch of completions as token trees, in which a prompt is computed once for all of its completions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pact_fast.errors import PactError
from pact_fast.model.forward import unsupported
from pact_fast.tree import Node, TokenTree, pack, tree_forward


def unsupported_tree(causal_lm: Any) -> str | None:
    """Why trees cannot stand for the model's own batches; None if they can."""
    dropout = float(getattr(causal_lm.config.get_text_config(), "attention_dropout", 0.0) or 0.0)
    if dropout:
        return f"attention_dropout={dropout}: tree attention has no dropout; set it to 0"
    dropping = [name for name, m in causal_lm.named_modules() if isinstance(m, torch.nn.Dropout) and m.p]
    if dropping:  # completions would share the dropout of their prompt, and nothing could be compared
        return f"{dropping[0]} has dropout; set it to 0"
    return unsupported(causal_lm)


class PromptTrees:
    """One tree per distinct prompt, with a branch for each of its completions; both are lists of int64 arrays."""

    def __init__(self, prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray]):
        trees: dict[bytes, tuple[TokenTree, Node]] = {}
        self._nodes: list[Node] = []
        for prompt, completion in zip(prompts, completions, strict=True):
            key = prompt.tobytes()
            if key not in trees:
                tree = TokenTree()
                trees[key] = tree, tree.add(prompt)
            tree, root = trees[key]
            self._nodes.append(tree.add(completion, root))
        everything = sum(map(len, prompts)) + sum(map(len, completions))
        (self.batch,) = pack([tree for tree, _ in trees.values()], max_tokens=everything, merge=True)

    @staticmethod
    def of_padded(inputs: dict[str, torch.Tensor]) -> PromptTrees:
        """From TRL's inputs: prompt_ids [B, P] and prompt_mask, padded on the left; completion_ids [B, C] and mask."""
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
        prompts, prompt_masks, completions, masks = (inputs[name].cpu().numpy() for name in names)
        if (masks[:, :-1] < masks[:, 1:]).any():
            raise PactError('TRL\'s GRPO: a completion has holes in its mask; use mode="loss"')
        return PromptTrees(
            [ids[kept != 0] for ids, kept in zip(prompts, prompt_masks, strict=True)],
            [ids[:n] for ids, n in zip(completions, masks.sum(1), strict=True)],
        )

    def rows(self, at: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """int64 [N], the hidden state that predicts each token; at: (sequence, position) [N] in the completions."""
        sequence, position = (t.cpu().numpy() for t in at)
        by_node = [np.asarray(self.batch.rows(node)) for node in self._nodes]
        found = [by_node[i][t] for i, t in zip(sequence, position, strict=True)]
        return torch.as_tensor(np.array(found, dtype=np.int64), device=at[0].device)

    def forward(self, causal_lm: Any) -> torch.Tensor:
        """[T, D] hidden states."""
        return tree_forward(causal_lm, self.batch)


def group_shuffle(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """TRL's `_prepare_inputs`, which shuffles completions before it makes micro-batches; now prompt by prompt.

    Completions of a prompt stay together, so that a micro-batch has something to share.
    """

    def prepare_inputs(*args: Any, **options: Any) -> Any:
        from trl.trainer import grpo_trainer as module

        grpo_trainer: Any = module
        original, grpo_trainer.shuffle_sequence_dict = grpo_trainer.shuffle_sequence_dict, _shuffle_groups
        try:
            return prepare(*args, **options)
        finally:
            grpo_trainer.shuffle_sequence_dict = original

    return prepare_inputs


def _shuffle_groups(columns: dict[str, Any]) -> dict[str, Any]:
    prompts = torch.cat([columns["prompt_ids"], columns["prompt_mask"].to(columns["prompt_ids"].dtype)], 1)
    starts = torch.cat([torch.ones(1, dtype=torch.bool), (prompts[1:] != prompts[:-1]).any(1).cpu()])
    groups = list(torch.arange(len(prompts)).tensor_split(starts.nonzero().flatten()[1:].tolist()))
    order = list(itertools.chain.from_iterable(groups[i].tolist() for i in torch.randperm(len(groups)).tolist()))

    def permuted(values: Any) -> Any:
        if values is None or (isinstance(values, torch.Tensor) and values.ndim == 0):
            return values
        return values[order] if isinstance(values, torch.Tensor) else [values[i] for i in order]

    return {name: permuted(values) for name, values in columns.items()}
