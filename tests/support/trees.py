"""Random token trees, and losses over them: of the whole tree at once, and of every path by itself."""

from __future__ import annotations

import random

import numpy as np
import torch

from pact_fast.tree import TokenTree, pack, tree_forward


def random_tree(rng: random.Random, nodes: int) -> TokenTree:
    tree = TokenTree()
    handles = [tree.add(np.array([rng.randrange(97) for _ in range(rng.randint(1, 6))]))]
    for _ in range(nodes):
        handles.append(tree.add(np.array([rng.randrange(97) for _ in range(rng.randint(0, 6))]), rng.choice(handles)))
    return tree


def path_ids(node) -> np.ndarray:
    return np.concatenate([n.ids for n in node.path()])


def trees(seed: int = 0) -> list[TokenTree]:
    rng = random.Random(seed)
    return [random_tree(rng, 7), random_tree(rng, 4), random_tree(rng, 0)]


def weights_of(trees: list[TokenTree]) -> dict[int, torch.Tensor]:
    torch.manual_seed(1)
    return {id(n): torch.randn(len(n.ids), dtype=torch.float64) for t in trees for n in t.nodes}


def gradients(model, total: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    total.backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def as_tree(model, trees: list[TokenTree], share: bool = True, forward=tree_forward) -> torch.Tensor:
    """A weighted sum over the hidden states that predict every token."""
    weights = weights_of(trees)
    total = torch.zeros((), dtype=torch.float64)
    for batch in pack(trees, max_tokens=60, share=share):
        hidden = forward(model, batch)
        for node in batch.owned:
            rows = batch.rows(node)
            keep = rows >= 0
            total = total + (hidden[rows[keep]].double().sum(-1) * weights[id(node)][keep]).sum()
    return total


def alone(model, trees: list[TokenTree]) -> torch.Tensor:
    """The same from every path by itself, through the model's own attention."""
    model.set_attn_implementation("eager")
    weights = weights_of(trees)
    total = torch.zeros((), dtype=torch.float64)
    for node in (n for t in trees for n in t.nodes if len(n.ids)):
        hidden = model.base_model(torch.as_tensor(path_ids(node))[None]).last_hidden_state[0]
        rows = np.arange(node.start, node.end) - 1
        keep = rows >= 0
        total = total + (hidden[rows[keep]].double().sum(-1) * weights[id(node)][keep]).sum()
    return total


def cost(tokens: float, pairs: float) -> float:
    return 1000.0 * tokens + pairs
