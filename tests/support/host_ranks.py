"""Cases of test_host_ranks.py: several ranks of a host trainer use the kernels, and each checks its own results."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist

from pact_fast.kernels import head_of, linear_logprob, vocab_parallel_logprob
from pact_fast.tree import TokenTree, inside_forward, pack, tree_forward
from tests.support.models import make
from tests.support.processes import deepspeed_on_gloo

SIZES = {2: (20, 17), 4: (3, 19, 1, 14)}  # rows of the vocabulary on each rank
CASES = {
    "plain": {},
    "bias, soft-cap, temperature": {"softcap": 4.0, "temperature": 0.7, "logit_scale": 1.3, "with_bias": True},
    "a temperature each": {"temperature": torch.linspace(0.5, 2.0, 23)},
    "ties": {"tied": True},
    "large": {"factor": 40.0},  # p → 1, and shards without any weight
    "chunks": {"rows": 6},
}


def join() -> tuple[int, int]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def vocabulary() -> None:
    """Log-probs, entropies and gradients of shards are those of one rank that has the whole vocabulary."""
    rank, ranks = join()
    for name, options in CASES.items():
        for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
            _compare(name, rank, SIZES[ranks], dtype, bound, **options)
    dist.destroy_process_group()


def _compare(name, rank, sizes, dtype, bound, with_bias=False, tied=False, factor=1.0, rows=None, **options) -> None:
    from pact_fast.kernels.head import vocab_parallel

    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((23, 8), (37, 8), (37,))
    )
    weight[30:] = weight[:7] if tied else weight[30:]
    hidden, weight, bias = (t.to(dtype).requires_grad_() for t in (factor * hidden, weight, bias))
    targets = torch.randint(37, (23,), generator=generator)
    g, h = (
        torch.randn(23, generator=generator).to(torch.float64 if dtype == torch.float64 else torch.float32)
        for _ in "gh"
    )
    g[3], h[3], h[5] = 0.0, 0.0, 0.0

    def result(function, w, b, *more):
        logprob, entropy = function(hidden, w, targets, *more, bias=b, entropy=True, **options)
        inputs = [hidden, w] + [b] * (b is not None)
        return logprob, entropy, *torch.autograd.grad((logprob * g).sum() + (entropy * h).sum(), inputs)

    part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    own = weight.detach()[part].requires_grad_()
    own_bias = bias.detach()[part].requires_grad_() if with_bias else None
    most = vocab_parallel.max_chunk_rows
    vocab_parallel.max_chunk_rows = most if rows is None else lambda *_: rows
    given = result(vocab_parallel_logprob, own, own_bias, dist.group.WORLD)
    vocab_parallel.max_chunk_rows = most
    whole = result(linear_logprob, weight, bias if with_bias else None)
    expected = [t[part] if i >= 3 else t for i, t in enumerate(whole)]
    for what, a, b in zip(("logprob", "entropy", "hidden", "weight", "bias"), given, expected, strict=False):
        error = float((a.double() - b.double()).abs().max() / whole[2].abs().max().clamp(min=1.0))
        # fp32 knows logits of several hundred to 1e-5
        limit = bound * max(1.0, float(b.double().abs().max())) * max(1.0, factor / 4)
        assert error <= limit, (name, dtype, what, error, limit)


def guest(wrapper: str) -> None:
    """Gradients of a tree in a wrapped model are the mean over the ranks of those of a model by itself."""
    rank, ranks = join()
    _guest(wrapper, rank, ranks)  # the wrapper is gone before its group: it may wait for ranks that have ended
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def _guest(wrapper: str, rank: int, ranks: int) -> None:
    batches = []
    for r in range(ranks):
        tree = TokenTree()
        root = tree.add([5 + r, 6, 7, 8])
        nodes = [tree.add([9, 10 + r, 11], root), tree.add([12, 13], root)]
        batches.append((pack([tree], max_tokens=99)[0], nodes))

    def loss(model, batch, nodes):
        head, hidden = head_of(model), tree_forward(model, batch)
        at = torch.cat([torch.as_tensor(batch.rows(node)) for node in nodes])
        target = torch.cat([torch.as_tensor(node.ids) for node in nodes]).long()
        return -linear_logprob(head.input(hidden[at]), head.weight, target, **head.options).logprob.sum()

    plain = make("llama").float()
    total = sum(loss(plain, *batch) for batch in batches) / ranks
    expected = torch.autograd.grad(total, list(plain.parameters()))
    model, gradients = WRAPPERS[wrapper](make("llama").float())
    value = inside_forward(model, lambda: loss(model, *batches[rank]))
    gradients.backward(value)
    for a, b, (name, _) in zip(gradients.whole(), expected, plain.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{wrapper} {name}: {text}")


class _Plain:
    def __init__(self, model):
        self.model = model

    def backward(self, value):
        value.backward()

    def whole(self):
        grads = [p.grad for p in self.model.parameters()]
        return [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]


class _Zero3(_Plain):
    def __init__(self, engine):
        super().__init__(engine.module)
        self._engine = engine

    def backward(self, value):
        self._engine.backward(value)

    def whole(self):
        from deepspeed.utils import safe_get_full_grad

        return [safe_get_full_grad(p) for p in self.model.parameters()]


def _ddp(model):
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    return wrapped, _Plain(model)


def _fsdp2(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.lm_head, mesh=mesh)  # by itself: a DTensor inside the model's forward
    fully_shard(model, mesh=mesh)
    return model, _Plain(model)


def _zero3(model):
    deepspeed_on_gloo()
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "Adam", "params": {"torch_adam": True}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    head_of(model)  # the transform of its logits, before the parameters are split
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine, _Zero3(engine)


WRAPPERS = {"ddp": _ddp, "fsdp2": _fsdp2, "zero3": _zero3}
